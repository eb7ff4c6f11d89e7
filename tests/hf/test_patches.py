"""What importing the package does to transformers: as little as the docstrings of hf/patches.py say."""

import copy
import inspect
import pickle

import programs
import pytest
import tiny
import torch
from transformers import Cache, LlamaConfig, PreTrainedConfig, PreTrainedModel, masking_utils, modeling_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import attn_plugins as ap
from attn_plugins.hf import patches
from attn_plugins.hf.attention_function import attention_forward
from attn_plugins.hf.checkpoints import live
from attn_plugins.hf.masks.mask_function import lazy_mask

WITHOUT_FLAG = """
import sys, torch
sys.path.insert(0, {folder!r})
if {imported}:
    import attn_plugins
    assert "peft" not in sys.modules
import tiny
for name in ("llama", "gemma3", "bert", "t5", "vit", "llava"):
    model, given = tiny.build(name), tiny.inputs(name, length=20 if name == "llava" else 13)
    with torch.no_grad():
        out = tiny.output(model, given)
    print(name, out.double().sum().item().hex(), out.shape, sorted(model.config.to_dict().items(), key=str), sep="|")
"""


def test_importing_changes_nothing_for_models_without_the_flag():
    folder = tiny.__file__.rpartition("/")[0]
    found = [
        programs.run("-c", WITHOUT_FLAG.format(folder=folder, imported=imported)).stdout for imported in (False, True)
    ]
    assert found[0].count("|") == 18
    assert found[0] == found[1]


def test_configs_made_before_and_after_the_import_allow_weights_under_our_name_alone():
    """Fails when transformers checks output_attentions in another place."""

    class Made(LlamaConfig):
        pass

    for cls in (PreTrainedConfig, LlamaConfig, Made):
        config = cls()
        config._attn_implementation_internal = "attn_plugins"
        config.output_attentions = True
        config.validate()
        config._attn_implementation_internal = "sdpa"
        with pytest.raises(ValueError, match="`output_attentions` attribute is not supported when using"):
            config.output_attentions = True
        with pytest.raises(Exception, match="`output_attentions` attribute is not supported when using"):
            config.validate()


def test_installing_twice_changes_nothing():
    before = (PreTrainedModel.post_init, PreTrainedModel._initialize_weights, PreTrainedModel.set_attn_implementation)
    patches.install()
    after = (PreTrainedModel.post_init, PreTrainedModel._initialize_weights, PreTrainedModel.set_attn_implementation)
    assert before == after
    assert all(hasattr(method, patches._MARK) for method in after)


