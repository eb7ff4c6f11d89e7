"""Bad flags: one clear ValueError, before anything has changed."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, ConvNextConfig, ConvNextModel, LlamaConfig

import attn_plugins as ap

BAD = [
    ("locl", r"unknown attention 'locl' \(did you mean local\?\); known: .*softmax"),
    (
        {"type": "local", "windw_size": 3},
        r"unknown option 'windw_size' \(did you mean window_size\?\); options: window_size",
    ),
    ({"type": "local", "window_size": "3"}, r"window_size='3' is of type str; allowed: int"),
    ({"type": "local", "window_size": True}, r"window_size=True is of type bool; allowed: int"),
    ({"type": "local", "window_size": 0}, r"window_size=0; allowed: .*1"),
    ({"type": "linear", "feature_map": "elo"}, r"feature_map='elo'; allowed: .*'elu'.*'hedgehog'"),
    ({"type": "local", "layers": 3}, r"layers=3 is out of range; there are layers 0 to 2 in model.layers"),
    ({"type": "local", "layers": "1-3"}, r"layers='1-3' is out of range"),
    ({"type": "local", "layers": "2-1"}, r"layers='2-1' is out of range"),
    ({"type": "local", "layers": -4}, r"layers=-4 is out of range"),
    ({"type": "local", "layers": "every:2+9"}, r"layers='every:2\+9' is out of range"),
    ({"type": "local", "layers": "first"}, r"layers='first'; allowed: \"all\", 3, -1, \"0-15\", \"every:4\""),
    ({"type": "local", "layers": []}, r"layers=\[\] names no layer"),
    ({"type": "local", "layers": 1.5}, r"layers=1.5; allowed"),
    (
        {"type": "local", "roles": "decodr"},
        r"roles='decodr' \(did you mean decoder\?\); allowed: encoder, decoder, cross",
    ),
    ({"type": "local", "roles": []}, r"roles=\[\]; allowed: a name or a list of names"),
    ({"type": "local", "roles": ["cross"]}, r"matches nothing: no module fits roles=\['cross'\]; the model has roles"),
    (
        {"type": "local", "modules": "*.atn"},
        r"matches nothing: no attention module's path matches modules=\['\*.atn'\]",
    ),
    ({"type": "local", "backend": "flahs"}, r"backend='flahs'.*allowed: auto, reference, torch, batched"),
    (
        [{"type": "local"}, {"type": "softmax", "layers": 1}],
        r"rule 1 \('softmax'\) matches nothing: earlier rules take all",
    ),
    ({"window_size": 3}, r"has no 'type', only \['window_size'\]"),
    ([], r"the list of rules is empty"),
    (3, r"rule is 3 of type int; allowed: a name or a mapping with 'type'"),
    ([{"type": "local"}, 3], r"rule 1 is 3 of type int"),
]


@pytest.mark.parametrize(("flag", "message"), BAD)
@torch.no_grad()
def test_bad_flag_changes_nothing(flag, message):
    given, model = tiny.inputs("llama"), ap.swap_attention(tiny.build("llama"), "local", window_size=4, layers=[0, 1])
    before, rows, settings = tiny.output(model, given), ap.describe_attention(model), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        ap.swap_attention(model, flag)
    assert ap.describe_attention(model) == rows
    assert model.config.to_dict() == settings
    assert torch.equal(tiny.output(model, given), before)


@pytest.mark.parametrize(("flag", "message"), BAD[:6])
def test_bad_flag_in_a_config(flag, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(LlamaConfig(**tiny.GROUPED, attn_plugin=flag))


def test_options_belong_to_a_name():
    with pytest.raises(ValueError, match=r"options \['window_size'\] go with a name, not with a dict of rules"):
        ap.swap_attention(tiny.build("llama"), {"type": "local"}, window_size=3)


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("t5", "linear", r"cannot serve encoder.block.0.layer.0.SelfAttention: it adds a relative position bias"),
        (
            "bart",
            {"type": "local", "roles": "cross"},
            r"encoder_attn: it is cross-attention, and attention 'local' has no 'cross'",
        ),
        ("gemma2", "linear", r"it limits scores with softcap=5.0|it has its own mask \(sliding_attention\)"),
        ("gemma3", "linear", r"layers.0.self_attn: it has its own mask \(sliding_attention\).*choose other modules"),
        ("mistral", "linear", r"it has its own mask \(sliding_window=6\)"),
        ("gpt_oss", "linear", r"it has learned sink logits|it has its own mask"),
    ],
)
def test_what_the_model_needs_is_refused_at_swap_time(name, flag, message):
    model = tiny.build(name)
    with pytest.raises(ValueError, match=message):
        ap.swap_attention(model, flag)
    assert all(row.plugin is None for row in ap.describe_attention(model))


def test_what_only_the_inputs_show_is_refused_at_the_first_forward():
    model = ap.swap_attention(tiny.build("llama"), "linear")
    ids = torch.arange(3, 13).unsqueeze(0)
    rule = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril().triu(-3)
    with pytest.raises(
        ValueError, match="needs a mask beyond causal, padding and segments, which attention 'linear' cannot"
    ):
        model(input_ids=ids, attention_mask=rule)


def test_a_model_without_swappable_attention():
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(ValueError, match="ConvNextModel has no attention that can be swapped"):
        ap.swap_attention(model, "local")


def test_a_model_whose_attention_is_inside_a_part_of_timm_says_which():
    tower = type("Tower", (torch.nn.Sequential,), {"__module__": "timm.models.tower"})
    attention = type("WindowAttention", (torch.nn.Linear,), {"__module__": "timm.layers.attention"})
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    model.encoder.tower = tower(tower(attention(2, 2)), attention(2, 2))
    said = r"WindowAttention: timm's: swap that part by itself, ap\.swap_attention\(model\.encoder\.tower, \.\.\.\)$"
    with pytest.raises(ValueError, match=said):
        ap.swap_attention(model, "local")


def test_something_that_is_not_a_model():
    with pytest.raises(ValueError, match="got a Linear; allowed: a transformers PreTrainedModel"):
        ap.swap_attention(torch.nn.Linear(2, 2), "local")


def test_the_implementation_name_alone_is_not_a_flag():
    with pytest.raises(ValueError, match="attn_implementation='attn_plugins' needs rules; pass attn_plugin="):
        AutoModelForCausalLM.from_config(LlamaConfig(**tiny.GROUPED), attn_implementation="attn_plugins")


@torch.no_grad()
def test_a_reference_model_of_a_swapped_ones_name_is_told_what_to_be_given(tmp_path):
    """As TRL builds it for DPO, KTO, GRPO and RLOO, where the policy is a live model."""
    tiny.build("llama").save_pretrained(tmp_path / "base")
    policy, rule = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        {"type": "linear", "feature_map": "hedgehog"},
    )
    given = {"attn_implementation": ap.swap_attention(policy, rule).config._attn_implementation, "dtype": policy.dtype}
    message = (
        r"needs rules; pass attn_plugin=.* A model of the name '.*base' is swapped here, .*: give a trainer .*"
        r"ref_model=..., or model_init_kwargs={'attn_plugin': \[{'type': 'linear', .*}\]}, .* or save the swapped model"
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(policy.config.name_or_path, **given)
    with pytest.raises(ValueError, match=r"such as attn_plugin='local', instead$"):
        AutoModelForCausalLM.from_config(LlamaConfig(**tiny.GROUPED), attn_implementation="attn_plugins")
    reference = AutoModelForCausalLM.from_pretrained(policy.config.name_or_path, attn_plugin=rule, **given)
    assert ap.describe_attention(reference) == ap.describe_attention(policy)
    for name, weight in policy.named_parameters():
        weight.add_(0.1 if "attn_plugin" in name else 0.0)
    policy.save_pretrained(tmp_path / "swapped")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped")
    reference = AutoModelForCausalLM.from_pretrained(policy.config.name_or_path, **given)
    assert torch.equal(tiny.output(reference, tiny.inputs("llama")), tiny.output(policy, tiny.inputs("llama")))


def test_a_mask_of_another_size():
    model = ap.swap_attention(tiny.build("llama"), "softmax")
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 5, 32)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(5).unsqueeze(0))
    with pytest.raises(ValueError, match="the mask is for 4 queries and 4 keys, the attention has 5 and 5"):
        layer(hidden, position_embeddings=cos_sin, attention_mask=ap.AttentionMask(1, 4, 4, causal=True))
    with pytest.raises(ValueError, match="cannot read the attention mask str"):
        layer(hidden, position_embeddings=cos_sin, attention_mask="causal")
