"""What a model is before it is trained, measured when a sharded one can be."""

import time
from typing import Any

from transformers import TrainerCallback

from attn_plugins.training.evaluate import Measurement, run_measurements


class Before(TrainerCallback):
    """Measures a model before its first step, in ``trainer.train()`` where that shards it (FSDP, DeepSpeed).

    Until then it is whole in each process, on the CPU, or in the first one alone. One that goes on from a checkpoint
    has steps behind it once it is sharded, and is not measured.

    Args:
        trainer: the callback is added to it where it is needed.
        evaluated: what is measured.
        recalling: that too, with figures of its own.
    """

    def __init__(
        self, trainer: Any, evaluated: list[Measurement], recalling: list[Measurement], progress: str | None
    ) -> None:
        self.evaluated: dict[str, Any] = {}
        """Name of each task -> what it found."""
        self.recalled: dict[str, Any] = {}
        self.seconds = 0.0
        """That it took within ``trainer.train()``."""
        self._trainer, self._asked, self._progress = trainer, (evaluated, recalling), progress and f"{progress} before"
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.add_callback(self)
        else:
            self._measure(trainer.model)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            started = time.perf_counter()
            self._measure(self._trainer.model_wrapped)
            self.seconds = time.perf_counter() - started

    def _measure(self, model: Any) -> None:
        evaluated, recalling = self._asked
        self.evaluated = run_measurements(evaluated, model, progress=self._progress)
        self.recalled = run_measurements(recalling, model, progress=self._progress)
