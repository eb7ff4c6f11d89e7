"""Weights that wait elsewhere: accelerate's hooks move what a module is given, and the slot gets it all the same."""

import accelerate
import pytest
import tiny
import torch
from test_generation import CAUSAL, GREEDY, swapped

import attn_plugins as ap

# transformers 5.17 takes the place of offloaded weights for that of the model
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.*device type different:UserWarning")

CPU = torch.device("cpu")
GIVEN = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}


def in_ram(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def by_map(model, folder):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_offloaded_weights_give_the_same_text(name, tmp_path):
    model, given = swapped(name, "llama"), tiny.inputs("llama")
    want = model.generate(**given, **GIVEN)
    in_ram(model, tmp_path)
    for cache in ({}, {"cache_implementation": "static"}):
        got = model.generate(**given, **GIVEN, **cache)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}
REINDEXED = {"type": "local", "window_size": 4, "num_sink_tokens": 3, "positions": "cache"}


@pytest.mark.parametrize("offload", [in_ram, on_disk, by_map])
@pytest.mark.parametrize(
    ("model_name", "rules"),
    [
        ("llama", HEDGEHOG),
        ("llama", [{**HEDGEHOG, "layers": [1]}, {**REINDEXED, "layers": [2]}]),
        ("gemma3", REINDEXED),
        ("gpt2", HEDGEHOG),
    ],
)
@torch.no_grad()
def test_every_way_to_offload(model_name, rules, offload, tmp_path):
    if offload is by_map and model_name == "gpt2":
        pytest.skip("the map names a Llama's modules")
    model, given = ap.swap_attention(tiny.build(model_name), rules), tiny.inputs(model_name)
    want = model.generate(**given, **GIVEN)
    offload(model, tmp_path)
    got = model.generate(**given, **GIVEN)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_slot_that_its_state_does_not_reach_is_an_error():
    model, given = ap.swap_attention(tiny.build("llama"), HEDGEHOG), tiny.inputs("llama")
    drop = lambda module, args, kwargs: (args, {**kwargs, "state": None})  # noqa: E731
    model.model.layers[1].self_attn.attn_plugin.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(ValueError, match=r"has not taken in the 13 tokens .* a hook on its slot has kept the state"):
        model(**given)


def test_what_is_handed_to_a_slot_is_handed_on_by_hooks_that_move_it():
    from accelerate.utils import send_to_device

    seen = {}
    note = lambda module, args, kwargs: seen.update(kwargs)  # noqa: E731
    for rule in (HEDGEHOG, REINDEXED):
        model = ap.swap_attention(tiny.build("llama"), rule)
        model.model.layers[1].self_attn.attn_plugin.register_forward_pre_hook(note, with_kwargs=True)
        model(**tiny.inputs("llama"))
        moved = send_to_device(seen, CPU)
        assert moved["state"] is seen["state"] is not None
        assert moved["mask"] is seen["mask"]
        assert (moved["rotary"] is None) == (seen["rotary"] is None) == (rule is HEDGEHOG)
        for name, value in seen.items():
            assert type(moved[name]) is type(value)
        for device in (CPU, torch.device("meta")):
            elsewhere = send_to_device(seen, device)
            assert elsewhere["state"] is seen["state"]
            assert all(t.device == device for t in seen["state"].tensors.values())
            assert elsewhere["mask"].device == device
            assert elsewhere["rotary"] is None or elsewhere["rotary"].cos_BQR.device == device
