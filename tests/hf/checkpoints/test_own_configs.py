"""What a config says and what runs is the same: after swaps, edits and restores, and beside models of one config."""

import copy
import pickle
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
)

import attn_plugins as ap

LOCAL = {"type": "local", "window_size": 3}
LEARNED = {"type": "linear", "feature_map": "hedgehog"}


def plugins(model):
    return [row.plugin for row in ap.describe_attention(model)]


def pair(**flag):
    """Two models of one config object, and the config."""
    config = LlamaConfig(**tiny.GROUPED, **flag)
    torch.manual_seed(0)
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    return *models, config


@torch.no_grad()
def test_swapping_one_of_two_models_of_a_config_leaves_the_other_as_it_is():
    student, teacher, config = pair()
    given = tiny.inputs("llama")
    own = tiny.output(teacher, given)
    ap.swap_attention(student, LOCAL)
    assert torch.equal(tiny.output(teacher, given), own)
    assert not torch.allclose(tiny.output(student, given), own, atol=1e-3)
    assert (plugins(student), plugins(teacher)) == (["local"] * 3, [None] * 3)
    assert "attn_plugin" not in vars(config)
    assert plugins(LlamaForCausalLM(config)) == [None] * 3


@torch.no_grad()
def test_restoring_one_of_two_models_of_a_flagged_config_leaves_the_other_swapped():
    one, other, config = pair(attn_plugin=dict(LOCAL))
    given = tiny.inputs("llama")
    before = tiny.output(other, given)
    ap.restore_attention(one)
    assert torch.equal(tiny.output(other, given), before)
    assert (plugins(one), plugins(other)) == ([None] * 3, ["local"] * 3)
    assert not torch.allclose(tiny.output(one, given), before, atol=1e-3)
    ap.swap_attention(other, "softmax")
    assert config.attn_plugin == LOCAL  # what the user wrote, for the next model
    assert plugins(LlamaForCausalLM(config)) == ["local"] * 3


@pytest.mark.parametrize("name", ["llama", "llava", "t5", "bart", "gemma3"])
@torch.no_grad()
def test_which_configs_are_one_and_the_same_stays_as_it_was(name):
    model = tiny.build(name)

    def seen():
        held = [(path, key) for path, m in model.named_modules() for key, v in vars(m).items() if is_config(v)]
        return {(a, b): value(a) is value(b) for a in held for b in held}

    def is_config(value):
        return isinstance(value, PreTrainedConfig)

    def value(place):
        return vars(model.get_submodule(place[0]))[place[1]]

    before, config = seen(), model.config
    ap.swap_attention(model, "softmax")
    assert model.config is not config
    assert seen() == before
    parts = [v for v in vars(model.config).values() if is_config(v)]
    assert all(any(part is getattr(m, "config", None) for m in model.modules()) for part in parts)
    held = model.config
    ap.swap_attention(model, "softmax", layers=0)
    ap.restore_attention(model)
    assert model.config is held  # nobody else has it
    assert model.config.to_dict() == config.to_dict()


def test_a_part_swapped_alone_is_saved_with_the_model_around_it(tmp_path):
    model = tiny.build("llava")
    text = model.model.language_model
    ap.swap_attention(text, LEARNED)
    assert model.config.text_config is text.config
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert (saved.attn_plugin, saved._attn_implementation) == (None, "attn_plugins")  # refused without the package
    back = type(model).from_pretrained(tmp_path)
    assert ap.describe_attention(back) == ap.describe_attention(model)
    weights = model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in back.state_dict().items())
    ap.restore_attention(text)
    assert "attn_implementation" not in vars(model.config)


def test_a_part_of_a_swapped_model_is_not_changed_behind_its_back():
    model = ap.swap_attention(tiny.build("llava"), "softmax")
    rows = ap.describe_attention(model)
    part = model.model.language_model
    message = "this LlamaModel is a part of a LlavaForConditionalGeneration whose config.attn_plugin holds for it"
    with pytest.raises(ValueError, match=message):
        ap.swap_attention(part, "local")
    with pytest.raises(ValueError, match=message):
        ap.restore_attention(part)
    with pytest.raises(ValueError, match=message):
        model.config.text_config.attn_plugin = "local"
    assert ap.describe_attention(model) == rows


