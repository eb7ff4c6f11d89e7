"""Programs of several processes that train together, forked from one that has imported all of it.

Each process has the environment that `accelerate launch --config_file FILE` or torchrun gives it, and runs the command
line. A real launch would import everything anew in each of them: seconds of work, where a fork takes milliseconds.

    launch = fleet.Launch(name="two", arguments=["finetune", ...], processes=2, file="configs/accelerate/ddp.yaml")
    (ran,) = fleet.train(tmp_path, [launch])
"""

import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ("accelerate.commands.launch", "datasets", "evaluate", "peft", "attn_plugins.training.finetune")


@dataclass(kw_only=True)
class Launch:
    """One command line, in so many processes."""

    name: str
    arguments: list[str]
    processes: int = 1
    file: str | None = None
    """Of configs/accelerate/; None for what torchrun gives, or for one process alone."""
    options: list[str] = field(default_factory=list)
    """Of `accelerate launch`, over the file."""
    killed_at: int | None = None
    """The step after which SIGKILL ends the last process; the others are ended as a launcher would end them."""
    statuses: list[int] = field(default_factory=list)
    """Exit statuses, once it has run."""
    said: str = ""
    """What its processes have printed and logged."""


def train(folder: Path, launches: list[Launch]) -> list[Launch]:
    """The launches, one after the other, when they have ended."""
    import programs

    jobs = Path(folder, "launches.json")
    jobs.write_text(json.dumps([dataclasses.asdict(launch) for launch in launches]))
    done = programs.run(__file__, jobs, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [Launch(**launch) for launch in json.loads(jobs.read_text())]


def _run(launch: Launch, folder: Path) -> None:
    told = _told(launch)
    pids = []
    for rank in range(launch.processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            os._exit(_become(launch, rank, told, folder))
    ended: dict[int, int] = {}
    while len(ended) < len(pids):
        pid, status = os.wait()
        ended[pid] = os.waitstatus_to_exitcode(status)
        if ended[pid] != 0 and len(ended) == 1:
            time.sleep(1)  # for what the others have to say of it
            for other in set(pids) - set(ended):
                os.kill(other, signal.SIGKILL)
    launch.statuses = [ended[pid] for pid in pids]
    launch.said = "".join((folder / f"said.{rank}").read_text() for rank in range(launch.processes))


def _told(launch: Launch) -> dict[str, str]:
    """The environment that the processes share."""
    if launch.processes == 1:
        return {}
    told = {"WORLD_SIZE": str(launch.processes), "LOCAL_WORLD_SIZE": str(launch.processes), "MASTER_ADDR": "127.0.0.1"}
    if launch.file is not None:
        from accelerate.commands import launch as accelerate_launch
        from accelerate.utils import launch as environment

        words = ["--config_file", launch.file, "--num_processes", str(launch.processes), *launch.options]
        parser = accelerate_launch.launch_command_parser()
        asked = parser.parse_args([*words, "--main_process_port", "0", "-m", "attn_plugins"])
        asked, held, _ = accelerate_launch._validate_launch_command(asked)
        if asked.use_deepspeed:
            asked.deepspeed_fields_from_accelerate_config = ",".join(held.deepspeed_config)
            told |= environment.prepare_deepspeed_cmd_env(asked)[1]
        else:
            told |= environment.prepare_multi_gpu_env(asked)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return told | {"MASTER_PORT": str(free.getsockname()[1])}


def _become(launch: Launch, rank: int, told: dict[str, str], folder: Path) -> int:
    """In the fork: the command line, and its exit status."""
    from transformers import TrainerCallback, trainer

    from attn_plugins.cli import app

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == launch.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    said = os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(told)
    if launch.processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if launch.killed_at is not None and rank == launch.processes - 1:
        trainer.DEFAULT_CALLBACKS.append(Kill)
    sys.argv = ["attn-plugins", *launch.arguments]
    try:
        app(launch.arguments, standalone_mode=False)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        status = getattr(error, "exit_code", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    jobs = Path(sys.argv[1])
    launches = [Launch(**launch) for launch in json.loads(jobs.read_text())]
    for launch in launches:
        _run(launch, jobs.parent)
    jobs.write_text(json.dumps([dataclasses.asdict(launch) for launch in launches]))


if __name__ == "__main__":
    _main()
