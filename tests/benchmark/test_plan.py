"""A plan of a fine-tune: its bytes and FLOPs are those of a real step, and it needs neither weights nor rows."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.cost import blank_step
from attn_plugins.benchmark.cost.blank_step import optimizer_bytes
from attn_plugins.benchmark.cost.operations import counted
from attn_plugins.benchmark.cost.plan import Machines, make_plan, steps_of_run, told
from attn_plugins.benchmark.cost.roofline import DEVICES
from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import parameter_counts, prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 96
HYBRID = [{"type": "local", "window_size": 16, "num_sink_tokens": 2, "layers": 0}, {"type": "linear", "layers": 1}]


def settings(model, rows, out, **changes):
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "disable_tqdm": True, **changes.pop("training", {})}
    tree = {"model": str(model), "data": {"source": rows}, "output_dir": str(out), "training": training}
    return build(
        FinetuneConfig, {**tree, "block_size": LENGTH, "evaluation": {"length": 16}, "tune": "full", **changes}
    )


def batched_forms(attention):
    """The rules with the form that plans count."""
    rules = attention if isinstance(attention, list) else [attention]
    return [{**({"type": rule} if isinstance(rule, str) else rule), "backend": "batched"} for rule in rules]


def kept_by(model, batch):
    """Bytes that a real forward pass keeps for the backward pass, each storage once, without weights; and its loss."""
    weights = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    given = {x.untyped_storage()._cdata for x in batch.values()}
    sizes, held = {}, []

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights | given:
            sizes[storage._cdata] = storage.nbytes()
            held.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch).loss
    return sum(sizes.values()), loss


@pytest.mark.parametrize("attention", [None, "softmax", {"type": "local", "window_size": 16}, "linear", HYBRID])
def test_memory_and_flops_are_those_of_a_real_step(llama, text, tmp_path, attention):
    asked = attention if attention is None else batched_forms(attention)
    config = settings(llama, text, tmp_path / "out", attention=asked, recall=False)
    found = make_plan(config, Machines())
    trainer = prepare_finetune(config, quiet=True).trainer
    model = trainer.model.train()
    model.config.use_cache = False
    batch = next(iter(trainer.get_train_dataloader()))
    assert found.batch == {name: list(x.shape) for name, x in batch.items()}
    kept, loss = kept_by(model, batch)
    assert found.held[False].kept == pytest.approx(kept, rel=0.01)
    loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert found.gradients == sum(one.grad.nbytes for one in trained)
    assert found.weights == sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
    trainer.create_optimizer()
    trainer.optimizer.step()
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    assert found.optimizer == sum(x.nbytes for x in states)
    model.zero_grad()
    with counted() as real:
        model(**batch).loss.backward()
    assert found.flops[False] == real.flops
    assert found.launches == pytest.approx(len(real.launches), rel=0.05)  # of masks, values tell what may be left out


def most_at_once(model, batch):
    """Bytes that torch's tracker sees in a forward and a backward pass, without the batch."""
    tracker = MemTracker()
    tracker.track_external(model, *batch.values())
    with tracker, counted():
        model(**batch).loss.backward()
    (most,) = (at["Total"] for at in tracker.get_tracker_snapshot("peak").values())
    return most - sum(x.nbytes for x in batch.values())


@pytest.mark.parametrize(("size", "length"), [(2, LENGTH), (1, 4)], ids=["at the loss", "at the end, with gradients"])
def test_the_most_at_once_is_what_torch_tracks_in_a_real_step(llama, text, tmp_path, size, length):
    changes = {"attention": batched_forms(HYBRID), "recall": False, "block_size": length}
    training = {"optim": "sgd", "per_device_train_batch_size": size}
    config = settings(llama, text, tmp_path / "out", training=training, **changes)
    found, other, again = (
        make_plan(dataclasses.replace(config, training={**config.training, **more}), Machines())
        for more in ({}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2})
    )
    assert (found.held, found.flops) == (other.held, other.flops)
    assert (found.checkpointed, other.checkpointed, found.optimizer) == (False, True, 0)
    assert other.launches > found.launches
    assert found.flops[True] > 1.1 * found.flops[False]
    assert (found.held[True].peak < found.held[False].peak) == (length == LENGTH)
    trainer = prepare_finetune(config, quiet=True).trainer
    model = trainer.model.train()
    model.config.use_cache = False
    batch = next(iter(trainer.get_train_dataloader()))
    assert found.held[False].peak == pytest.approx(most_at_once(model, batch), rel=0.02)
    assert again.held[False].peak == pytest.approx(most_at_once(model, batch), rel=0.02)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    assert found.held[True].peak == pytest.approx(most_at_once(model, batch), rel=0.02)


