"""Work in processes of its own: what crashes, hangs, or loses its device ends itself and nothing else.

Kernels that nobody has run on a device may do any of the three. Each process works on one item at a time, sends its
records as they come, and is replaced when it ends, so that the item that ended it is known.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Record = dict[str, Any]

ENDED, LOST = "ended", "lost"
"""What a process sends after an item, beside records: it goes on with the next, or its device serves it no longer."""


def each_apart(
    items: Iterable[Item],
    work: Callable[[Item], Iterator[Record]],
    *,
    processes: int,
    deadline: float,
    patience: float,
    add: Callable[[Record], None],
    failed: Callable[[Item, str], Record],
) -> list[Item]:
    """Work on items side by side, in their order, until a time is reached.

    Args:
        work: item -> its records; picklable. Without processes it runs here.
        deadline: of :func:`time.monotonic`; what is being worked on then is ended.
        patience: seconds after which an item is given up.
        add: gets each record as it comes.
        failed: (item, why) -> the record of an item whose process ended or was ended.

    Returns:
        the items that were not begun, or ended by the deadline.
    """
    waiting = list(items)
    if processes < 1:
        while waiting and time.monotonic() < deadline:
            for record in work(waiting.pop(0)):
                add(record)
        return waiting
    busy: list[_Process[Item]] = []
    idle: list[_Process[Item]] = []
    unfinished: list[Item] = []
    try:
        while (waiting or busy) and time.monotonic() < deadline:
            while waiting and len(busy) < processes:
                one = idle.pop() if idle else _Process(work)
                one.begin(waiting.pop(0))
                busy.append(one)
            ready = wait([one.connection for one in busy], timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            for one in [*busy]:
                state = one.receive(add) if one.connection in ready else ""
                if not state and time.monotonic() - one.begun > patience:
                    state = f"given up after {patience:.0f} s"
                if not state:
                    continue
                busy.remove(one)
                if state == ENDED:
                    idle.append(one)
                else:
                    one.end()
                    if state != LOST:
                        add(failed(one.item, state))
        unfinished = [one.item for one in busy]
    finally:
        for one in (*busy, *idle):
            one.end()
    return unfinished + waiting


def _serve(connection: Connection, work: Callable[[Any], Iterator[Record]]) -> None:
    while True:
        try:
            item = connection.recv()
        except EOFError:  # who asked is no more
            return
        for record in work(item):
            connection.send(record)
        connection.send(ENDED if _serves() else LOST)


def _serves() -> bool:
    """Whether the device still does what it is asked: after some errors of a kernel it never does again."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


class _Process(Generic[Item]):
    """A process, the item that it works on, and when it began to."""

    item: Item
    begun: float

    def __init__(self, work: Callable[[Item], Iterator[Record]]):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work))
        self.process.start()
        other.close()

    def begin(self, item: Item) -> None:
        self.item, self.begun = item, time.monotonic()
        self.connection.send(item)

    def receive(self, add: Callable[[Record], None]) -> str:
        """Hand on a record; what has become of the process, where it has sent that, or none where it goes on."""
        try:
            sent = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return f"its process ended with exit status {self.process.exitcode}"
        if isinstance(sent, str):
            return sent
        add(sent)
        return ""

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(5)
