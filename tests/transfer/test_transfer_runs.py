"""Runs of stage 1 that are killed, gone on with, or shared by processes."""

import socket

import programs
import pytest
import tiny
import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.transfer.body import slots_of


def llama():
    torch.manual_seed(1)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.GROUPED, initializer_range=0.4)).eval()
    return ap.swap_attention(model, "linear", feature_map="hedgehog")


def texts(count=12):
    chance = torch.Generator().manual_seed(0)
    return [{"input_ids": ids} for ids in torch.randint(3, tiny.VOCABULARY, (count, 2, 16), generator=chance)]


def new_weights(model):
    return torch.cat([weight.detach().flatten() for slot in slots_of(model).values() for weight in slot.parameters()])


class KilledError(Exception):
    pass


class KilledAt:
    """Batches of a run that is killed when it asks for one."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        for number, batch in enumerate(texts()):
            if number == self.number:
                raise KilledError
            yield batch


def transfer(model, batches, **options):
    return ap.transfer_attention(model, batches, 10, progress=False, **options)


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    whole = llama()
    expected = transfer(whole, texts())
    save = {"output_dir": str(tmp_path), "training": {"save_steps": 4}}
    with pytest.raises(KilledError):
        transfer(llama(), KilledAt(7), **save)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    (tmp_path / "checkpoint-6").mkdir()  # cut off
    with pytest.raises(ValueError, match="holds an earlier run; go on with it with resume"):
        transfer(llama(), texts(), **save)
    with pytest.raises(ValueError, match="is of a run of 10 steps, and steps=12; name another output_dir"):
        ap.transfer_attention(llama(), texts(), 12, resume=True, **save)
    model = llama()
    report = transfer(model, texts(), resume=True, **save)
    assert report.resumed_from == str(tmp_path / "checkpoint-4")
    assert torch.equal(new_weights(model), new_weights(whole))
    assert report.layers == expected.layers
    assert report.losses[-1] == expected.losses[-1]
    held = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt")["state"]
    assert len(held) == 6
    (weights,) = (tmp_path / "checkpoint-10").glob("*.safetensors")
    assert weights.stat().st_size < 4 * new_weights(model).numel() + 2000  # of the new weights alone


def test_a_run_that_has_ended_is_taken_as_it_is(tmp_path):
    save = {"output_dir": str(tmp_path)}
    first, again = llama(), llama()
    expected = transfer(first, texts(), **save)
    report = transfer(again, KilledAt(4), resume=True, **save)
    assert torch.equal(new_weights(again), new_weights(first))
    assert report.layers == expected.layers
    assert (report.steps, report.losses) == (10, expected.losses)


WORKER = """
import sys
import torch
sys.path[:0] = sys.argv[2:]
from test_transfer_runs import llama, new_weights, texts, transfer

model = llama()
rows = [{"input_ids": row[None]} for batch in texts() for row in batch["input_ids"]]
report = transfer(model, rows, held_out=texts(4), output_dir=sys.argv[1], training={"save_steps": 5})
rank = torch.distributed.get_rank()
torch.save([new_weights(model), report.processes, report.tokens, report.layers[0].after], f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
sys.path[:0] = sys.argv[2:]
from torch.distributed.fsdp import fully_shard
from test_transfer_runs import llama, new_weights, slots_of, texts, transfer

dist.init_process_group("gloo")
model = llama()
new = {weight for slot in slots_of(model).values() for weight in slot.parameters()}
mesh = dist.init_device_mesh("cpu", (2,))
for part in (*model.model.layers, model):
    fully_shard(part, mesh=mesh, ignored_params=new)
assert hasattr(model.model.layers[0].mlp.up_proj.weight, "placements")
rows = [{"input_ids": row[None]} for batch in texts() for row in batch["input_ids"]]
report = transfer(model, rows, held_out=texts(4))
found = [new_weights(model), report.processes, report.tokens, report.layers[0].after]
torch.save(found, f"{sys.argv[1]}/{dist.get_rank()}.pt")
whole = llama()
fully_shard(whole, mesh=mesh)
try:
    transfer(whole, rows)
except ValueError as error:
    assert "is sharded; leave slots out with fully_shard(ignored_params=...)" in str(error), error
else:
    raise AssertionError("sharded slots were trained")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "worker", [pytest.param(WORKER, id="replicated"), pytest.param(SHARDED, id="sharded", marks=pytest.mark.slow)]
)
def test_two_processes_learn_what_one_learns_from_their_joint_batches(tmp_path, worker):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    told |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    here = [
        str(folder)
        for folder in (
            __file__.rpartition("/")[0],
            tiny.__file__.rpartition("/")[0],
            programs.__file__.rpartition("/")[0],
        )
    ]
    started = [
        programs.start("-c", worker, tmp_path, *here, env={**told, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    done = [program.wait() for program in started]
    assert [one.returncode for one in done] == [0, 0], "".join(one.stderr for one in done)
    alone = llama()
    report = transfer(alone, texts(), held_out=texts(4))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[0], new_weights(alone), rtol=0, atol=1e-4)
    assert (one[1], one[2]) == (2, report.tokens)
    assert one[3] == pytest.approx(report.layers[0].after, rel=1e-3)
    assert (worker is SHARDED) or (tmp_path / "checkpoint-10" / "trainer_state.json").exists()
