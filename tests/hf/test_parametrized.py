"""Weights of slots that something computes when they are read: torch's parametrisations, PEFT's target_parameters."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import attn_plugins as ap
from attn_plugins.core.learned_choice import LearnsChoice

HEADS = ap.HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, hidden_size=32, layer=0)
FLAGS = [
    pytest.param({"type": name, **options}, id=f"{name}-{number}")
    for name in ap.list_attentions()
    if (attention := ap.get_attention(name)).causal
    for number, options in enumerate(attention.examples)
    if next(attention(attention.Config(**options), HEADS).parameters(), None) is not None
]


def slot_of(model):
    return model.model.layers[0].self_attn.attn_plugin


@torch.no_grad()
def stirred(flag):
    model = ap.swap_attention(tiny.build("llama"), flag)
    for number, parameter in enumerate(slot_of(model).parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    return model


class Negated(nn.Module):
    def forward(self, weight):
        return -weight

    def right_inverse(self, weight):
        return -weight


@pytest.mark.parametrize("flag", FLAGS)
@torch.no_grad()
def test_a_parametrised_weight_is_what_its_parametrisation_says(flag):
    model, given = stirred(flag), tiny.inputs("llama")
    expected = tiny.output(model, given)
    slot, weights = slot_of(model), [name for name, _ in slot_of(model).named_parameters()]
    for name in weights:
        owner, _, weight = name.rpartition(".")
        parametrize.register_parametrization(slot.get_submodule(owner), weight, Negated())
        assert torch.equal(tiny.output(model, given), expected), name
    model.generate(given["input_ids"], max_new_tokens=2, do_sample=False)  # from the state
    for name in weights[1:]:  # torch puts them back at the end: their order is another one then
        owner, _, weight = name.rpartition(".")
        parametrize.remove_parametrizations(slot.get_submodule(owner), weight)
    assert torch.equal(tiny.output(model, given), expected)


@pytest.mark.parametrize("flag", FLAGS)
def test_peft_trains_a_slots_weights_as_target_parameters(flag):
    model, given = stirred(flag), tiny.inputs("llama", length=20)  # beyond windows and sinks
    names = [name for name, weight in slot_of(model).named_parameters() if weight.ndim in (2, 3)]  # as PEFT can
    if not names:
        pytest.skip("its weights are vectors, which PEFT does not adapt")
    if isinstance(slot_of(model), LearnsChoice):
        pytest.skip("what its weights choose has no gradient: they learn in transfer")
    expected = tiny.output(model, given)
    targets = [f"attn_plugin.{name}" for name in names]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets)).eval()
    out = tiny.output(adapted, given)
    assert torch.equal(out, expected)
    out.sum().backward()
    added = {
        name: p.grad for name, p in adapted.named_parameters() if ".0.self_attn.attn_plugin." in name and "B" in name
    }
    assert len(added) == len(names)
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in added.values())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        expected = tiny.output(adapted, given)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(tiny.output(merged, given), expected, atol=1e-5, rtol=1e-4)
        assert isinstance(slot_of(merged), ap.Attention)
