import contextlib
import copy
import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.config.extras import need
from attn_plugins.core.options import did_you_mean
from attn_plugins.tasks import Task, TaskConfig, register_task

DRAWS = 1000
"""Of the harness's bootstrap, for standard errors of figures that are no means."""


@register_task("harness")
class Harness(Task):
    """Tasks of lm-evaluation-harness (lm_eval), by its own simple_evaluate with its HFLM around the model.

    ``by_part`` has what it finds of each task, by its names, and ``score`` is the mean of the tasks' first figures
    that are the better the higher. Where a task has none, as of perplexity alone, it does not count; where no task
    has, the score is minus the mean of their first figures, and NaN where these have no direction either.
    """

    metric, better, model, columns = "score", "higher", "causal-lm", ()

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 8
        """Requests answered at once, padded to the longest of them."""
        tasks: list[str] = field(default_factory=list)
        """Names of tasks, groups or tags that the harness knows, YAML files of tasks, or folders of these."""
        limit: float | None = None
        """Measure only the first so many rows of each task; below 1, this share of them. Null for all."""
        fewshot: int | None = None
        """Examples before each question; null for as many as the task says."""
        chat: bool = False
        """Whether questions are asked by the tokenizer's chat template."""
        max_length: int | None = None
        """Tokens that the model is given at most; null for its positions. Longer ones are cut at their beginning, by
        the harness."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(bool(self.tasks), "tasks", "at least one")
            self.require(self.limit is None or self.limit > 0, "limit", "above 0, or null")
            self.require(self.fewshot is None or self.fewshot >= 0, "fewshot", "at least 0, or null")
            self.require(self.max_length is None or self.max_length >= 2, "max_length", "at least 2, or null")

    def prepare(self, data, tokenizer, model):
        need("lm_eval", "harness")
        manager, specs = find(self.config.tasks)
        for spec in specs:
            try:
                with as_before():
                    manager.load([spec])
            except Exception as error:  # of its data set, which may be anywhere, as many kinds as there are loaders
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"task {spec!r} of the harness cannot be loaded: {reason}") from error
        if self.config.chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat=True, and the tokenizer has no chat template; allowed: chat=False")
        # One batch for all: several processes do the same, so that a sharded model takes the same steps in each.
        return [{"manager": manager, "specs": specs, "tokenizer": copy.deepcopy(tokenizer)}]

    def score(self, model, batch):
        lm_eval, hflm = need("lm_eval", "harness"), need("lm_eval.models.huggingface", "harness").HFLM
        size = self.config.batch_size
        options = {"max_length": self.config.max_length, "batch_size": size, "backend": "causal"}
        with as_before():
            answering = hflm(pretrained=getattr(model, "module", model), tokenizer=batch["tokenizer"], **options)
            found = lm_eval.simple_evaluate(
                model=answering,
                tasks=batch["specs"],
                task_manager=batch["manager"],
                num_fewshot=self.config.fewshot,
                limit=self.config.limit,
                batch_size=size,
                apply_chat_template=self.config.chat,
                bootstrap_iters=DRAWS,
                log_samples=False,
            )
        if found is None:  # all but one of several processes on a machine
            return {"found": []}
        return {"found": [{name: found[name] for name in ("results", "higher_is_better", "n-samples")}]}

    def finish(self, sums):
        (found,) = sums["found"]
        by_part, higher, lower = {}, [], []
        for task, its in found["results"].items():
            figures = {
                name.removesuffix(",none"): value
                for name, value in its.items()
                if isinstance(value, int | float) and name != "sample_len"
            }
            by_part[task] = figures
            counted = found["n-samples"].get(task)
            if counted is None:  # a group, whose tasks are there themselves
                continue
            directions = found["higher_is_better"][task]
            first = [(name, value) for name, value in figures.items() if name.partition(",")[0] in directions]
            up = [value for name, value in first if directions[name.partition(",")[0]]]
            higher += up[:1]
            lower += [value for _, value in first][:1]
            by_part[task] = {**figures, "rows": counted["effective"]}
        score = statistics.fmean(higher) if higher else -statistics.fmean(lower or [math.nan])
        return {"score": score, "by_part": by_part}


def find(names: list[str]) -> tuple[Any, list[str]]:
    """The harness's manager of tasks, and what it calls these; a file or folder of a name comes before its own tasks.

    Raises:
        ValueError: there is no such task, file or folder, or no task in a folder.
    """
    manager_of = need("lm_eval.tasks", "harness").TaskManager
    specs, folders, others = [], [], []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = manager_of(include_path=str(path), include_defaults=False).all_subtasks
            if not inside:
                raise ValueError(f"the folder {name!r} has no task of the harness; allowed: YAML files of tasks in it")
            folders.append(str(path))
            specs += inside
        elif path.is_file():
            specs.append(str(path))
        else:
            others.append(name)
            specs.append(name)
    manager = manager_of(include_path=folders or None, include_defaults=bool(others))  # its own are thousands of files
    for name in others:
        if name not in manager.task_index:
            raise ValueError(
                f"unknown task {name!r} of the harness{did_you_mean(name, manager.all_tasks)}; allowed: a name that "
                "`lm_eval ls tasks` shows, a YAML file of a task, a folder of these"
            )
    return manager, list(dict.fromkeys(specs))


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Leaves global random generators as they were, which the harness seeds, and standard output to others."""
    numpy = need("numpy", "harness")
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
