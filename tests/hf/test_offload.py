"""Weights that wait elsewhere: accelerate's hooks move what a module is given, and the slot gets it all the same."""

import inspect
import warnings

import accelerate
import pytest
import tiny
import torch
from test_generation import CAUSAL, GREEDY, swapped
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

import attn_plugins as ap
from attn_plugins.hf import patches

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


PLACES = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
BY_LAYER = {**PLACES, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
WEIGHTS_AND_BUFFERS = [
    {**HEDGEHOG, "layers": 0},
    {"type": "gated_linear", "gate_input": "hidden", "layers": 1},
    {"type": "linear", "feature_map": "favor", "num_features": 8, "kv_heads": [0], "layers": 2},
    {"type": "lsh", "num_hashes": 2, "num_buckets": 4, "bucket_size": 4, "layers": 2},
]


def load(path, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(path, **options)


def assert_alike(model, expected):
    given = tiny.inputs("llama")
    torch.testing.assert_close(model(**given).logits, expected(**given).logits, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.generate(**given, **GREEDY), expected.generate(**given, **GREEDY))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("places", [{"": "cpu"}, BY_LAYER, "auto"], ids=["cpu", "layers", "auto"])
@torch.no_grad()
def test_loading_by_a_device_map(places, buffers, tmp_path):
    """Of a swapped checkpoint, with slots that are not as new ones, and of a plain one, by which all slots are new."""
    tiny.build("llama").save_pretrained(tmp_path / "plain")
    new = load(tmp_path / "plain", attn_plugin=WEIGHTS_AND_BUFFERS)
    other = load(tmp_path / "plain", attn_plugin=WEIGHTS_AND_BUFFERS)
    for name, tensor in other.state_dict().items():
        if "attn_plugin" in name:
            tensor.add_(0.1)
    other.save_pretrained(tmp_path / "swapped")
    options = {"device_map": places, "offload_folder": tmp_path / "disk", "offload_buffers": buffers}
    if places == "auto":
        options["max_memory"] = {"cpu": 70_000}  # bytes, less than half of the model
    for path, flag, expected in (("swapped", {}, other), ("plain", {"attn_plugin": WEIGHTS_AND_BUFFERS}, new)):
        model = load(tmp_path / path, **flag, **options)
        assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (places != {"": "cpu"})
        assert_alike(model, expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again").state_dict()
        assert again.keys() == expected.state_dict().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_new_weight_on_disk_needs_a_folder(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"puts model\.layers\.1\..* on disk, and the checkpoint .* offload_folder="):
        load(tmp_path, attn_plugin=HEDGEHOG, device_map=BY_LAYER)


@torch.no_grad()
def test_a_model_by_a_device_map_is_swapped_and_restored(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = load(tmp_path, device_map=BY_LAYER, offload_folder=tmp_path / "disk")
    for rules in (WEIGHTS_AND_BUFFERS, REINDEXED):
        expected = load(tmp_path)
        for one in (expected, model):
            torch.manual_seed(0)
            ap.swap_attention(one, rules)
        assert_alike(model, expected)
    assert_alike(ap.restore_attention(model), load(tmp_path))


@torch.no_grad()
def test_a_swapped_model_is_dispatched_restored_and_swapped_again(tmp_path):
    model, expected = (ap.swap_attention(tiny.build("llama"), WEIGHTS_AND_BUFFERS) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    accelerate.dispatch_model(
        model, BY_LAYER, main_device="cpu", offload_dir=tmp_path, force_hooks=True, offload_buffers=True
    )
    assert_alike(model, expected)
    assert_alike(ap.restore_attention(model), tiny.build("llama"))
    assert_alike(ap.swap_attention(model, REINDEXED), ap.swap_attention(tiny.build("llama"), REINDEXED))


def test_transformers_dispatches_by_the_function_that_is_changed():
    """Fails when transformers dispatches by another, which would know nothing of new weights."""
    assert hasattr(modeling_utils.accelerate_dispatch, patches._MARK)
    assert list(inspect.signature(modeling_utils.accelerate_dispatch).parameters) == [
        *("model", "hf_quantizer", "device_map", "offload_folder", "offload_index", "offload_buffers"),
    ]
    load = inspect.unwrap(PreTrainedModel.from_pretrained.__func__)
    assert "accelerate_dispatch" in load.__code__.co_names


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
        assert ("rotary" in seen) == (rule is not HEDGEHOG)
        for name, value in seen.items():
            assert type(moved[name]) is type(value)
        for device in (CPU, torch.device("meta")):
            elsewhere = send_to_device(seen, device)
            assert elsewhere["state"] is seen["state"]
            assert all(t.device == device for t in seen["state"].tensors.values())
            assert elsewhere["mask"].device == device
            assert "rotary" not in elsewhere or elsewhere["rotary"].cos_BQR.device == device
