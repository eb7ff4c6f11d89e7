"""Head sizes are read off a module: what it says, what its layers make, what its config says."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

import attn_plugins as ap
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


def test_positions_beside_the_content_make_queries_and_keys_twice_as_wide():
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "d_model": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], out_indices=[4])
    model = tf.ConditionalDetrModel(tf.ConditionalDetrConfig(backbone_config=backbone, **layers, **sizes))
    heads = head_shape(model.decoder.layers[0].encoder_attn, model.config)
    assert (heads.num_heads, heads.head_dim, heads.value_dim) == (4, 16, 8)
    heads = head_shape(model.decoder.layers[0].self_attn, model.config)
    assert (heads.head_dim, heads.value_dim) == (8, 8)
    ap.swap_attention(model, "additive", roles="cross")
    model(pixel_values=torch.randn(1, 3, 96, 96)).last_hidden_state.sum().backward()
    weights = [w for path, w in model.named_parameters() if "attn_plugin" in path]
    assert weights
    assert all(weight.grad is not None for weight in weights)
