"""Retention's decays: RetNet's by head, MiniMax-01's by head and layer."""

import dataclasses

import pytest
import tiny
import torch
from cases import head_shape, inputs
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import attn_plugins as ap
from attn_plugins.core.registry import get_attention


def gates(heads, decay="lightning"):
    """(H,) log gates."""
    cls, given = get_attention("retention"), inputs(1, 3, num_heads=heads.num_heads)
    module = cls(cls.Config(decay=decay), heads).double()
    return module.prepare(0.4)(given.q, given.k, given.v, *module.weights()).log_gate.flatten()


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_lightning_decays_are_those_of_minimax(layer):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5}
    theirs = MiniMaxLightningAttention(MiniMaxConfig(**sizes, head_dim=8), layer).slope_rate.flatten()
    got = gates(dataclasses.replace(head_shape(), layer=layer, layers=5))
    torch.testing.assert_close(got.float(), -theirs, rtol=1e-6, atol=0)


def test_processes_that_share_heads_have_the_decays_of_all():
    whole = head_shape(num_heads=4, num_key_value_heads=2)
    for decay in ("retnet", "lightning"):
        parts = [gates(whole.share(number, 2), decay) for number in (0, 1)]
        torch.testing.assert_close(torch.cat(parts), gates(whole, decay), rtol=0, atol=0)


def test_a_model_tells_each_layer_its_number_among_all():
    model = ap.swap_attention(tiny.build("llama"), {"type": "retention", "decay": "lightning"})
    found = [layer.self_attn.attn_plugin.heads for layer in model.model.layers]
    assert [heads.layer for heads in found] == list(range(len(found)))
    assert {heads.layers for heads in found} == {len(found)}


def test_heads_of_no_model_fade_as_in_a_first_layer():
    nowhere = dataclasses.replace(head_shape(), layer=None, layers=None)
    torch.testing.assert_close(gates(nowhere), gates(dataclasses.replace(head_shape(), layer=0, layers=7)))
