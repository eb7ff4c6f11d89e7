"""What a run makes of having been started with others, as far as one process tells."""

import json
import os
import types

import pytest
import torch
from test_finetune import SMALL, evaluated, settings

from attn_plugins.training.arguments import training_arguments
from attn_plugins.training.before import Before
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.launch import spread
from attn_plugins.training.models import load
from attn_plugins.training.processes import ask_for_cpu, check_kept

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _same_environment():
    """Without what others were started with, and as it was afterwards: programs change it, as accelerate does."""
    before = dict(os.environ)
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which they train on")
def test_processes_without_an_accelerator_are_said_to_be_on_the_cpu():
    assert not ask_for_cpu()
    assert "ACCELERATE_USE_CPU" not in os.environ, "one process alone trains where Trainer finds that it can"
    os.environ.update(WORLD_SIZE="2", ACCELERATE_USE_DEEPSPEED="true")
    assert ask_for_cpu()
    assert "ACCELERATE_USE_CPU" not in os.environ, "accelerate would leave DeepSpeed out"
    os.environ.pop("ACCELERATE_USE_DEEPSPEED")
    assert ask_for_cpu()
    assert os.environ.pop("ACCELERATE_USE_CPU") == "true"
    os.environ["ACCELERATE_USE_CPU"] = "false"
    assert ask_for_cpu()
    assert os.environ["ACCELERATE_USE_CPU"] == "false", "what was said stands"


@pytest.fixture
def second_process(tmp_path):
    """This process as the second one under FSDP, whose weights the first one would read."""
    told = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "1"}
    os.environ.update(told)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_new_weights_have_places_of_their_own_where_another_process_brings_them(second_process, llama, bert):
    """In a slot, and in a head: by their places accelerate tells which is which."""
    for folder, kind, flag in (
        (llama, "causal-lm", {"type": "gated_delta"}),
        (llama, "causal-lm", {"type": "linear", "feature_map": "favor", "num_features": 8}),
        (bert, "classification", None),
    ):
        model = load(folder, attention=flag, kind=kind, labels=["a", "b"] if flag is None else None).model
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        weights = list(model.parameters())
        assert len({weight.data_ptr() for weight in weights}) == len(weights)


def test_each_process_measures_a_model_that_it_has_read(llama, text, second_process):
    figures = evaluated(llama, text)["result"]
    os.environ.pop("ACCELERATE_USE_FSDP")
    assert figures["perplexity"] == pytest.approx(evaluated(llama, text)["result"]["perplexity"], rel=1e-6)


def test_a_run_goes_on_with_as_many_rows_a_step(llama, text, tmp_path):
    out = tmp_path / "out"
    begun = {**SMALL, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    prepare_finetune(settings(llama, text, out, training=begun)).run(None)
    assert json.loads((out / "settings.json").read_text())["rows_per_step"] == 2
    shared = {**begun, "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert prepare_finetune(settings(llama, text, out, training=shared), resume=True).checkpoint
    more = {**begun, "max_steps": 3, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match=r"out holds a run with 2 rows a step, and this one would have 4: batch x .*"):
        prepare_finetune(settings(llama, text, out, training=more), resume=True)
    noted = json.loads((out / "settings.json").read_text())
    del noted["rows_per_step"]
    (out / "settings.json").write_text(json.dumps(noted))  # as earlier versions wrote it
    with pytest.raises(ValueError, match=r"other settings: training\.per_device_train_batch_size, training\.g"):
        prepare_finetune(settings(llama, text, out, training=shared), resume=True)


def trainer_of(kind):
    plugin = types.SimpleNamespace(state_dict_type=f"StateDictType.{kind}")
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
    sharded = kind.endswith("STATE_DICT")
    return types.SimpleNamespace(
        accelerator=accelerator,
        args=types.SimpleNamespace(world_size=4 if "4" in kind else 2),
        is_fsdp_enabled=sharded,
        is_deepspeed_enabled="DeepSpeed" in kind,
    )


PARTS = [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)]
KEPT = {
    "each process with all weights": ("DDP", []),
    "FSDP with FULL_STATE_DICT": ("FULL_STATE_DICT", ["pytorch_model_fsdp.bin"]),
    "FSDP with SHARDED_STATE_DICT": ("SHARDED_STATE_DICT", ["pytorch_model_fsdp_0"]),
    "DeepSpeed on 2 processes": ("DeepSpeed 2", ["latest", *PARTS[:2]]),
    "DeepSpeed on 4 processes": ("DeepSpeed 4", ["latest", *PARTS]),
}


@pytest.mark.parametrize("written", list(KEPT))
def test_a_checkpoint_is_gone_on_with_as_it_was_written(tmp_path, written):
    for name in KEPT[written][1]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for asked, (kind, _) in KEPT.items():
        if asked == written:
            check_kept(trainer_of(kind), str(tmp_path))
        else:
            with pytest.raises(ValueError, match=f"was written by {written}, and this run was asked for {asked}; go o"):
                check_kept(trainer_of(kind), str(tmp_path))


def test_shards_are_not_left_out_for_the_cpu(tmp_path, monkeypatch):
    """`accelerate launch --cpu` would train with copies, and not say so."""
    for kind in ("FSDP", "DEEPSPEED"):
        (tmp_path / "file.yaml").write_text(f"distributed_type: {kind}\nnum_processes: 2\n")
        line = ["python", "accelerate", "launch", "--cpu", "--config_file", str(tmp_path / "file.yaml"), "-m", "x"]
        monkeypatch.setattr("psutil.Process.cmdline", lambda self, line=line: line)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("MASTER_PORT", "1")
        with pytest.raises(ValueError, match=f"accelerate leaves {kind} out where it is given --cpu; leave --cpu out"):
            spread(["finetune"])


@pytest.mark.parametrize("step", [0, 3])
def test_a_sharded_model_is_measured_once_it_is_sharded(llama, text, tmp_path, step):
    run = prepare_finetune(settings(llama, text, tmp_path / "out"))
    added = []
    trainer = types.SimpleNamespace(
        model=None,
        model_wrapped=run.trainer.model,
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
        add_callback=added.append,
    )
    before = Before(trainer, run.measurements, [], None)
    assert added == [before]
    assert before.evaluated == {}
    before.on_train_begin(None, types.SimpleNamespace(global_step=step), None)
    assert list(before.evaluated) == ([] if step else ["perplexity"])
    assert (before.seconds > 0) == (step == 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which it is on")
def test_fsdp_is_not_left_out_on_a_cpu(llama, text, tmp_path):
    config = settings(llama, text, tmp_path / "out")
    os.environ.update(ACCELERATE_USE_FSDP="true", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        arguments = training_arguments(config, config.trained())
        assert str(arguments.distributed_state.distributed_type) == "DistributedType.MULTI_GPU"
        assert arguments.device.type == "cpu"
    finally:
        torch.distributed.destroy_process_group()
