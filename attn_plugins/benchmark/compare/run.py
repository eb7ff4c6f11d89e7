"""Models x attentions x measurements: each cell runs once, is written down as it ends, and is not run again."""

import operator
import os
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from attn_plugins.benchmark.compare import cost
from attn_plugins.benchmark.compare.cells import CompareCell, cells
from attn_plugins.benchmark.compare.config import CompareConfig, file_stem, finetune_config
from attn_plugins.benchmark.compare.cost_table import cost_note
from attn_plugins.benchmark.compare.models import CompareModels, chosen
from attn_plugins.benchmark.contenders import LEFT_OUT, LeftOutError, contender_in
from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.timing import Scope
from attn_plugins.benchmark.results.cells import Watch, described, run_cells
from attn_plugins.benchmark.results.hashes import hashes_of
from attn_plugins.benchmark.results.shares import Shares
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.data.sources import load_data
from attn_plugins.tasks import Task
from attn_plugins.training.evaluate import attention_summary, place, prepare_measurements, run_measurements
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import AS_SAVED, Loaded, in_slot, load, skeleton
from attn_plugins.training.resume import finished, same_versions


def prepare_compare(*configs: CompareConfig) -> Results:
    """What an earlier run of the same comparison has left, once it is clear that this one can start.

    Args:
        configs: the comparison, or the parts of a suite, which have one output_dir.

    Raises:
        ValueError: a model is not there, results.jsonl is not one, a package is missing, or several processes run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "compare measures time, so it runs in one process; allowed: the command line over several, each with cells "
            "of its own"
        )
    need("matplotlib", "compare")
    need("plotly", "compare")
    need("jinja2", "compare")
    need("peft", "train")
    results = Results(check_folder(configs[0].output_dir) / "results.jsonl")
    for source in dict.fromkeys(source for config in configs for source in config.models.values()):
        skeleton(source)
    return results


def run_compare(
    config: CompareConfig | Sequence[tuple[str, CompareConfig]],
    results: Results,
    *,
    fresh: bool = False,
    only: Collection[str] | None = None,
    retry: bool = True,
    shares: Shares | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run all cells that have no result of these versions yet, and add theirs to ``results``.

    A cell that fails is recorded with its error, and the others go on; so is, with the reason, one that a contender
    leaves out.

    Args:
        config: a comparison, or those of a suite with the names of the parts that they are. A cell of several parts is
            run once, as one of the first.
        fresh: run all cells, whatever has been written before.
        only: keys of the cells that are run here; None for all.
        retry: run cells again that failed with these versions.
        shares: processes that share the cells out, each of which calls this.
        watch: is told of cells instead of ``say``.
        say: gets a line of progress at a time.

    Raises:
        ValueError: another run is measuring into the same file.
    """
    todo: dict[str, CompareCell] = {}
    made: set[Path] = set()
    held: dict[str, tuple[CompareConfig, CompareModels]] = {}
    for part, own in _parts(config):
        of_part = own, CompareModels(own, fresh, folder_name, made)
        for cell in cells(own, part):
            todo.setdefault(cell.key, cell)
            held.setdefault(cell.key, of_part)

    def measure(group: list[CompareCell]) -> Iterator[tuple[CompareCell, dict[str, Any]]]:
        (cell,) = group
        config, models = held[cell.key]
        for _, other in held.values():
            if other is not models and other.loaded:
                other.drop()
        started = time.perf_counter()
        outcome: dict[str, Any]
        try:
            contender = contender_in(cell.settings["rules"])
            if contender is not None:
                contender.refuse(cell.settings.get("what", cell.measure))
            outcome = {"status": "ok", "result": _MEASURES[cell.measure](config, cell, models)}
        except LeftOutError as reason:
            outcome = {"status": LEFT_OUT, "error": str(reason)}
            models.drop()
        except Exception as error:  # what one attention cannot do must not end the others
            outcome = {"status": "error", "error": described(error), "traceback": traceback.format_exc()}
            models.drop()
        yield cell, {**outcome, "seconds": round(time.perf_counter() - started, 2)}

    _quiet_loading()

    def hashed(cell: CompareCell) -> dict[str, str]:
        columns = held[cell.key][0].task.columns
        return hashes_of(cell.settings["model"], cell.settings.get("data"), columns)

    groups = [[cell] for cell in todo.values()]
    how: dict[str, Any] = {"fresh": fresh, "only": only, "retry": retry, "shares": shares, "watch": watch}
    timed = operator.attrgetter("timed")
    run_cells(groups, results, measure, _note, say=say, announce=True, timed=timed, hashed=hashed, **how)


def all_cells(config: CompareConfig | Sequence[tuple[str, CompareConfig]]) -> list[CompareCell]:
    """Every cell of a comparison, or of a suite's parts, which may share some."""
    return [cell for part, own in _parts(config) for cell in cells(own, part)]


def _parts(config: CompareConfig | Sequence[tuple[str, CompareConfig]]) -> Sequence[tuple[str | None, CompareConfig]]:
    return [(None, config)] if isinstance(config, CompareConfig) else config


