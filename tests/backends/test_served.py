"""Which attentions the package's own kernels serve is told by their classes, with no look at a module's attributes."""

import torch
from cases import CASES

from attn_plugins.backends.cpp import Cpp
from attn_plugins.core.backend import usual
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.blocks.gather import ChoosesBlocks
from attn_plugins.ops.linear.attention import FeatureAttention
from attn_plugins.ops.linear.window_attention import WindowAndSumsAttention
from attn_plugins.ops.softmax.attention import PatternAttention


def test_the_kernels_for_cpus_serve_what_has_the_capability():
    served = set()
    for case in CASES:
        attention = case.module()
        as_they_are = {PatternAttention.attend, FeatureAttention.attend, WindowAndSumsAttention.attend}
        want = isinstance(attention, ChoosesBlocks) or type(attention).attend in as_they_are
        assert Cpp().serves(type(attention)) == want, case
        served |= {attention.name} if want else set()
    assert {"local", "linear", "block_topk", "infllm", "native_sparse"} <= served
    assert "softmax" not in served


def test_a_module_is_asked_for_nothing_that_it_lacks(monkeypatch):
    asked = []
    monkeypatch.setattr(get_attention("softmax"), "__getattr__", lambda self, name: asked.append(name), raising=False)
    softmax = get_attention("softmax")
    assert usual(softmax(softmax.Config()), torch.device("cpu")) == "torch"
    assert asked == []
