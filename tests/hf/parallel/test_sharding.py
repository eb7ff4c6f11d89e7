"""Models on two processes: FSDP2 as accelerate sets it up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.hf.parallel.sharding import load_full_state_dict

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
