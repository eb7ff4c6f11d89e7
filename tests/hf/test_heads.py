"""What arrives at the bridge fits, or is refused in one line."""

import re

import pytest
import torch
import transformers as tf
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attn_plugins as ap
from attn_plugins.hf.grouped_keys import fitted


class Some(torch.nn.Module):
    """A module that gives its attention something."""


SOME = Some()


@pytest.mark.parametrize("shared", [(2, 4), (4, 2), (1, 4), (2, 2), (4, 4), (2, 8)])
def test_keys_and_values_may_have_numbers_of_heads_of_their_own(shared):
    query, key, value = torch.randn(2, 8, 5, 4), torch.randn(2, shared[0], 5, 4), torch.randn(2, shared[1], 5, 3)
    _, keys, values = fitted(SOME, query, key, value)
    assert keys.shape[1] == values.shape[1] == max(shared)
    expected = sdpa(query, key, value, enable_gqa=True)
    torch.testing.assert_close(sdpa(query, keys, values, enable_gqa=True), expected)


@pytest.mark.parametrize(
    ("query", "key", "value", "allowed"),
    [
        ((2, 4, 5, 8), (2, 5, 8), (2, 4, 5, 8), "(rows, heads, length, size) each"),
        ((2, 4, 5, 8), (3, 4, 5, 8), (3, 4, 5, 8), "as many rows in all"),
        ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 5, 8), "keys as long as values"),
        ((2, 4, 5, 8), (2, 4, 5, 6), (2, 4, 5, 8), "queries and keys of one size"),
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), "key and value heads that divide the query heads, and each other"),
        ((2, 6, 5, 8), (2, 2, 5, 8), (2, 3, 5, 8), "key and value heads that divide the query heads, and each other"),
        ((2, 4, 5, 8), (2, 8, 5, 8), (2, 8, 5, 8), "key and value heads that divide the query heads, and each other"),
    ],
)
def test_what_does_not_fit_is_refused(query, key, value, allowed):
    message = f"Some gives its attention queries {query}, keys {key}, values {value}; allowed: {allowed}"
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(SOME, torch.zeros(query), torch.zeros(key), torch.zeros(value))


def test_devices_that_differ_are_refused():
    here, there = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4, device="meta")
    with pytest.raises(ValueError, match="queries on cpu, keys on meta, values on cpu; allowed: one device"):
        fitted(SOME, here, there, here)


@pytest.mark.parametrize("model_type", ["nemotron3_diarization_audio", "nemotron3_5_transcribe_asr_audio"])
@torch.no_grad()
def test_an_encoder_that_shares_keys_and_not_values(model_type):
    if model_type not in tf.CONFIG_MAPPING:
        pytest.skip("these transformers do not know it")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.CONFIG_MAPPING[model_type](**sizes, num_key_value_heads=2)
    torch.manual_seed(0)
    model, embedded = tf.AutoModel.from_config(config).eval(), torch.randn(2, 20, 32)
    own = model(inputs_embeds=embedded).last_hidden_state
    for name in ("softmax", "local", "topk"):
        ap.swap_attention(model, name, **ap.get_attention(name).limit)
        torch.testing.assert_close(model(inputs_embeds=embedded).last_hidden_state, own, atol=1e-5, rtol=1e-4)
    ap.swap_attention(model, "linear", feature_map="hedgehog")
    with pytest.raises(ValueError, match=r"'linear' was built for .* = \(4, 2, 8\), got \(4, 4, 8\)"):
        model(inputs_embeds=embedded)