@torch.no_grad()
def test_the_base_model_may_be_swapped_in_place_of_the_whole():
    model, given = tiny.build("llama"), tiny.inputs("llama")
    ap.swap_attention(model, "softmax")
    ap.swap_attention(model.model, LOCAL)
    assert model.config is model.model.config
    expected = tiny.output(ap.swap_attention(tiny.build("llama"), LOCAL), given)
    assert torch.equal(tiny.output(model, given), expected)


def test_wrappers_see_the_config_of_their_model():
    model = tiny.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own, about this machine
        compiled = torch.compile(model)
    ap.swap_attention(compiled, "local")
    assert compiled.config is model.config
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    ap.swap_attention(tuned, "softmax")
    assert tuned.config is tuned.get_base_model().config
    assert tuned.config.attn_plugin == [{"type": "softmax"}]


@pytest.mark.parametrize("made", ["built", "deepcopy", "pickle", "loaded"])
@torch.no_grad()
def test_the_flag_of_a_live_models_config_swaps_it(made, tmp_path):
    model, given = tiny.build("llama"), tiny.inputs("llama")
    if made == "deepcopy":
        model = copy.deepcopy(model)
    elif made == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif made == "loaded":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    own, config = tiny.output(model, given), model.config
    for flag in (LOCAL, "softmax", {**LEARNED, "layers": [0]}):
        config.attn_plugin = flag
        live = ap.swap_attention(tiny.build("llama"), flag)
        assert torch.equal(tiny.output(model, given), tiny.output(live, given))
        assert ap.describe_attention(model) == ap.describe_attention(live)
        assert model.config is config
        assert config.attn_plugin == live.config.attn_plugin
    model.save_pretrained(tmp_path / "saved")
    assert plugins(LlamaForCausalLM.from_pretrained(tmp_path / "saved")) == ["linear", None, None]
    if made == "pickle":
        del config.attn_plugin
    else:
        config.attn_plugin = None
    assert torch.equal(tiny.output(model, given), own)
    assert plugins(model) == [None] * 3
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/config.json").read_text().count("attn_plugin")


def test_the_flag_of_a_live_config_swaps_all_models_that_have_it():
    one, other, config = pair()
    config._attn_implementation = "eager"
    config.attn_plugin = {**LOCAL, "layers": 0}
    assert plugins(one) == plugins(other) == ["local", None, None]
    assert {row.implementation for row in ap.describe_attention(other)[1:]} == {"eager"}
    ap.swap_attention(one, "softmax")
    assert (plugins(one), plugins(other)) == (["softmax"] * 3, ["local", None, None])
    config.attn_plugin = "softmax"
    ap.restore_attention(one)
    assert (plugins(one), plugins(other)) == ([None] * 3, ["softmax"] * 3)


def test_the_flag_of_a_live_part_swaps_the_part():
    model = tiny.build("llava")
    model.config.text_config.attn_plugin = "local"
    assert plugins(model) == [None, None, "local", "local", "local"]
    model.config.attn_plugin = {"type": "softmax", "roles": "encoder"}
    assert plugins(model) == ["softmax", "softmax", None, None, None]
    assert model.config.text_config.attn_plugin is None


@pytest.mark.parametrize(
    ("flag", "message"), [("locl", "unknown attention 'locl'"), ({"type": "local", "layers": 9}, "out of range")]
)
def test_a_bad_flag_on_a_live_config_changes_nothing(flag, message):
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    before, rows = copy.deepcopy(model.config.attn_plugin), ap.describe_attention(model)
    with pytest.raises(ValueError, match=message):
        model.config.attn_plugin = flag
    assert (model.config.attn_plugin, ap.describe_attention(model)) == (before, rows)


def edit_an_option(model):
    model.config.attn_plugin[0]["window_size"] = 9


def edit_the_list(model):
    model.config.attn_plugin.append({"type": "softmax"})


def pass_by(model):
    vars(model.config)["attn_plugin"] = None


