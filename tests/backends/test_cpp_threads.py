"""Compiled kernels on several threads come to what they come to on one."""

import pytest
import torch
from cases import Case, assert_same, cotangent_for, inputs, outcome, rounds, seeded

from attn_plugins.core.registry import get_attention

HEADS = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "value_dim": 16}


def assert_alike_on_threads(case, given, mask, shape):
    """One thread and two come to the same outputs and gradients."""
    module, before, found = case.module(backend="cpp", dtype=torch.float32, **shape), torch.get_num_threads(), []
    cotangent = cotangent_for(given, mask).float()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(module, given, mask, cotangent))
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0], 1e-5)


@pytest.mark.cpp
@rounds(
    "of",
    [
        ("local", True),
        ("bigbird", False),
        ("linear", True),
        ("linear", False),
        ("block_topk", True),
        ("linear_window", True),
    ],
)
def test_threads_change_nothing_but_the_order_of_sums(built, of):
    """One head on two threads: tiles, and chunks, are shared; where blocks are chosen it is heads."""
    name, causal = of
    heads = 2 if name == "block_topk" else 1
    shape = {**HEADS, "num_heads": heads, "num_key_value_heads": heads}
    case = Case(get_attention(name), {"window_size": 40} if name == "local" else {}, causal)
    given, mask = inputs(1, 700, **shape, dtype=torch.float32), case.mask(1, 700, 700)
    assert_alike_on_threads(case, given, mask, shape)


@pytest.mark.cpp
def test_threads_share_the_gradient_of_a_bias(built):
    """Those that see all are in tiles of their own and in those of the window, which may be other threads'."""
    shape = {**HEADS, "num_heads": 1, "num_key_value_heads": 1}
    case = Case(get_attention("longformer"), {"window_size": 40, "num_global_tokens": 70}, False)
    given, mask = inputs(1, 700, **shape, dtype=torch.float32), case.mask(1, 700, 700)
    given.extras = {"position_bias": torch.randn(1, 1, 700, 700, generator=seeded(2))}
    assert_alike_on_threads(case, given, mask, shape)
