"""A recipe: stages in a row, each of which starts from what the one before has left.

Every stage has a folder of its own and is the run that its verb would be, so that a recipe that was stopped goes on
where it was, within a stage too.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from attn_plugins.choice.run import ChooseConfig, choose
from attn_plugins.config.output import check_folder
from attn_plugins.core.options import build, did_you_mean
from attn_plugins.data.sources import DataConfig
from attn_plugins.tasks import figure, get_task
from attn_plugins.training.card import SHORT
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation, write_json
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import AS_SAVED, Dtype, read_attention, skeleton
from attn_plugins.training.processes import is_main_process, start_processes
from attn_plugins.training.resume import differences, finished, read
from attn_plugins.training.stop import one_of_several
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.run import prepare_transfer

RECIPE, RULES = "recipe.json", "rules.yaml"

SET_ELSEWHERE = ("model", "attention", "output_dir", "dtype", "seed")
"""Settings of a stage that the recipe sets for all of them."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Stages in a row, from a pretrained model to one that was swapped and trained."""

    model: str
    """What the first stage starts from: a folder, a name on the hub, or smollm2-135m-demo."""
    attention: Any = AS_SAVED
    """A name, a rule, a list of rules, or a YAML file of these; what is not chosen, where a stage chooses."""
    data: DataConfig
    """Text, for all stages that name no other."""
    output_dir: str
    """Where each stage has a folder, such as 1-transfer, and the report goes."""
    stages: list[dict[str, Any]]
    """Each ``{name: settings}``: transfer, choose, distill (a fine-tune with loss kl, of new weights alone, unless it
    says otherwise) or finetune, with the settings of that verb but for those that the recipe sets."""
    evaluation: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    """Task and options, or a list of these: measured of the model itself, of the swapped one, and after each stage."""
    dtype: Dtype = "float32"
    """What weights are loaded in."""
    seed: int = 0
    """Of new weights, of the order of the data, and of dropout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", read_attention(self.attention))
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))
        if not self.stages:
            raise ValueError("stages is empty; at least one is needed")
        taught = False
        for number, stage in enumerate(self.stages):
            if len(stage) != 1 or next(iter(stage)) not in STAGES:
                near = did_you_mean(next(iter(stage), ""), list(STAGES))
                raise ValueError(
                    f"stages.{number} is {stage!r}{near}; allowed: one of {', '.join(STAGES)}, and settings"
                )
            (name,) = stage
            parsed = stage_config(self, number, model=self.model, attention=self.attention)
            if name == "choose" and taught and parsed.level == "heads":
                raise ValueError(
                    f"stages.{number}.choose is of heads, and comes after a stage that has trained new weights, which "
                    "are not taken apart by heads; choose before that, or level: layers"
                )
            taught |= name != "choose"
        _evaluation(self, self.model, AS_SAVED, None)  # raises where it is wrong


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of stage."""

    config: Any
    """Dataclass of its settings."""
    run: Callable[[Any], dict[str, Any]]
    """Settings -> figures."""
    preset: dict[str, Any] = field(default_factory=dict)
    """Settings that are not the dataclass's defaults."""


def stage_config(config: RecipeConfig, number: int, *, model: str, attention: Any) -> Any:
    """Settings of a stage that starts from ``model`` with ``attention``.

    Raises:
        ValueError: they are wrong, as far as that shows without a model.
    """
    ((name, given),) = config.stages[number].items()
    kind, where = STAGES[name], f"stages.{number}.{name}"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; allowed: a mapping of settings")
    taken = sorted(set(given) & set(SET_ELSEWHERE))
    if taken:
        raise ValueError(f"{where}.{taken[0]} is set for the whole recipe; take it out of the stage")
    known = {one.name for one in dataclasses.fields(kind.config)}
    shared = {
        **{"data": dataclasses.asdict(config.data), "evaluation": config.evaluation},
        **{"dtype": config.dtype, "seed": config.seed},
    }
    tree = {name: value for name, value in shared.items() if name in known} | kind.preset | given
    own = {"model": model, "attention": attention, "output_dir": str(folder_of(config, number))}
    return build(kind.config, tree | own, where)


def folder_of(config: RecipeConfig, number: int) -> Path:
    """Where a stage leaves what it has made."""
    return Path(config.output_dir) / f"{number + 1}-{next(iter(config.stages[number]))}"


def prepare_recipe(config: RecipeConfig) -> None:
    """See that a recipe can start, or go on.

    Raises:
        ValueError: the model is not there or the attention does not fit it, or ``output_dir`` cannot be written or
            holds a recipe with other settings.
    """
    out = check_folder(config.output_dir)
    noted = read(out / RECIPE).get("settings")
    if noted is not None:
        now = _settings(config)
        before, stages = noted.pop("stages"), now.pop("stages")
        changed = differences(noted, now)
        changed += [f"stages.{n}" for n, one in enumerate(before) if n >= len(stages) or stages[n] != one]
        if changed:
            raise ValueError(
                f"{out} holds a recipe with other settings: {', '.join(changed)}; stages can be added at its end. Name "
                "another output_dir"
            )
    skeleton(config.model, config.attention)
    start_processes()