def test_flops_are_those_that_torch_counts(llama, text, tmp_path):
    """Where it counts them: not inside operators, and fused attention by all pairs."""
    rule = {"type": "softmax", "backend": "reference"}
    config = settings(llama, text, tmp_path / "out", attention=rule, recall=False)
    trainer = prepare_finetune(config, quiet=True).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    with FlopCounterMode(display=False) as counter:
        trainer.model(**batch).loss.backward()
    assert make_plan(config, Machines()).flops[False] == counter.get_total_flops() > 0


def test_adapters_in_mixed_precision(llama, text, tmp_path):
    """As accelerate trains them: weights of operations in half precision for a while, outputs in single."""
    training = {"bf16": True, "gradient_accumulation_steps": 4}
    config = settings(llama, text, tmp_path / "out", attention=batched_forms("linear"), tune="lora", training=training)
    config = dataclasses.replace(config, recall=False)
    found = make_plan(config, Machines())
    trainer = prepare_finetune(config, quiet=True).trainer
    model = trainer.accelerator.prepare_model(trainer.model.train())
    trainer.model.config.use_cache = False
    batch = next(iter(trainer.get_train_dataloader()))
    kept, loss = kept_by(model, batch)
    assert found.held[False].kept == pytest.approx(kept, rel=0.01)
    loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert found.gradients == sum(one.grad.nbytes for one in trained)
    assert found.parameters["trained"] == sum(one.numel() for one in trained)
    with counted() as real:
        model(**batch).loss.backward()
    assert found.flops[False] == 4 * real.flops
    single = make_plan(dataclasses.replace(config, training={**config.training, "bf16": False}), Machines())
    assert found.held[False].kept < 0.8 * single.held[False].kept


def test_steps_and_rows_are_those_of_the_run(bert, labelled, tmp_path):
    """Of rows that are padded to the batch, the longest are counted."""
    training = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    changes = {"task": "classification", "max_length": 9, "attention": "linear", "evaluation": {}, "tune": "new"}
    config = settings(bert, labelled, tmp_path / "out", training=training, **changes)
    found = make_plan(config, Machines())
    run = prepare_finetune(config, quiet=True)
    trainer = run.trainer
    assert (found.rows, found.batch["input_ids"]) == (len(run.examples), [2, 9])
    assert found.steps == trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    for rows, processes, steps in [(64, 1, 48), (65, 1, 51), (65, 4, 15), (1, 4, 3)]:
        assert steps_of_run(trainer.args, rows, processes) == steps
    assert found.parameters == parameter_counts(trainer.model)


def test_an_adapter_trains_on_as_it_is(llama, text, tmp_path):
    config = settings(llama, text, tmp_path / "adapter", attention="linear", tune="lora", training={"max_steps": 1})
    prepare_finetune(dataclasses.replace(config, recall=False), quiet=True).run(None)
    again = settings(tmp_path / "adapter", text, tmp_path / "out", attention="as-saved", tune="lora")
    found = make_plan(again, Machines())
    assert found.attention == {"linear": 2}
    assert found.parameters == parameter_counts(prepare_finetune(again, quiet=True).trainer.model)


