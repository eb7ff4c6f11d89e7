"""Ctrl-C and SIGTERM: a run that is told to end leaves a whole checkpoint, in all of its processes at the same step."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from attn_plugins.config.extras import need

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME = 1.0
"""Seconds in which one more Ctrl-C is the same: it comes from the terminal, and once more from what started this."""


class Stopped(KeyboardInterrupt):
    """A signal has ended a run.

    Args:
        number: of the signal.
        output_dir: of the run, or None where none has said yet.
    """

    def __init__(self, number: int, output_dir: str | None = None):
        super().__init__(number, output_dir)
        self.number, self.output_dir = number, output_dir


@contextlib.contextmanager
def one_of_several(output_dir: str) -> Iterator[None]:
    """Around one of several runs: what ends it says which one it was."""
    try:
        yield
    except Stopped as stopped:
        stopped.output_dir = output_dir
        raise


def train(trainer: Any, checkpoint: str | None) -> Any:
    """What ``trainer.train`` returns, from a checkpoint on or from the start.

    Raises:
        Stopped: a signal has ended it; the checkpoint that it has left is whole.
    """
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        return trainer.train(resume_from_checkpoint=checkpoint)


class StopOnSignal(TrainerCallback):
    """Around ``trainer.train()``, a context: the step in which a signal comes ends, is saved, and is the last.

    Processes tell each other of a signal while they work on the next step, so that they all end with the same one. At
    the end of an epoch, what is to be evaluated there comes before the checkpoint. A second Ctrl-C ends at once.

    Raises:
        Stopped: in all processes, once the checkpoint is whole.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came to this process; 0 for none."""
        self.agreed = 0
        """Of the signal that all processes know of."""
        self._came = 0.0
        self._telling: tuple[Any, torch.Tensor] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._before = {one: signal.signal(one, self._note) for one in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number == 0:
            self.number, self._came = number, now
        elif number == signal.SIGINT and now - self._came > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self._agree(args)
        if self.agreed and not _ends_epoch(state):
            control.should_log = control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_log = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            need("accelerate", "train").PartialState().wait_for_everyone()  # one writes more than the others
            raise Stopped(self.agreed, args.output_dir)

    def _agree(self, args: Any) -> int:
        """The highest number that any process has; of several, as it was a step ago: nobody waits for the others."""
        if args.world_size == 1 or self.agreed:
            return self.agreed or self.number
        before, self._telling = self._telling, None
        if before is not None:
            before[0].wait()
        told = torch.tensor(self.number, device=args.device)
        work = torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, async_op=True)
        self._telling = work, told
        return 0 if before is None else int(before[1])


def _ends_epoch(state: Any) -> bool:
    """Whether the end of an epoch follows, as it does after the last step of a run too."""
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps
