"""Sink logits that a module makes for each query (Inkling 2)."""

import pytest
import tiny
import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.hf.arguments import sinks_of_queries

inkling2 = pytest.mark.skipif(not hasattr(tf, "Inkling2TextConfig"), reason="transformers has no Inkling 2")


@pytest.mark.parametrize("biased", [False, True])
def test_a_sink_of_each_query_is_a_bias_and_a_sink_of_zero(biased):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    logits = torch.randn(2, 3, 5, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 3, 5, 7, dtype=torch.float64) if biased else None
    scores = q @ k.transpose(2, 3) * 0.3 + (bias if biased else 0)
    want = torch.cat([scores, logits], dim=-1).softmax(dim=-1)[..., :-1] @ v
    added, sinks = sinks_of_queries(logits, bias, 7)
    assert added.shape == (2, 3, 5, 7)
    softmax = ap.get_attention("softmax")
    mask = ap.core.mask.AttentionMask(2, 5, 7, causal=False, cross=True)
    got, _ = softmax(softmax.Config())(q, k, v, mask=mask, scale=0.3, dropout=0.0, position_bias=added, sinks=sinks)
    torch.testing.assert_close(got.transpose(1, 2), want)
    gradients = [torch.autograd.grad(out.square().sum(), logits)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients)


def build():
    sizes = {**tiny.GROUPED, "num_hidden_layers": 2, "moe_intermediate_size": 48, "n_routed_experts": 4}
    windows = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 6}
    kinds = {"layer_types": ["hybrid_sliding", "hybrid"], "num_experts_per_tok": 2, "rel_extent": 32}
    torch.manual_seed(0)
    model = tf.Inkling2ForCausalLM(tf.Inkling2TextConfig(**{**sizes, **windows, **kinds}))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "sink_proj" in path:
                parameter.normal_(std=0.5)
    return model.eval()


@inkling2
@torch.no_grad()
def test_modules_with_a_sink_of_each_query_are_served():
    model, given = build(), tiny.inputs("llama")
    own = tiny.output(model, given)
    for rule in ({"type": "softmax"}, {"type": "local", "window_size": 64}, {"type": "softmax", "kv_heads": [1]}):
        torch.testing.assert_close(tiny.output(ap.swap_attention(model, rule), given), own, atol=1e-5, rtol=1e-5)
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), own)


@inkling2
def test_attentions_without_sinks_are_refused_before_anything_changes():
    model = build()
    with pytest.raises(ValueError, match=r"a sink logit for each query"):
        ap.swap_attention(model, "linear")
    assert not any(hasattr(module, "attn_plugin") for module in model.modules())
