"""The command that measures a cell again: settings of a comparison that has this one cell."""

import dataclasses
import json
import shlex
from typing import Any

from attn_plugins.benchmark.contenders import CONTENDER, VERSION
from attn_plugins.data.sources import DataConfig
from attn_plugins.tasks import get_task, list_tasks

STAGES = {"evaluate", "transfer", "finetune"}
COSTS = {"speed", "memory", "cost"}


def command(cell: dict[str, Any]) -> str | None:
    """A command line for a shell; None for a record that is of no cell of ``attn-plugins compare``.

    Results land in ``runs/again``. The cell of that comparison has the key of this one, unless a default of an option
    has changed since.
    """
    settings, measure, name = cell.get("settings"), cell.get("measure"), cell["attention"]
    if (
        not isinstance(settings, dict)
        or measure not in STAGES | COSTS
        or not {"model", "rules", "dtype"} <= {*settings}
    ):
        return None
    rules = settings["rules"]
    attentions: dict[str, Any] = {}
    base = settings.get("baseline", rules)
    if base != rules:
        attentions["baseline" if name != "baseline" else "the baseline"] = _without_data(base)
    baseline = next(iter(attentions), name)
    attentions[name] = _without_data(rules)
    tree: dict[str, Any] = {
        "models": {cell["model"]: settings["model"]},
        "attentions": attentions,
        "baseline": baseline,
        "seeds": [cell["seed"]],
        "dtype": settings["dtype"],
    }
    data = settings.get("data") or _chosen_on(rules) or _chosen_on(base)
    if data is not None:
        tree["data"] = _beside_defaults(data)
    if settings.get("kind", "causal-lm") != "causal-lm":
        tree["evaluation"] = {"task": _task_for(settings["kind"])}
    if measure == "cost":
        tree["untrained"] = False
        names = ("batch_size", "rounds", "tokens", "gpu")
        tree["cost"] = {
            "lengths": [settings["length"]],
            "what": [settings["what"]],
            **{option: settings[option] for option in names if option in settings},
        }
    elif measure in COSTS:
        tree["untrained"] = False
        tree[measure] = {
            "lengths": {settings["scope"]: [settings["length"]]},
            "passes": settings["passes"],
            **{option: settings[option] for option in ("batch_size", "rounds") if option in settings},
        }
    else:
        tree["evaluation"] = settings["evaluation"]
        tree["untrained"] = measure == "evaluate"
        tree |= {stage: settings[stage] for stage in ("transfer", "finetune") if stage in settings}
        if measure == "transfer" or (measure == "finetune" and "transfer" in settings):
            tree["transfer_of"] = [name]
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in tree.items()]
    lines = ["attn-plugins compare --output-dir runs/again", *(f"--set {shlex.quote(word)}" for word in words)]
    return " \\\n  ".join(lines)


def _without_data(rules: Any) -> Any:
    """Rules as a comparison takes them: a choice is made on its data, a contender is of the version that is there."""
    if isinstance(rules, dict) and CONTENDER in rules:
        return {name: value for name, value in rules.items() if name != VERSION}
    if not isinstance(rules, dict) or "choose" not in rules:
        return rules
    return {"choose": {name: value for name, value in rules["choose"].items() if name != "data"}}


def _chosen_on(rules: Any) -> dict[str, Any] | None:
    return rules["choose"].get("data") if isinstance(rules, dict) and "choose" in rules else None


def _task_for(kind: str) -> str:
    """A task that measures such models."""
    return next(name for name in list_tasks() if get_task(name).model == kind)


def _beside_defaults(data: dict[str, Any]) -> dict[str, Any]:
    usual = {one.name: one.default for one in dataclasses.fields(DataConfig)}
    return {name: value for name, value in data.items() if name not in usual or value != usual[name]}
