"""Prefix tuning: a cache holds keys before a model's own, in encoders too; seen as by the model's attention."""

import peft
import pytest
import tiny
import torch

import attn_plugins as ap

VIRTUAL = 5


def tuned(name, **options):
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    settings = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, **options)
    model = peft.get_peft_model(tiny.build(name), settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "prompt_encoder" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


WIDE = [
    "softmax",
    {"type": "local", "window_size": 64},
    {"type": "block_local", "block_size": 64},
    {"type": "topk", "topk": 64},
    {"type": "block_topk", "topk": 64},
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_what_sees_all_gives_what_the_models_own_attention_gives(name, masked):
    model, given = tuned(name), tiny.inputs(name, padded=masked)
    given = given if masked else {"input_ids": given["input_ids"]}
    own = tiny.output(model, given)
    for rule in WIDE:
        if name == "gemma3" and not isinstance(rule, str) and rule["type"] == "block_topk":
            continue  # it serves no sliding layers
        for layers in ("all", [1]):
            ap.swap_attention(model, [{**({"type": rule} if isinstance(rule, str) else rule), "layers": layers}])
            torch.testing.assert_close(tiny.output(model, given), own, atol=1e-5, rtol=1e-4)
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), own)


@pytest.mark.parametrize("length", [6, 13])
@torch.no_grad()
def test_an_encoders_windows_reach_into_the_prefix(length):
    """A query's window counts keys from its own one back, the last virtual token before the first real one."""
    model, window = tuned("bert"), 3
    ids = tiny.inputs("bert", length=length, padded=False)["input_ids"]
    prefix, base = model.get_prompt(batch_size=2), model.get_base_model()
    distance = torch.arange(VIRTUAL, VIRTUAL + length).unsqueeze(1) - torch.arange(VIRTUAL + length)
    own = base(ids, attention_mask=(distance.abs() < window).expand(2, 1, -1, -1), past_key_values=prefix).logits
    ap.swap_attention(model, "local", window_size=window, num_sink_tokens=0)
    torch.testing.assert_close(model(ids).logits, own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, own, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attentions_over_all_queries_say_what_they_lack():
    model, given = tuned("bert"), tiny.inputs("bert")
    for name in ("nystrom", "fastformer", "vertical_slash"):
        ap.swap_attention(model, name)
        with pytest.raises(ValueError, match=r"of all .*, got 13 queries and 18 keys; allowed: as many"):
            model(**given)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_decoders_generate_after_a_prefix(name):
    model, given = tuned(name), tiny.inputs(name)
    own = model.generate(**given, max_new_tokens=6, do_sample=False)
    for rule in WIDE[:2]:
        ap.swap_attention(model, rule)
        assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), own)


def test_prefixes_of_encoders_train_beside_windows():
    model, given = tuned("bert"), tiny.inputs("bert")
    ap.swap_attention(model, "local", window_size=3)
    model(**given, labels=torch.tensor([0, 1])).loss.backward()
    gradients = [p.grad for path, p in model.named_parameters() if "prompt_encoder" in path]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