def exchange(model):
    model.config = LlamaConfig(**tiny.GROUPED)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("edit", [edit_an_option, edit_the_list, pass_by, exchange])
def test_an_edit_that_no_module_was_told_of_is_refused(edit, copied, tmp_path):
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    if copied:
        model = copy.deepcopy(model)
    edit(model)
    message = r"the config of this LlamaForCausalLM has attn_plugin=.*but its modules were given .*'window_size': 3"
    with pytest.raises(ValueError, match=message):
        model(**tiny.inputs("llama"))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert plugins(model) == ["local"] * 3
    ap.swap_attention(model, "softmax")
    model(**tiny.inputs("llama"))


def test_a_flag_that_came_with_another_config_is_not_saved(tmp_path):
    model = tiny.build("llama")
    model.config = LlamaConfig(**tiny.GROUPED, attn_plugin="local")
    assert plugins(model) == [None] * 3
    with pytest.raises(ValueError, match=r"attn_plugin='local', of which its modules know nothing; call attn_plugins"):
        model.save_pretrained(tmp_path)


@torch.no_grad()
def test_a_config_that_goes_past_the_slots_is_told_and_refused(tmp_path):
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    model.config._attn_implementation = "sdpa"
    rows = ap.describe_attention(model)
    assert [(row.plugin, row.implementation) for row in rows] == [(None, "sdpa")] * 3
    message = "says 'sdpa', which bypasses its attn_plugin; call attn_plugins.restore_attention"
    with pytest.raises(ValueError, match=message):
        model(**tiny.inputs("llama"))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert plugins(ap.swap_attention(model, LOCAL)) == ["local"] * 3


def test_a_config_without_the_name_that_others_refuse_is_not_saved(tmp_path):
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    model.config.attn_implementation = "sdpa"  # of no effect here, and read from config.json by other processes
    with pytest.raises(ValueError, match=r"attn_implementation of the config .* is no longer 'attn_plugins'"):
        model.save_pretrained(tmp_path)


def test_a_constructor_that_refuses_a_live_models_config_leaves_it_as_it_was():
    model, given = ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": 2}), tiny.inputs("llama")

    class Shorter(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            del self.layers[1:]
            self.post_init()

        def post_init(self):
            if len(self.layers) == 1:
                super().post_init()

    with pytest.raises(ValueError, match="layers=2 is out of range"):
        Shorter(model.config)
    model(**given)
    assert plugins(model) == [None, None, "local"]


def test_parts_that_are_swapped_refuse_another_implementation():
    model = tiny.build("llava")
    model.config.text_config.attn_plugin = "local"
    with pytest.raises(ValueError, match="would bypass this model's attn_plugin"):
        model.set_attn_implementation("eager")


def test_another_model_may_be_built_from_a_live_models_config():
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    base = LlamaModel(model.config)
    assert plugins(base) == ["local"] * 3
    edited = copy.deepcopy(model.config)
    edited.attn_plugin = "softmax"
    assert plugins(LlamaForCausalLM(edited)) == ["softmax"] * 3
    ap.restore_attention(base)
    assert plugins(model) == ["local"] * 3
    assert model.config.attn_plugin[0]["window_size"] == 3


def test_a_model_without_the_flag_has_no_hook_and_its_users_config():
    config = LlamaConfig(**tiny.GROUPED)
    model = LlamaForCausalLM(config)
    assert model.config is config
    assert not any(module._forward_pre_hooks for module in model.modules())
    ap.restore_attention(ap.swap_attention(model, LOCAL))
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_bart_of_one_config_has_its_teacher_beside_it():
    config = BartConfig(**tiny.HALVES, max_position_embeddings=128)
    student, teacher = BartForConditionalGeneration(config).eval(), BartForConditionalGeneration(config).eval()
    given = tiny.inputs("bart")
    own = tiny.output(teacher, given)
    ap.swap_attention(student, {"type": "local", "roles": ["encoder", "decoder"]})
    assert torch.equal(tiny.output(teacher, given), own)
    tiny.output(student, given)
    ap.restore_attention(student)
    assert torch.equal(tiny.output(teacher, given), own)