def run_recipe(config: RecipeConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run the stages that have not ended, one after the other.

    Args:
        say: gets a line of progress at a time.

    Returns:
        what is in the report: for the model itself, the swapped one and each stage, ``name``, ``folder`` and figures.
    """
    out = Path(config.output_dir)
    if is_main_process():
        write_json(out / RECIPE, {"settings": _settings(config)})
    model, attention = config.model, config.attention
    say(f"[0/{len(config.stages)}] before")
    rows = [{"name": "the model itself", **_measured(config, model, None, out / "own.json")}]
    swapped = False
    for number, stage in enumerate(config.stages):
        name, folder = next(iter(stage)), folder_of(config, number)
        if name != "choose" and not swapped:
            rows.append({"name": "swapped, untrained", **_measured(config, model, attention, out / "untrained.json")})
            swapped = True
        say(f"[{number + 1}/{len(config.stages)}] {name}: {folder}")
        with one_of_several(str(folder)):
            figures = STAGES[name].run(stage_config(config, number, model=model, attention=attention))
        if name == "choose":
            attention = str(folder / RULES)
        else:
            model, attention = str(folder), AS_SAVED
            if "evaluation" not in figures:
                figures |= _measured(config, model, AS_SAVED, folder / "evaluation.json")
        rows.append({"name": f"{number + 1}. {name}", **figures, "folder": str(folder)})
        if is_main_process():
            write_json(out / "report.json", rows)
            (out / "report.md").write_text(_markdown(config, rows), encoding="utf-8")
    return rows


def _settings(config: RecipeConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _evaluation(config: RecipeConfig, model: str, attention: Any, output: Path | None) -> EvaluateConfig:
    tree = {
        **{"model": model, "attention": attention, "data": dataclasses.asdict(config.data), "seed": config.seed},
        **{"evaluation": config.evaluation, "dtype": config.dtype, "output": None if output is None else str(output)},
    }
    return build(EvaluateConfig, tree)


def _measured(config: RecipeConfig, model: str, attention: Any, file: Path) -> dict[str, Any]:
    """What a fine-tune says of its evaluation, of a model that none has measured; kept in a file."""
    found = read(file) or prepare_evaluation(_evaluation(config, model, attention, file)).run()
    others = {name: {"before": None, "after": figures} for name, figures in found["others"].items()}
    evaluation = {"task": found["task"], "before": None, "after": found["result"], "others": others}
    return {"evaluation": evaluation, "folder": model}


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The report as a table, the header first: what each stage did, and what the model was after it."""
    first = rows[0]["evaluation"]
    tasks = [first["task"], *first["others"]]
    lines = [["stage", "trained", "steps", "seconds", *(f"{name}: {get_task(name).metric}" for name in tasks), "error"]]
    for row in rows:
        train, evaluation = row.get("train", {}), row.get("evaluation")
        figures = ["" for _ in tasks]
        if evaluation is not None:
            after = {evaluation["task"]: evaluation, **evaluation["others"]}
            figures = [figure(after[name]["after"][get_task(name).metric]) if name in after else "" for name in tasks]
        errors = row.get("errors")
        lines.append(
            [
                row["name"],
                SHORT[row["tune"]] if "tune" in row else "",
                *(figure(train[name]) if name in train else "" for name in ("steps", "seconds")),
                *figures,
                "" if errors is None else f"{errors['before']:.3f} to {errors['after']:.3f}",
            ]
        )
    return lines


def _markdown(config: RecipeConfig, rows: list[dict[str, Any]]) -> str:
    header, *lines = (f"| {' | '.join(cells)} |" for cells in table(rows))
    spelled = yaml.safe_dump(_settings(config), sort_keys=False).rstrip()
    head = ["# Recipe", "", header, "|---" * len(table(rows)[0]) + "|", *lines, ""]
    return "\n".join([*head, f"The model: {rows[-1]['folder']}", "", "```yaml", spelled, "```", ""])


def _finetune(config: FinetuneConfig) -> dict[str, Any]:
    metrics = finished(config) or prepare_finetune(config, resume=True).run(progress="evaluation")
    return {name: metrics[name] for name in ("stage", "tune", "loss", "train", "evaluation")}


def _transfer(config: TransferConfig) -> dict[str, Any]:
    metrics = finished(config) or prepare_transfer(config, resume=True).run()[1]
    return {name: metrics[name] for name in ("stage", "tune", "loss", "train", "errors")}


def _choose(config: ChooseConfig) -> dict[str, Any]:
    """Choose, in one process; the others wait for its file."""
    if is_main_process() and not (Path(config.output_dir) / RULES).exists():
        choose(config, lambda line: None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return {"rules": read_attention(str(Path(config.output_dir) / RULES))}


STAGES = {
    "transfer": Kind(config=TransferConfig, run=_transfer),
    "choose": Kind(config=ChooseConfig, run=_choose),
    "distill": Kind(config=FinetuneConfig, run=_finetune, preset={"loss": "kl", "tune": "new"}),
    "finetune": Kind(config=FinetuneConfig, run=_finetune),
}
"""By the name of the stage."""