def _quiet_loading() -> None:
    """No bars or reports for loading weights and cutting text, which every cell repeats; what takes long has a bar."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    need("datasets", "train").disable_progress_bars()


def _evaluate(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    found = _evaluated(config, cell, models.get(cell, cell.attention, cell.seed))
    if chosen(cell.settings["rules"]):
        found |= {"rules": models.rules(cell), "scores": models.scores(cell)}
    return found


def _evaluated(config: CompareConfig, cell: CompareCell, loaded: Loaded) -> dict[str, Any]:
    assert config.data is not None
    task = config.task
    untrained = [name for name in loaded.fresh if not in_slot(name)]
    if untrained:
        raise ValueError(
            f"the model holds no weights for {', '.join(untrained[:3])}, so {task.name} would say nothing of it"
        )
    _, held_out = load_data(config.data, task.columns)
    found = run_measurements(
        prepare_measurements(config.tasks, held_out, loaded), loaded.model, progress=cell.attention
    )
    figures = found.pop(task.name)
    summary = attention_summary(loaded.model)
    return {**_headline(task, figures), "figures": figures, "others": found, "attention": summary}


def _transfer(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    folder, metrics = models.transferred(cell)
    loaded = place(load(folder, kind=config.task.model, dtype=config.dtype, seed=cell.seed))
    kept = {name: metrics[name] for name in ("train", "errors")}
    return {**_evaluated(config, cell, loaded), **kept, "folder": folder}


def folder_name(cell: CompareCell, key: str) -> str:
    """Of what is made for a cell."""
    return f"{file_stem(cell.model)}-{file_stem(cell.attention)}-seed{cell.seed}-{key[:6]}"


def _finetune(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    models.drop()
    folder = Path(config.output_dir).expanduser() / "finetuned" / folder_name(cell, cell.key)
    if folder.exists() and (models.fresh or not same_versions(folder)):
        shutil.rmtree(folder)  # its checkpoints are of a run that does not count any more
    source, rules = cell.settings["model"], models.rules(cell)
    if "transfer" in cell.settings:
        (source, _), rules = models.transferred(cell), AS_SAVED
    elif contender_in(rules) is not None:
        source, rules = models.written(cell), AS_SAVED
    settings = finetune_config(config, source, rules, cell.seed, str(folder))
    metrics = finished(settings)
    if metrics is None:
        metrics = prepare_finetune(settings, resume=True).run(progress=cell.attention)
    figures = metrics["evaluation"]["after"]
    others = {name: found["after"] for name, found in metrics["evaluation"]["others"].items()}
    kept = {name: metrics[name] for name in ("attention", "parameters", "train")}
    return {**_headline(config.task, figures), "figures": figures, "others": others, **kept, "folder": str(folder)}


def _speed(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    base = models.get(cell, config.baseline, config.seeds[0])
    own, input_ids, device = _model_and_tokens(cell, models)
    scope: Scope = cell.settings["scope"]
    found = {}
    for which in cell.settings["passes"]:
        contenders = {
            "baseline": timing.parts(base.model, input_ids, scope, which),
            "own": timing.parts(own.model, input_ids, scope, which),
        }
        seconds = timing.interleaved(contenders, cell.settings["rounds"], device)
        found[which] = timing.compared(seconds["own"], seconds["baseline"])
    return {"passes": found}


def _memory(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    own, input_ids, device = _model_and_tokens(cell, models)
    found = {}
    for which in cell.settings["passes"]:
        found[which] = {
            "bytes": timing.peak_bytes(timing.parts(own.model, input_ids, cell.settings["scope"], which), device)
        }
    return {"passes": found}


def _cost(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    what, length = cell.settings["what"], cell.settings["length"]
    base = models.get(cell, config.baseline, config.seeds[0]) if "baseline" in cell.settings else None
    own, input_ids, device = _model_and_tokens(cell, models)
    if what == "cache":
        return {"bytes": cost.bytes_of_cache(own.model, length)}
    if what == "paper":
        return cost.on_paper(own.model, length, cell.settings["gpu"], cell.settings["batch_size"])
    assert base is not None
    if what == "decode":
        return cost.decode(own.model, base.model, length, cell.settings, device)
    try:
        return cost.step(own.model, base.model, input_ids, cell.settings)
    finally:
        models.drop()  # gradients that are not finite would reach weights at a learning rate of 0 too


def _model_and_tokens(cell: CompareCell, models: CompareModels) -> tuple[Loaded, torch.Tensor, torch.device]:
    """The cell's model, random tokens for it, and where it is."""
    own = models.get(cell, cell.attention, cell.seed)
    text: Any = own.model.config.get_text_config()  # type: ignore[operator, union-attr]
    length, limit = cell.settings["length"], getattr(text, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length {length}; allowed: at most {limit}, the model's max_position_embeddings")
    generator = torch.Generator().manual_seed(cell.seed)
    input_ids = torch.randint(text.vocab_size, (cell.settings["batch_size"], length), generator=generator)
    device = next(own.model.parameters()).device
    return own, input_ids.to(device), device


_MEASURES: dict[str, Callable[[CompareConfig, CompareCell, CompareModels], dict[str, Any]]] = {
    "evaluate": _evaluate,
    "transfer": _transfer,
    "finetune": _finetune,
    "speed": _speed,
    "memory": _memory,
    "cost": _cost,
}


def _headline(task: Task, figures: dict[str, Any]) -> dict[str, Any]:
    return {"metric": task.metric, "better": task.better, "value": figures[task.metric]}


def _note(cell: CompareCell, result: dict[str, Any]) -> str:
    if cell.measure == "speed":
        return ", ".join(
            f"{which} {found['times_as_fast']:.2f}x the baseline" for which, found in result["passes"].items()
        )
    if cell.measure == "memory":
        return ", ".join(f"{which} {found['bytes'] / 2**20:.1f} MiB" for which, found in result["passes"].items())
    if cell.measure == "cost":
        return cost_note(result)
    return f"{result['metric']} {result['value']:.4g}"