def test_peft_still_has_what_is_changed_in_it():
    """Fails when PEFT reads, makes, saves or merges adapters by others: hf/checkpoints/peft.py has to follow."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import hotswap

    changed = [
        *(getattr(peft.LoraConfig, name).__func__ for name in ("from_pretrained", "from_peft_type")),
        *(getattr(peft.PeftModelForCausalLM, n) for n in ("save_pretrained", "add_adapter", "_upload_modified_files")),
        *(peft.LoraConfig.save_pretrained, peft.PeftModel.__init__, hotswap.hotswap_adapter_from_state_dict),
        *(BaseTuner.inject_adapter, BaseTuner._replace_module),
        *(peft.peft_model.get_peft_model_state_dict, peft.peft_model.set_peft_model_state_dict),
        *(peft.get_peft_model_state_dict, peft.set_peft_model_state_dict),
    ]
    assert all(hasattr(function, patches._MARK) for function in changed)
    before = {name: vars(peft.PeftModel)[name] for name in ("__init__", "save_pretrained")}
    patches._install_peft()
    assert before == {name: vars(peft.PeftModel)[name] for name in before}


def test_saving_and_uploading_still_go_by_what_is_changed():
    """Fails when transformers uploads folders by another method; README.md would go to the hub without its part."""
    for name in ("save_pretrained", "_upload_modified_files", "load_adapter", "_load_from_state_dict"):
        assert hasattr(getattr(tiny.MODELS["llama"]()[0], name), patches._MARK), name
    for method in (PreTrainedModel.push_to_hub, getattr(PreTrainedModel.save_pretrained, patches._MARK)):
        assert "_upload_modified_files" in inspect.unwrap(method).__code__.co_names


def test_both_interfaces_know_the_name():
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS["attn_plugins"] is attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["attn_plugins"] is lazy_mask


def test_config_field_is_a_class_attribute_that_plain_configs_do_not_save():
    assert PreTrainedConfig.attn_plugin is None
    assert "attn_plugin" not in tiny.config_of("llama").to_dict()


def test_config_field_keeps_its_value_where_configs_keep_theirs():
    """Fails when configs no longer copy and save what is in their ``__dict__``."""
    config = tiny.config_of("llama")
    config.attn_plugin = "local"
    assert (vars(config)["attn_plugin"], config.attn_plugin, copy.deepcopy(config).attn_plugin) == ("local",) * 3
    assert config.to_dict()["attn_plugin"] == "local"
    del config.attn_plugin
    assert config.to_dict() == tiny.config_of("llama").to_dict()
    with pytest.raises(AttributeError, match="attn_plugin"):
        del config.attn_plugin


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_models_are_known_to_be_alive(made):
    """Fails when models are copied or unpickled in another way than through ``__setstate__``."""
    model = made(tiny.build("llama"))
    assert live.holding(model.config) == [model]
    assert model.model in live.models()


def test_post_init_still_runs_before_weights_load_and_inner_models_first():
    """Fails when transformers builds models in another order; hf/patches.py has to find another moment then."""
    order = []
    original = PreTrainedModel.post_init
    try:
        PreTrainedModel.post_init = lambda self: (order.append(type(self).__name__), original(self))[1]
        tiny.build("llava")
    finally:
        PreTrainedModel.post_init = original
    assert order.index("LlamaModel") < order.index("LlavaModel") < order.index("LlavaForConditionalGeneration")


def test_crop_of_a_cache_still_does_no_more_than_crop_each_of_its_layers():
    """Fails when transformers does more in it: hf/caches/rollback.py crops layers that hold states by itself."""
    assert set(Cache.crop.__wrapped__.__code__.co_names) == {"range", "len", "layers", "crop"}


def test_mask_function_still_gets_the_arguments_that_the_lazy_mask_keeps():
    """Fails when transformers asks mask functions for masks in other terms."""
    config = tiny.config_of("llama")
    config._attn_implementation = "attn_plugins"
    mask = masking_utils.create_causal_mask(config, torch.zeros(2, 5, 4), None, past_key_values=None)
    assert {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function"} <= mask.arguments.keys()
    assert (mask.batch_size, mask.q_length, mask.kv_length, mask.q_offset) == (2, 5, 5, 0)


def test_new_weights_of_a_model_on_the_meta_device_stay_there():
    with torch.device("meta"):
        model = tiny.MODELS["llama"]()[0](tiny.config_of("llama"))
    ap.swap_attention(model, "linear", feature_map="hedgehog")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_accelerate_still_gives_a_model_to_all_processes_by_the_function_that_is_changed():
    """Fails when accelerate's FSDP2 loads in another way; hf/parallel/sharding.py has to follow."""
    from accelerate.utils import fsdp_utils

    changed = fsdp_utils.fsdp2_load_full_state_dict
    assert hasattr(changed, patches._MARK)
    assert list(inspect.signature(changed).parameters) == ["accelerator", "model", "full_sd", "cpu_offload"]
    assert "fsdp2_load_full_state_dict" in fsdp_utils.fsdp2_prepare_model.__code__.co_names


def test_what_mask_functions_say_is_known_of_those_made_by_names_taken_before():
    """Some models import these functions by name; the order of imports makes no difference."""
    code = (
        "from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function\n"
        "import torch, attn_plugins\n"
        "from attn_plugins.hf.masks.structure import structure_of\n"
        "said = structure_of(and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 4))))\n"
        "assert (said.causal, said.plain, said.segments_BK.shape) == (True, True, (1, 4)), said\n"
    )
    done = programs.run("-c", code)
    assert done.returncode == 0, done.stderr
