"""What an earlier run has left in its output folder, and whether this one may go on with it.

A run notes its settings before it trains (settings.json) and beside its results (metrics.json), so that one that goes
on is known to be the same run: a checkpoint brings weights, optimizer and schedule along, and would pass over what has
changed in the settings without a word.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from attn_plugins.config.versions import versions
from attn_plugins.training.evaluate import write_json

METRICS, SETTINGS = "metrics.json", "settings.json"

MAY_CHANGE = re.compile(
    r"output_dir|evaluate_before|recall|evaluation(\..*)?"
    r"|training\.(max_steps|num_train_epochs|disable_tqdm|report_to|run_name|push_to_hub)"
    r"|training\.(eval|logging|save|dataloader|hub|gradient_checkpointing|activation_checkpointing)_?.*"
)
"""Settings, by path, that a run may go on with changed: how long it trains, and what is measured, kept and shown."""

SHARED = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Settings that share the rows of a step out: they may change with the number of processes, and the rows may not."""

ROWS = "rows_per_step"


def settings_of(config: Any) -> dict[str, Any]:
    """The settings, a dataclass with an ``output_dir``, as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def note_settings(config: Any, rows: int) -> None:
    """Write settings.json.

    Args:
        rows: that a step is made from, in all processes together.
    """
    noted = {"settings": settings_of(config), ROWS: rows, "versions": versions()}
    write_json(Path(config.output_dir) / SETTINGS, noted)


def check_resume(config: Any, *, resume: bool) -> str | None:
    """The checkpoint that a run goes on from, or None where it starts from the start.

    Raises:
        ValueError: ``output_dir`` holds an earlier run and ``resume`` was not asked for, or it is a run of other
            settings, or one that ended and has left no checkpoint.
    """
    out = Path(config.output_dir)
    checkpoint = last_whole_checkpoint(out)
    if not resume:
        if (out / METRICS).exists() or any(out.glob("checkpoint-*")):
            raise ValueError(f"{out} holds an earlier run; go on with it with --resume, or name another output_dir")
        return None
    ended = (out / METRICS).exists()
    held = read(out / SETTINGS)
    noted, free = held.get("settings"), SHARED if ROWS in held else ()
    if (checkpoint or ended) and noted is not None:
        changed = [path for path in differences(noted, settings_of(config)) if not MAY_CHANGE.fullmatch(path)]
        changed = [path for path in changed if path not in free]
        if changed:
            raise ValueError(
                f"{out} holds a run with other settings: {', '.join(changed)}; a run goes on with the settings that it "
                "was begun with. Name another output_dir"
            )
    if ended and checkpoint is None:
        raise ValueError(f"{out} holds a run that ended and left no checkpoint to go on from; name another output_dir")
    return checkpoint


def check_rows(config: Any, rows: int) -> None:
    """Raise a ValueError where the run in ``output_dir`` was begun with another number of rows a step than ``rows``.

    Data would be passed over by steps, so that some rows came twice and others never, and the learning rate was meant
    for the other.
    """
    noted = read(Path(config.output_dir) / SETTINGS).get(ROWS)
    if noted is not None and noted != rows:
        raise ValueError(
            f"{config.output_dir} holds a run with {noted} rows a step, and this one would have {rows}: batch x "
            f"gradient_accumulation_steps x processes. Change these so that they give {noted}, or name another "
            "output_dir"
        )


def finished(config: Any) -> dict[str, Any] | None:
    """What metrics.json holds, where it is of a run with these very settings that ended; else None."""
    metrics = read(Path(config.output_dir) / METRICS)
    if metrics.get("settings") is None:
        return None
    changed = set(differences(metrics["settings"], settings_of(config))) - {"output_dir"}
    return None if changed else metrics


def same_versions(output_dir: str | Path) -> bool:
    """Whether the run in a folder was begun with the versions that are at work now."""
    return read(Path(output_dir) / SETTINGS).get("versions") == versions()


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    Trainer writes trainer_state.json last, so a checkpoint in which it is missing or broken was cut off.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and steps_of(folder) is not None:
            found.append((int(match[1]), str(folder)))
    return max(found)[1] if found else None


def steps_of(checkpoint: str | Path) -> int | None:
    """The steps that a checkpoint has behind it, or None where it was cut off."""
    return read(Path(checkpoint) / "trainer_state.json").get("global_step")


def read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing or broken."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths of what differs between two trees of mappings, such as ``training.learning_rate``."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys([*one, *other])
        return [d for n in names for d in differences(one.get(n), other.get(n), f"{path}.{n}".lstrip("."))]
    return [] if one == other else [path]
