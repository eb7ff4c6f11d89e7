"""Which settings of a fine-tune are best: optuna tries values for some of them, of the attention's options too."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.yaml import override
from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.launch import SIZES
from attn_plugins.training.resume import finished
from attn_plugins.training.stop import one_of_several

TRIALS = "trials.log"
"""In the output folder: what optuna has tried, added to as it comes."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is tried, and how often."""

    space: dict[str, Any]
    """Setting, by path -> a list of values, ``{log: [1e-4, 1e-2]}``, or ``{range: [8, 64]}`` (whole numbers where both
    ends are)."""
    trials: int = 8
    """Fine-tunes, with those that an earlier run of the search has done."""
    seed: int = 0
    """Of what is tried."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"search.trials={self.trials}; allowed: at least 1")
        if not self.space:
            raise ValueError(
                "search.space is empty; allowed: settings by path, such as attention.window_size: [64, 128]"
            )
        for path, values in self.space.items():
            if not (isinstance(values, list) and values) and not _is_range(values):
                raise ValueError(
                    f"search.space.{path}={values!r}; allowed: a list of values, {{log: [least, most]}} with least "
                    "above 0, or {range: [least, most]}"
                )


def search(tree: dict[str, Any], config: SearchConfig) -> list[dict[str, Any]]:
    """Fine-tune with settings that optuna chooses, each in a folder of its own in ``output_dir``.

    What was tried stands in ``trials.log`` there: a search that was stopped or killed goes on, in the fine-tune that it
    was in from its last checkpoint, and tries what it would have tried.

    Args:
        tree: settings of a fine-tune, in which those of the space need not stand.

    Returns:
        the trials that ended, the best first: "settings" by path, the figure "value", its "folder".

    Raises:
        ValueError: settings are wrong, all trials are, or several processes share the work.
        Stopped: Ctrl-C or SIGTERM has ended a trial; the checkpoint that it has left is whole.
    """
    optuna = need("optuna", "search")
    if any(int(os.environ.get(name, "1")) > 1 for name in SIZES):
        raise ValueError("a search runs in one process; allowed: finetune over several, with what it found")
    first = build(FinetuneConfig, _with(tree, {path: _first(values) for path, values in config.space.items()}))
    task = first.measured(first.trained())[0]
    out = check_folder(first.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / TRIALS)))
    study = optuna.create_study(
        storage=storage,
        study_name="finetune",
        direction="minimize" if task.better == "lower" else "maximize",
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # killed in it
        study.tell(trial.number, state=states.FAIL)
    known = study.get_trials(states=(states.COMPLETE, states.PRUNED, states.WAITING))
    again = [trial.system_attrs.get("fixed_params", trial.params) for trial in known]
    for trial in study.get_trials(states=(states.FAIL,)):
        if trial.params not in again:
            study.enqueue_trial(trial.params)
            again.append(trial.params)
    begun = len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))

    def run(trial: Any) -> float:
        chosen = {path: _suggest(trial, path, values) for path, values in config.space.items()}
        one = build(FinetuneConfig, {**_with(tree, chosen), "output_dir": str(out / _folder(chosen))})
        trial.set_user_attr("settings", chosen)
        try:
            with one_of_several(one.output_dir):
                metrics = finished(one) or prepare_finetune(one, resume=True).run(None)
        except KeyboardInterrupt:
            optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # it would tell of a failure, with a traceback
            raise
        except ValueError as error:
            raise optuna.TrialPruned(str(error)) from error
        return metrics["evaluation"]["after"][task.metric]

    verbosity = optuna.logging.get_verbosity()
    try:
        for number in range(begun, config.trials):
            study.sampler = optuna.samplers.TPESampler(seed=config.seed + number)  # as if it had never been stopped
            study.optimize(run, n_trials=1)
    finally:
        optuna.logging.set_verbosity(verbosity)
    ended = study.get_trials(states=(states.COMPLETE,))
    if not ended:
        raise ValueError("none of the settings that were tried fits the model")
    best = sorted(ended, key=lambda trial: trial.value, reverse=task.better == "higher")
    told = [{"settings": trial.user_attrs["settings"], "value": trial.value} for trial in best]
    return [{**one, "figure": task.metric, "folder": str(out / _folder(one["settings"]))} for one in told]


def _suggest(trial: Any, path: str, values: Any) -> Any:
    if isinstance(values, list):
        return json.loads(trial.suggest_categorical(path, [json.dumps(value) for value in values]))
    (kind, (least, most)) = next(iter(values.items()))
    if isinstance(least, int) and isinstance(most, int):
        return trial.suggest_int(path, least, most, log=kind == "log")
    return trial.suggest_float(path, least, most, log=kind == "log")


def _is_range(values: Any) -> bool:
    if not isinstance(values, dict) or list(values) not in (["log"], ["range"]):
        return False
    (kind, ends) = next(iter(values.items()))
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    return numbers and ends[0] < ends[1] and (kind == "range" or ends[0] > 0)


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) else next(iter(values.values()))[0]


def _with(tree: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    return override(tree, [f"{path}={json.dumps(value)}" for path, value in chosen.items()])


def _folder(chosen: dict[str, Any]) -> Path:
    return Path("trial-" + hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:10])