def test_neither_weights_nor_rows_are_read_and_nothing_is_written(llama, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(Path(llama) / "config.json", tmp_path / "model")
    words = ["finetune", "-m", str(tmp_path / "model"), "-d", str(tmp_path / "none.jsonl"), "-a", "local"]
    words += ["-o", str(tmp_path / "out"), "--plan", "-s", "training.max_steps=7", "-s", "block_size=64"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:-1])
    assert lines["steps"].strip() == f"7, {7 * 8 * 64:,} tokens"
    assert lines["attention"].strip() == "local in 2 modules"
    assert "time" not in lines
    assert done.stdout.endswith("an estimate: nothing was run\n")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}

    done = CliRunner().invoke(cli.app, [*words, "--gpu", "H200", "--processes", "4", "--sharding", "fsdp"])
    assert done.exit_code == 0, done.output
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:-1])
    assert lines["H200 SXM"].strip().startswith("fits: 0% of 141 GB")
    assert "at least" in lines["time"]
    assert lines["steps"].strip() == f"7, {4 * 7 * 8 * 64:,} tokens"

    for more, message in [
        (["--gpu", "H20"], "gpu='h20' (did you mean h200?); allowed, since their rates are published"),
        (["--processes", "0"], "processes=0; allowed: at least 1"),
        (["--sharding", "zero"], "sharding='zero'; allowed: ddp, fsdp"),
        (["-s", "block_size=4096"], "block_size=4096; allowed: at most 128"),
        (["-s", "training.max_steps=0"], "none.jsonl"),
        (["-s", "loss=kl", "-s", "tune=new", "-a", "linear"], "a second model, which a plan does not count"),
    ]:
        wrong = CliRunner().invoke(cli.app, [*words, *more])
        assert (wrong.exit_code, message in wrong.output) == (2, True), wrong.output
    words.remove("--plan")
    wrong = CliRunner().invoke(cli.app, [*words, "--gpu", "a100"])
    assert "--gpu, --processes and --sharding go with --plan" in wrong.output


def test_several_processes_hold_shares_or_buckets(llama, text, tmp_path):
    config = settings(llama, text, tmp_path / "out", attention="local")
    one, ddp, fsdp = (
        make_plan(config, Machines(processes=number, sharding=how))
        for number, how in [(1, "ddp"), (4, "ddp"), (4, "fsdp")]
    )
    assert (one.beside, ddp.beside) == (0, ddp.gradients)
    assert ddp.held[False].peak == one.held[False].peak + one.gradients
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(ddp, part) == getattr(one, part) == pytest.approx(4 * getattr(fsdp, part), abs=4)
    layer = 4 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16)
    rest = 4 * (2 * 20 * 16 + 16)
    assert fsdp.beside == 2 * layer + rest + layer
    assert (one.flops, one.launches) == (fsdp.flops, fsdp.launches)


def test_time_is_that_of_the_rates(llama, text, tmp_path):
    config = settings(llama, text, tmp_path / "out", attention="linear", training={"gradient_accumulation_steps": 2})
    found = make_plan(config, Machines(gpu="A100"))
    moved = found.gradients + 2 * found.gradients + 2 * found.optimizer
    starts = found.launches * 5e-6  # of so small a model it takes longer than its arithmetic
    assert found.seconds == pytest.approx(starts + moved / DEVICES["a100"].bandwidth)
    large = dataclasses.replace(
        found, held={how: dataclasses.replace(one, peak=75e9) for how, one in found.held.items()}
    )
    assert "hardly fits: 94% of 80 GB" in told(large)
    large = dataclasses.replace(
        found, held={how: dataclasses.replace(one, peak=85e9) for how, one in found.held.items()}
    )
    assert "does not fit: 106% of 80 GB" in told(large)


class LooksAtValues(torch.optim.Adam):
    def step(self, closure=None):
        assert float(self.param_groups[0]["params"][0].sum()) == 0
        return super().step(closure)


def test_optimizers_that_look_at_values_step_on_pieces(monkeypatch):
    monkeypatch.setattr(blank_step, "PIECE", 64)
    sizes = [(33, 16), (33, 16), (7,), ()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        weights = [torch.empty(size) for size in sizes]
    kept = sum(4 * (2 * math.prod(size) + 1) for size in sizes)
    assert optimizer_bytes(weights, mode, torch.optim.Adam, {}) == kept
    assert optimizer_bytes(weights, mode, LooksAtValues, {}) == pytest.approx(kept, abs=4 * 2 * 8)  # a count of steps


def test_what_the_settings_do_not_ask_for_may_be_uncounted(llama, text, tmp_path, monkeypatch):
    def refuse(self, **kwargs):
        raise ValueError("no checkpointing in this model")

    monkeypatch.setattr(LlamaForCausalLM, "gradient_checkpointing_enable", refuse)
    found = make_plan(settings(llama, text, tmp_path / "out"), Machines())
    assert set(found.held) == set(found.flops) == {False}
    assert "not counted with gradient checkpointing  " in told(found)
    assert "no checkpointing in this model" in told(found)
    with pytest.raises(ValueError, match=r"cannot be counted without values.*no checkpointing in this model"):
        make_plan(settings(llama, text, tmp_path / "out", training={"gradient_checkpointing": True}), Machines())
