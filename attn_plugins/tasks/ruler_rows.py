"""What the tasks like RULER's share: their options, and what makes their rows of text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from attn_plugins.data.recall import WORDS, RecallRow, Stretches
from attn_plugins.data.ruler import Source, ruler_rows, words_of
from attn_plugins.tasks import TaskConfig
from attn_plugins.tasks.recall_task import RecallTask


@dataclass(frozen=True, kw_only=True)
class RulerConfig(TaskConfig):
    distances: list[int] = field(default_factory=lambda: [1024, 4096])
    """Tokens of a row, in which what is asked for stands anywhere. No row is cut: one that is too short is an error."""
    rows: int = 8
    """Rows of each length."""
    needles: int = 4
    """Sentences with a number in a row of multikey and multiquery."""
    chains: int = 2
    """Chains in a row of variable-tracking; RULER has one, of which all variables have the value."""
    hops: int = 3
    """Assignments of a chain, but for the first."""
    chat: bool = False
    """Whether rows are what a user says, by the tokenizer's chat template, and the answers the assistant's."""
    by: Literal["forward", "generate"] = "forward"
    """As for the tasks of recall. forward: one pass over the row. generate: token by token through the cache."""
    seed: int = 0
    """Of the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = len(set(self.distances)) == len(self.distances) > 0
        self.require(apart and min(self.distances) >= 1, "distances", "at least one, from 1, each once")
        self.require(self.rows >= 1, "rows", "at least 1")
        self.require(2 <= self.needles <= len(WORDS), "needles", f"2 to {len(WORDS)}")
        self.require(self.chains >= 1, "chains", "at least 1")
        self.require(self.hops >= 1, "hops", "at least 1")


def ruler_maker(task: RecallTask, data: Any, tokenizer: Any) -> Callable[[int], list[RecallRow]]:
    """What makes a task's rows: as many of each of its parts, all of one length."""
    config, found = task.config, task.texts(data["text"], tokenizer)
    source = Source(
        text=Stretches([ids for _, ids in found], tokenizer),
        words=words_of([text for text, _ in found]),
        tokenizer=tokenizer,
        needles=config.needles,
        chains=config.chains,
        hops=config.hops,
    )
    options = {"count": config.rows, "seed": config.seed, "chat": config.chat}
    return lambda length: [row for part in task.parts() for row in ruler_rows(source, part, length=length, **options)]
