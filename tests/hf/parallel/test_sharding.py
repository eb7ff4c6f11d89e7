"""Models on two processes: FSDP2 as accelerate sets it up, and tensor parallelism as transformers loads it."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from attn_plugins.core.attention import Attention, AttentionConfig, HeadShape
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.parallel.sharding import load_full_state_dict, refuse_split_heads

FSDP = """
import sys, types
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import attn_plugins as ap
import tiny

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
FLAG = [
    {"type": "linear", "feature_map": "favor", "num_features": 8, "layers": 0},
    {"type": "lsh", "num_hashes": 2, "num_buckets": 4, "bucket_size": 4, "layers": 1},
    {"type": "linear", "feature_map": "hedgehog", "layers": 2},
]
model, given = ap.swap_attention(tiny.build("llama"), FLAG), tiny.inputs("llama")
for name, buffer in model.named_buffers():
    if "attn_plugin" in name:
        buffer.add_(1)  # as a checkpoint would bring others than a seed gives
whole, kept = model(**given, use_cache=False).logits, model.state_dict()
if rank == 1:  # as where weights are read by the first process alone
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "attn_plugin" in n)):
        tensor.data.zero_()
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    cpu_ram_efficient_loading=True,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
)
accelerator = types.SimpleNamespace(
    state=types.SimpleNamespace(fsdp_plugin=plugin),
    is_main_process=rank == 0,
    device=torch.device("cpu"),
    mixed_precision="no",
    torch_device_mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)),
    parallelism_config=types.SimpleNamespace(fsdp_dim_names=("dp_shard",)),
)
expected = {name: tensor.clone() for name, tensor in kept.items()} if rank == 0 else None
model = fsdp2_prepare_model(accelerator, model)
got = model(**given, use_cache=False).logits
torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)
got.square().mean().backward()
saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
dist.destroy_process_group()
"""


def on_two_processes(code: str, folder: Path) -> None:
    where = str(Path(tiny.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {where!r})\n{code}", str(folder)]
    told = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    first, second = (
        subprocess.Popen(
            [*command, rank], stderr=subprocess.PIPE, text=True, env={**told, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    )
    said = [process.communicate(timeout=240)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "".join(said)


@pytest.mark.slow
def test_a_model_that_one_process_has_read_arrives_whole_at_all(tmp_path):
    on_two_processes(FSDP, tmp_path)


TENSOR_PARALLEL = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import attn_plugins as ap
import tiny

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
given, how = tiny.inputs("llama"), {"max_new_tokens": 5, "do_sample": False}
ALIKE = [
    {"type": "local", "window_size": 4},
    {"type": "bigbird", "block_size": 2, "num_random_blocks": 1},
    {"type": "linear", "feature_map": "favor", "num_features": 8},
    {"type": "lsh", "num_hashes": 2, "num_buckets": 4, "bucket_size": 4},
]


def load(flag, **more):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_plugin=flag, **more)


def refused(work, name, why):
    try:
        work()
    except ValueError as error:
        said = str(error)
        assert f"model.layers.0.self_attn is under tensor parallelism" in said, said
        assert f"attention {name!r} {why}" in said and "or load without tp_plan" in said, said
    else:
        raise AssertionError(f"{name} was not refused")


for flag in ALIKE:
    one, both = load(flag), load(flag, tp_plan="auto")
    with torch.no_grad():
        torch.testing.assert_close(both(**given).logits, one(**given).logits, atol=1e-4, rtol=1e-3)
    assert torch.equal(both.generate(**given, **how), one.generate(**given, **how))
for name, why, options in (
    ("linear", "has weights a head", {"feature_map": "hedgehog"}),
    ("retention", "has weights a head", {}),
    ("shifted_block", "tells its heads apart", {"group_size": 4}),
):
    refused(lambda: load({"type": name, **options}, tp_plan="auto"), name, why)
    refused(lambda: ap.swap_attention(both, name, **options), name, why)
with torch.no_grad():  # as it was
    torch.testing.assert_close(both(**given).logits, one(**given).logits, atol=1e-4, rtol=1e-3)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensor_parallelism_gives_what_one_process_gives_or_is_refused_at_load(tmp_path):
    model = tiny.build("llama")
    model.resize_token_embeddings(tiny.VOCABULARY + 1)  # transformers 5.17 splits no odd number of them
    model.save_pretrained(tmp_path / "model")
    on_two_processes(TENSOR_PARALLEL, tmp_path)


class OfAMesh(nn.Parameter):
    """A weight as tensor parallelism leaves it, or FSDP, as far as it is looked at."""

    def __new__(cls, name, where):
        made = super().__new__(cls, torch.zeros(32, 32))
        made.device_mesh = types.SimpleNamespace(mesh_dim_names=name and (name,))
        made.placements = (where,)
        return made


def test_split_heads_are_refused_where_an_attention_needs_all():
    model = tiny.build("llama")
    module = model.model.layers[0].self_attn
    options = {"linear": {"feature_map": "hedgehog"}, "shifted_block": {}, "local": {}}
    shape = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8)
    slots = {name: (c := get_attention(name))(c.Config(**more), shape) for name, more in options.items()}

    def check(mesh, where):
        module.q_proj.weight = OfAMesh(mesh, where)
        for name, slot in slots.items():
            refuse_split_heads(model, f"layer of {name}", module, slot)

    check("dp_shard", Shard(0))  # gathered before it is used
    check("tp", Replicate())
    check(None, Shard(0))  # as fully_shard makes a mesh
    model._tp_size = 2
    with pytest.raises(ValueError, match="layer of linear is under tensor parallelism"):
        check(None, Shard(0))
    with pytest.raises(ValueError, match=r"layer of linear is under tensor parallelism.*'linear' has weights a head.*"):
        check("tp", Shard(0))
    slots.pop("linear")
    with pytest.raises(
        ValueError, match=r"'shifted_block' tells its heads apart.*; choose an attention that has no we"
    ):
        check("tp", Shard(0))
    slots.pop("shifted_block")
    check("tp", Shard(0))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("made", torch.zeros(2), persistent=False)


class Drawn(Attention):
    """An attention of a third party, with buffers in a module of its own."""

    def __init__(self):
        super().__init__(AttentionConfig())
        self.inner = Inner()


def test_buffers_that_a_slot_saves_are_not_taken_for_shards(tmp_path):
    def original(accelerator, model, full_sd, cpu_offload=False):
        assert list(model.state_dict()) == list(full_sd) == ["proj.weight"]
        assert cpu_offload
        model.load_state_dict(full_sd, assign=True)
        return model

    class Accelerator:
        is_main_process, device = True, torch.device("cpu")

    model = nn.ModuleDict({"proj": nn.Linear(2, 2, bias=False), "attn_plugin": Drawn()})
    full = {"proj.weight": torch.ones(2, 2), "attn_plugin.inner.kept": torch.ones(3)}
    assert list(model.state_dict()) == list(full)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model.to("meta")
        assert load_full_state_dict(original, Accelerator(), model, full, cpu_offload=True) is model
    finally:
        torch.distributed.destroy_process_group()
    assert list(model.state_dict()) == list(full)
    kept = model["attn_plugin"].inner.kept
    assert torch.equal(kept, torch.ones(3, dtype=torch.bfloat16))


def test_models_without_such_buffers_are_left_to_accelerate():
    seen = []
    model = nn.Linear(2, 2)
    load_full_state_dict(lambda *args, **kwargs: seen.append((args, kwargs)), "accelerator", model, {"weight": 1})
    assert seen == [(("accelerator", model, {"weight": 1}), {})]
