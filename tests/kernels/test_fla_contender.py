"""The contender fla, its kernels interpreted: what stands beside ours in a comparison computes the same."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attn_plugins import swap_attention
from attn_plugins.benchmark.contenders import contender_in

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreted")]


def small_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3))


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"op": "attn", "window_size": 5}, {"type": "local", "window_size": 5, "num_sink_tokens": 0}),
        ({"op": "attn", "window_size": None}, "softmax"),
        ({"op": "linear_attn"}, {"type": "linear", "feature_map": "elu"}),
    ],
)
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")  # past a text's end
@torch.no_grad()
def test_kernels_compute_what_ours_do(options, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing the library says of this machine
        theirs = contender_in({"contender": "fla", **options}).ready(small_llama().eval())
    ids = torch.randint(64, (2, 70), generator=torch.Generator().manual_seed(1))
    want = swap_attention(small_llama().eval(), ours)(ids).logits
    torch.testing.assert_close(theirs(ids).logits, want, rtol=0, atol=1e-4)
