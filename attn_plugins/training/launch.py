"""Several processes for `accelerate launch`, also where it starts one alone.

Asked for several processes on a CPU, accelerate (1.15) starts one, and leaves the others to an mpirun that most
machines lack. It says nothing, so a run would go on with a fraction of its batch. Here all of them are started.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from attn_plugins.config.extras import need
from attn_plugins.config.yaml import read_yaml

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of a process that torchrun or an mpirun has started with others."""


def spread(arguments: list[str]) -> int | None:
    """Start all processes that `accelerate launch` was asked for, if it started only this one, and wait for them.

    Args:
        arguments: of the command line, after the program's name.

    Returns:
        exit status of the processes, or None where this process is to do the work itself.

    Raises:
        ValueError: several were asked for on an accelerator, or sharded ones, or it cannot be told how many.
    """
    # accelerate sets an address to meet at only where several processes were asked for
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if not alone or any(name in os.environ for name in SIZES):
        return None
    number, kind = _asked_for(need("psutil", "train").Process(os.getppid()).cmdline())
    if number < 2:
        return None
    if kind in ("FSDP", "DEEPSPEED"):
        raise ValueError(f"accelerate leaves {kind} out where it is given --cpu; leave --cpu out")
    if torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        raise ValueError(
            f"{number} processes were asked for and accelerate started one; allowed: as many as there are accelerators "
            f"({torch.accelerator.device_count()}), or --cpu"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "attn_plugins", *arguments]
    processes = []
    for rank in range(number):
        place = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen(command, env=environment))
    return _wait(processes)


def _wait(processes: list[subprocess.Popen]) -> int:
    """Exit status of all: 0, or that of the first that failed; the others would wait for it forever, and are ended.

    Ctrl-C and SIGTERM are passed on: what they do is the processes' own affair.
    """

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {one: signal.signal(one, pass_on) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            states = [process.poll() for process in processes]
            failed = [state for state in states if state]
            if failed or None not in states:
                return failed[0] if failed else 0
            time.sleep(0.1)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for one, handler in before.items():
            signal.signal(one, handler)


def _asked_for(parent: list[str]) -> tuple[int, str]:
    """How many processes `accelerate launch` was asked for, and of which kind: by its command line or config file."""
    launchers = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
    starts = [number for number, word in enumerate(parent) if Path(word).name in launchers]
    if not starts:
        raise ValueError(
            "accelerate was asked for several processes and started one, and its command line is not to be seen; "
            "start them with torchrun --nproc_per_node N -m attn_plugins ..."
        )
    parser = need("accelerate.commands.launch", "train").launch_command_parser()
    asked = parser.parse_args(parent[starts[0] + 1 :])
    held = read_yaml(asked.config_file) if asked.config_file else {}
    number = held.get("num_processes", 1) if asked.num_processes is None else asked.num_processes
    return int(number), str(held.get("distributed_type", ""))
