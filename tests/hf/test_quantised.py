"""Slots of modules whose weights are quantised or elsewhere: where they compute, in the dtype of the model."""

import accelerate
import pytest
import tiny
import torch
from torch import nn

import attn_plugins as ap

FLAG = {"type": "linear", "feature_map": "hedgehog"}


class Quantised(nn.Module):
    """As such layers are: weights of integers or of 8 bits, and scales beside them, some as parameters."""

    def __init__(self, linear, dtype, scales):
        super().__init__()
        scale = linear.weight.detach().float().abs().amax() / 100
        weight = (linear.weight.detach().float() / scale).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scales == "parameter":
            self.scale = nn.Parameter(scale, requires_grad=False)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.float() * self.scale).to(x.dtype))


class Packed(nn.Module):
    """As GPTQ's: all of it in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().float().mul(100).to(torch.int32))

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight.float() / 100).to(x.dtype))


def model_of(quantise, dtype=torch.bfloat16):
    model = tiny.build("llama").to(dtype)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, quantise(getattr(layer.self_attn, name)))
    return model


QUANTISED = {
    "int8": lambda linear: Quantised(linear, torch.int8, "buffer"),
    "int8 with scales": lambda linear: Quantised(linear, torch.int8, "parameter"),
    "float8 with scales": lambda linear: Quantised(linear, torch.float8_e4m3fn, "parameter"),
    "packed": Packed,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", QUANTISED)
@torch.no_grad()
def test_new_weights_have_the_models_dtype(kind, dtype):
    model = ap.swap_attention(model_of(QUANTISED[kind], dtype), FLAG)
    slots = [module.attn_plugin for module in model.modules() if hasattr(module, "attn_plugin")]
    assert {p.dtype for slot in slots for p in slot.parameters()} == {dtype}
    out = tiny.output(model, tiny.inputs("llama"))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_new_weights_are_on_the_modules_device(kind):
    """The meta device stands for another one than the CPU."""
    model = model_of(QUANTISED[kind]).to("meta")
    ap.swap_attention(model, FLAG)
    devices = {
        p.device.type for module in model.modules() if hasattr(module, "attn_plugin") for p in module.parameters()
    }
    assert devices == {"meta"}


def test_new_weights_of_a_module_without_any_are_on_the_models_device():
    model = tiny.build("llama").to("meta")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, nn.Identity())
    ap.swap_attention(model, FLAG)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@torch.no_grad()
def test_new_weights_of_offloaded_modules_are_where_they_compute():
    """accelerate leaves the meta device in the place of weights that it brings for each call."""
    offloaded, model, given = tiny.build("llama"), tiny.build("llama"), tiny.inputs("llama")
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    for one in (offloaded, model):
        ap.swap_attention(one, FLAG)
    assert torch.equal(tiny.output(offloaded, given), tiny.output(model, given))
