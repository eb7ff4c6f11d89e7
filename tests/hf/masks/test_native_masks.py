"""Modules that attend by themselves, in a model with swapped ones, get the masks that they had."""

import pytest
import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.hf.masks import native_masks


def build():
    halves = {f"{half}_{of}": n for half in ("encoder", "decoder") for of, n in (("layers", 2), ("attention_heads", 4))}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_time_features": 2}
    series = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
    torch.manual_seed(0)
    return tf.InformerModel(tf.InformerConfig(**halves, **sizes, **series)).eval()


def numbers(model):
    torch.manual_seed(0)  # of the keys that its own attention takes as a sample
    given = {
        "past_values": torch.randn(2, 11),
        "past_time_features": torch.randn(2, 11, 2),
        "past_observed_mask": torch.ones(2, 11),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 2),
    }
    return model(**given).last_hidden_state


@torch.no_grad()
def test_what_is_left_alone_computes_what_it_did():
    """Informer's own attention halves the sequence from layer to layer, and has a mask only where there is padding."""
    model = build()
    own = numbers(model)
    rows = ap.describe_attention(ap.swap_attention(model, "softmax", roles="cross"))
    assert {(row.role, row.plugin) for row in rows} == {("cross", "softmax")}
    torch.testing.assert_close(numbers(model), own, atol=1e-5, rtol=1e-5)
    assert (numbers(ap.swap_attention(model, "topk", topk=1, roles="cross")) - own).abs().max() > 1e-3
    assert torch.equal(numbers(ap.restore_attention(model)), own)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert native_masks.before_attention not in hooks


def test_a_model_that_attends_by_itself_is_refused_for_what_it_lacks():
    with pytest.raises(ValueError, match=r"matches nothing"):
        ap.swap_attention(build(), "softmax")
