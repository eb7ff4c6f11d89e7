"""FlexAttention's own Triton templates with the masks of the backend, forward and backward, against ``reference``."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, assert_forms_agree, inputs, left_padding, seeded
from flex_in_triton import GPUS, inductor_for

from attn_plugins.backends import flex
from attn_plugins.core.registry import get_attention

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore"),  # of torch's compiler, about itself
]
LENGTH = 300
SHAPE = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "value_dim": 16}
FLEX = {"backend": "flex", "dtype": torch.float32, "tolerance": 1e-5, **SHAPE}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(flex.Flex, "devices", ("cpu",))
    monkeypatch.setattr(flex, "compiled", functools.cache(flex.compiled.__wrapped__))
    with inductor_for(90, run=True, blocks=64) as written:
        yield written


def masks(name, length=LENGTH):
    index = torch.arange(length)
    return {
        "plain": {},
        "left padding": {"padding_BK": left_padding([length, length * 2 // 5], length)},
        "packed and padded": {
            "segments_BK": torch.stack([index // 120, index // 200]),
            "padding_BK": left_padding([length, length - 20], length).flip(1),
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "options", "causal", "mask", "extras"),
    [
        ("local", {"window_size": 80, "num_sink_tokens": 3}, True, "packed and padded", ()),
        ("longformer", {"window_size": 60, "num_global_tokens": 4}, False, "left padding", ()),
        ("bigbird", {"block_size": 32, "num_random_blocks": 2}, True, "left padding", ()),
        ("shifted_block", {"group_size": 100}, False, "packed and padded", ()),
        ("neighborhood_2d", {"kernel_size": 5, "num_prefix_tokens": 2, "grid_size": (10, 15)}, False, "plain", ()),
        ("local", {"window_size": 80}, True, "left padding", ("softcap", "sinks")),
        ("local", {"window_size": 80}, True, "plain", ("position_bias",)),
        ("softmax_plus_one", {}, True, "left padding", ("sinks",)),
    ],
)
def test_equals_reference(name, options, causal, mask, extras, interpreted):
    case = Case(get_attention(name), options, causal)
    length = LENGTH if case.cls.any_length else 152
    given = inputs(2, length, **SHAPE)
    given.extras = some_extras(extras, length)
    mask = case.mask(2, length, length, **masks(mask))
    assert_forms_agree(case, given, mask, **FLEX)
    sources = [source for _, source, _ in interpreted]
    assert all(any(part in source for source in sources) for part in ("forward_inner(", "bwd_dkdv_inner("))


def some_extras(names, queries):
    bias = torch.randn(1, 2, queries, LENGTH, generator=seeded(2), dtype=torch.float64)
    extras = {"softcap": 2.0, "sinks": torch.randn(2, generator=seeded(3), dtype=torch.float64), "position_bias": bias}
    return {name: extras[name] for name in names}


def test_few_queries_equal_reference():
    """They have a template of their own, as in text that is generated."""
    case = Case(get_attention("local"), {"window_size": 80, "num_sink_tokens": 3}, True)
    given = inputs(2, 9, LENGTH, **SHAPE)
    given.extras = some_extras(("sinks", "position_bias"), 9)
    assert_forms_agree(case, given, case.mask(2, 9, LENGTH, **masks("left padding")), **FLEX)


def test_a_rule_of_the_model_equals_reference():
    """Its own window, by absolute positions, for the last of the keys."""
    case = Case(get_attention("local"), {"window_size": 80, "num_sink_tokens": 3}, True)
    rule = {"plain": False, "rule": lambda b, h, q, k: (k <= q) & (k > q - 50 - b)}
    mask = case.mask(2, 150, 190, **masks("left padding", 190), **rule)
    assert_forms_agree(case, inputs(2, 150, 190, **SHAPE), mask, **FLEX)


def test_a_second_length_and_later_ones_equal_reference():
    """They run what was compiled for every length."""
    case = Case(get_attention("local"), {"window_size": 80, "num_sink_tokens": 3}, True)
    for length in (150, 140, 190):
        mask = case.mask(2, length, length, **masks("packed and padded", length))
        assert_forms_agree(case, inputs(2, length, **SHAPE), mask, **FLEX)


@pytest.mark.parametrize("architecture", GPUS)
def test_templates_compile_and_fit_into_shared_memory(architecture):
    """In a process of its own, where Triton compiles."""
    label = "local, 4 sink tokens, packed and padded"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("flex_compiled.py")
    run = [sys.executable, str(script), str(architecture), "64", label]
    done = subprocess.run(
        run, capture_output=True, text=True, env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["template"] for row in rows] == ["forward", "backward"]
    assert all(0 < row["shared"] <= row["of"] for row in rows), rows
