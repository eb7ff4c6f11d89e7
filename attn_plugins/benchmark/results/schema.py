"""What a record of results.jsonl holds, field by field: docs/results.md shows these tables, as a test makes sure."""

from dataclasses import dataclass

SCHEMA = 1
"""Version of the records that are written. It is raised when a field changes its meaning, not when one is added."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a record."""

    kind: type
    meaning: str
    relied_on: bool = False
    """A line in which it is of another kind is no record; of others, the check tells."""


FIELDS = {
    "schema": Field(
        kind=int, relied_on=True, meaning="version of the record; missing in those from before it was kept"
    ),
    "key": Field(kind=str, relied_on=True, meaning="hash of all settings that the result depends on: the cell"),
    "model": Field(kind=str, meaning="label of the model, for people, as the other labels are; no key depends on them"),
    "attention": Field(kind=str, meaning="label of the attention"),
    "measure": Field(kind=str, meaning="what is measured: a key of the second table, bench or decode"),
    "seed": Field(kind=int, meaning="of new weights, data order and dropout"),
    "part": Field(kind=str, meaning="name of the comparison in a suite"),
    "label": Field(kind=str, meaning="of `bench`: label of the attention"),
    "family": Field(kind=str, meaning="of `bench`: family of the attention"),
    "status": Field(kind=str, relied_on=True, meaning="ok, error, or left out: what a contender cannot do"),
    "result": Field(kind=dict, relied_on=True, meaning="where it is ok: the figures, see the second table"),
    "error": Field(kind=str, relied_on=True, meaning="where it failed or was left out: why, in one line"),
    "traceback": Field(kind=str, meaning="where it failed: where in the code"),
    "seconds": Field(kind=float, meaning="the cell took, with loading"),
    "finished": Field(
        kind=str, meaning="when the cell ended, UTC, ISO 8601; of several records of a cell the last counts"
    ),
    "settings": Field(
        kind=dict,
        relied_on=True,
        meaning="all that the result depends on; of rules, data and costs every default is spelled out",
    ),
    "versions": Field(
        kind=dict,
        relied_on=True,
        meaning="attn_plugins, commit (in a checkout), plug-ins, python, torch, transformers, device, threads; a "
        "record is stale where one of them is another now",
    ),
    "hardware": Field(
        kind=dict,
        relied_on=True,
        meaning="cpu, cores, memory_bytes; with an accelerator also accelerator, accelerators (how many) and "
        "accelerator_bytes (memory of one)",
    ),
    "hashes": Field(
        kind=dict,
        relied_on=True,
        meaning="model, train and held_out, those that can be told: what stood behind the names in settings",
    ),
    "check": Field(kind=str, meaning="hash of the line's other fields; a line that was changed since is refused"),
}
"""Every field, in the order of a line."""

LABELS = ("part", "model", "attention", "measure", "label")
"""Fields that say for people which cell it is, beside the seed."""
PLACE = ("what", "scope", "length", "which", "context")
"""Settings that tell cells of the same labels apart."""

_QUALITY = {
    "metric": "name of the figure that stands for the others",
    "better": "lower or higher",
    "value": "the figure",
    "figures": "all figures of the first task",
    "others": "task -> its figures, of the other tasks",
    "attention": "modules: what serves how many of them; new_params: weights that the attention brings; map: where "
    "they are not all alike, role -> module -> what serves it or each key/value head",
}
_TRAINED = {"train": "loss, steps, rows, seconds and more of the training", "folder": "where the trained model lies"}

RESULTS: dict[str, dict[str, str]] = {
    "evaluate": {
        **_QUALITY,
        "rules": "where heads were chosen: the rules that came of it",
        "scores": "beside them what they were chosen by: role, layer, kv_head, score and kept of each",
    },
    "transfer": {**_QUALITY, **_TRAINED, "errors": "of each layer, before and after"},
    "finetune": {**_QUALITY, **_TRAINED, "parameters": "total, trained, and of the attention"},
    "speed": {"passes": "pass -> times_as_fast as the baseline, lowest and highest of the rounds, seconds of a pass"},
    "memory": {"passes": "pass -> bytes that it allocates at its peak"},
    "cost": {
        "bytes": "cache: of a row after so many tokens",
        "seconds": "decode, step: of a token, of a step; median",
        "baseline_seconds": "decode, step: the baseline's, in the same rounds",
        "times_as_fast": "decode, step: as the baseline in the same round; median, with lowest and highest",
        "lowest": "decode, step: of the rounds",
        "highest": "decode, step: of the rounds",
        "joules": "decode, step: of a token, of a step, where the device tells",
        "baseline_joules": "decode, step: the baseline's",
        "peak_bytes": "step: that it allocates at its peak, with gradients, without weights and states",
        "launches": "paper: of the attention layers of a step, in their batched form",
        "least_seconds": "paper: that these layers take on the GPU by its published rates",
        "gpu": "paper: which",
    },
}
"""Measure of ``compare`` -> field of ``result`` -> its meaning."""

SHAPE = {name: field.kind for name, field in FIELDS.items() if field.relied_on}
"""Fields of a record that others rely on, with their types; key and status are in every record."""

KINDS = {str: "text", int: "whole number", float: "number", dict: "mapping"}


def schema_tables() -> str:
    """Both tables in Markdown."""
    lines = ["| field | holds | what it says |", "|---|---|---|"]
    lines += [f"| `{name}` | {KINDS[field.kind]} | {field.meaning} |" for name, field in FIELDS.items()]
    lines += ["", "| measure | field of `result` | what it says |", "|---|---|---|"]
    for measure, fields in RESULTS.items():
        lines += [f"| {measure} | `{name}` | {meaning} |" for name, meaning in fields.items()]
    return "\n".join(lines)
