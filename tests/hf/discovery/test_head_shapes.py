"""Head sizes are read off a module: what it says, what its layers make, what its config says."""

from types import SimpleNamespace

import pytest
from torch import nn

from attn_plugins.hf.discovery.heads import head_shape

CASES = {
    "what it says": ({"num_heads": 4, "head_dim": 6}, {}, {}, (4, 4, 6)),
    "gated, what it says": ({"num_heads": 4, "head_dim": 8, "num_key_value_groups": 2}, {"q_proj": 64}, {}, (4, 2, 8)),
    "narrower than hidden states": ({"num_heads": 4, "hidden_size": 32}, {"q_proj": 16, "k_proj": 16}, {}, (4, 4, 4)),
    "narrower, shared": (
        {"num_heads": 4, "num_key_value_heads": 2},
        {"query": 24, "key": 12},
        {"hidden_size": 32, "head_dim": 8},
        (4, 2, 6),
    ),
    "wider by pooling": ({"num_attention_heads": 2, "dim": 8}, {"qkv": 48}, {"hidden_size": 8}, (2, 2, 8)),
    "number by its keys": ({"head_dim": 8, "num_key_value_groups": 2}, {"q_proj": 32, "k_proj": 16}, {}, (4, 2, 8)),
    "gated": ({"num_heads": 4, "num_key_value_heads": 2}, {"q_proj": 64, "k_proj": 16}, {"hidden_size": 32}, (4, 2, 8)),
    "odd": ({"num_heads": 4, "hidden_size": 32}, {"qkv": 97}, {}, (4, 4, 8)),
    "its config": ({}, {"out": 5}, {"num_attention_heads": 4, "head_dim": 5}, (4, 4, 5)),
}


def module_of(attributes: dict[str, int], layers: dict[str, int]) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    for name, features in layers.items():
        setattr(module, name, nn.Linear(8, features))
    return module


@pytest.mark.parametrize("name", CASES)
def test_head_sizes(name):
    attributes, layers, config, expected = CASES[name]
    shape = head_shape(module_of(attributes, layers), SimpleNamespace(**config))
    assert (shape.num_heads, shape.num_key_value_heads, shape.head_dim) == expected
    assert shape.value_dim == shape.head_dim


@pytest.mark.parametrize("attributes", [{}, {"head_dim": 8}, {"num_heads": 4}])
def test_head_sizes_that_cannot_be_told(attributes):
    with pytest.raises(ValueError, match="cannot tell the number and size of the heads of Module"):
        head_shape(module_of(attributes, {}), SimpleNamespace())
