"""Processes that `accelerate launch` or torchrun has started together share cells out: each runs its own alone."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from attn_plugins.training.launch import SIZES
from attn_plugins.training.processes import asked_for, several

PLACE = (*SIZES, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables by which Trainer and accelerate know of other processes, with which they would train together."""
OURS = "attn_plugins"
"""Begins the names of what is kept in the store that all processes see."""
POLL = 0.5
"""Seconds between looks at whether the others have ended."""


class Shares:
    """This process among those that share out the cells: each cell is taken once, by the first that comes to it."""

    def __init__(self, store: Any, rank: int, number: int):
        self.rank = rank
        self.number = number
        self._store = store

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks, reports and runs what has to run alone."""
        return self.rank == 0

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """What every process needs before it runs a cell: the first does it alone, then the others.

        Raises:
            ValueError: in the others, where the first could not start.
        """
        if self.first:
            try:
                yield
            except BaseException:
                self._store.set(f"{OURS}/open", "no")
                self._wait_for_ends(self.number - 1)  # it may be the one that holds the store
                raise
            self._store.set(f"{OURS}/open", "yes")
            return
        self._store.wait([f"{OURS}/open"])
        if self._store.get(f"{OURS}/open") == b"no":
            self._store.add(f"{OURS}/ended", 1)
            raise ValueError("the first process could not start")
        yield

    def take(self, key: str) -> bool:
        """Whether this process is to run a cell."""
        return self._store.add(f"{OURS}/cell/{key}", 1) == 1

    def remains(self) -> bool:
        """Say that this process has come to the last cell. True in the first process alone, once all others have."""
        self._store.add(f"{OURS}/ended", 1)
        if self.first:
            self._wait_for_ends(self.number)
        return self.first

    def _wait_for_ends(self, number: int) -> None:
        while self._store.add(f"{OURS}/ended", 0) < number:
            time.sleep(POLL)


def shares() -> Shares | None:
    """Where this process was started with others: its place among them, of which nothing else knows afterwards.

    To be called before anything looks at an accelerator: on CUDA each process of a machine sees one device afterwards.

    Returns:
        None where it is alone.

    Raises:
        ValueError: they were asked to hold a model together, are more than the devices, or have no place to meet.
    """
    if not several():
        return None
    for kind in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"):
        if asked_for(kind):
            raise ValueError(f"each process runs cells of its own, with a whole model; allowed: several without {kind}")
    try:
        store, rank, number = next(torch.distributed.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes cannot meet: {error}; start them by accelerate launch or torchrun") from None
    local = int(os.environ.get("LOCAL_RANK", rank))
    there = torch.cuda.device_count()  # by NVML, which initialises nothing
    if there:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = visible or [str(number) for number in range(there)]
        if local >= len(names):
            raise ValueError(
                f"process {local + 1} of this machine has no device; allowed: up to {len(names)} processes"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local]
    for name in PLACE:
        os.environ.pop(name, None)
    return Shares(store, rank, number)
