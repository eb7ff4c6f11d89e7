"""Verbs that train a model and measure it: finetune, evaluate."""

import json
import os
import sys
from typing import Annotated, Any

import typer

from attn_plugins.cli.app import (
    Attn,
    ConfigFile,
    Data,
    Model,
    OutputDir,
    Seed,
    Settings,
    app,
    one_line_errors,
    print_figures,
    settings,
    spread_out,
)
from attn_plugins.cli.stop import stoppable
from attn_plugins.core.catalogue import task_names
from attn_plugins.core.options import build

TrainedTask = Annotated[str | None, typer.Option("--task", help=f"{', '.join(task_names(trained=True))}.")]
Tune = Annotated[str | None, typer.Option("--tune", help="What trains: lora, full, or new (new weights alone).")]
Loss = Annotated[str | None, typer.Option("--loss", help="task, kl (to the model with its own attention), or hidden.")]


@app.command()
def finetune(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    task: TrainedTask = None,
    tune: Tune = None,
    loss: Loss = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the output folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run one step and one batch, write nothing.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Count memory, FLOPs and steps on paper; no weights, no step, nothing written."),
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="With --plan: a100, h100, h200 or b200; does it fit, how long at least.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", help="With --plan: how many, each on a GPU.")] = 1,
    sharding: Annotated[str, typer.Option("--sharding", help="With --plan: ddp, or fsdp.")] = "ddp",
    assignments: Settings = None,
) -> None:
    """Fine-tune a model with an attention of your choice; writes the model, metrics.json and a model card."""
    flags = {
        **{"model": model, "data.source": data, "task": task, "tune": tune, "loss": loss},
        **{"output_dir": output_dir, "seed": seed},
    }
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.data.stream import StreamError
        from attn_plugins.tasks import get_task
        from attn_plugins.training.config import FinetuneConfig
        from attn_plugins.training.finetune import prepare_finetune
        from attn_plugins.training.processes import is_main_process
        from attn_plugins.training.resume import finished

        parsed = build(FinetuneConfig, tree)
        if plan:
            return _plan(parsed, gpu, processes, sharding)
        if (gpu, processes, sharding) != (None, 1, "ddp"):
            raise ValueError("--gpu, --processes and --sharding go with --plan; accelerate launch tells a run its own")
        spread_out()
        if dry_run:
            return _dry_run(parsed, resume)
        metrics = finished(parsed) if resume else None
    if metrics is None:
        with stoppable(parsed.output_dir):
            with one_line_errors():
                run = prepare_finetune(parsed, resume=resume)
            try:
                metrics = run.run()
            except StreamError as error:
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(2) from None
        done = f"written to {parsed.output_dir}: the model, README.md, metrics.json"
    else:
        done = f"the run in {parsed.output_dir} has ended with these settings; nothing was trained, nothing written"
    if is_main_process() and os.environ.get("RANK", "0") == "0":
        evaluation, recall = metrics["evaluation"], metrics["recall"] or {}
        for name, found in {evaluation["task"]: evaluation, **evaluation["others"], **recall.get("parts", {})}.items():
            stages = {stage: found[stage] for stage in ("before", "after") if found[stage] is not None}
            print_figures(f"{name}, held-out", stages, get_task(name).metric)
        if "missing" in recall:
            print(f"note: recall of what stood far away was not measured: {recall['missing']}")
        print(done)


def _plan(parsed: Any, gpu: str | None, processes: int, sharding: str) -> None:
    from attn_plugins.benchmark.cost.plan import Machines, make_plan, told

    found = make_plan(parsed, Machines(gpu=gpu, processes=processes, sharding=sharding))
    if os.environ.get("RANK", "0") == "0":
        print(told(found))


def _dry_run(parsed: Any, resume: bool) -> None:
    from attn_plugins.training import dry_run
    from attn_plugins.training.processes import is_main_process

    found = dry_run.dry_run(parsed, resume=resume)
    if is_main_process():
        print(dry_run.told(found, parsed))


@app.command()
def evaluate(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help=f"{', '.join(task_names())}; repeatable.",
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, with commas: names, YAML files, folders. --set harness.limit=100.",
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write the result there, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    assignments: Settings = None,
) -> None:
    """Measure a model, swapped or not, or a PEFT adapter, on held-out text, or by lm-evaluation-harness."""
    asked: dict[str, Any] = {"evaluation.task": task[0]} if task and len(task) == 1 else {}
    if task and len(task) > 1:
        asked = {"evaluation": [{"task": name} for name in task]}
    flags = {"model": model, "data.source": data, "output": output, **asked}
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        if harness is not None:
            asked_too = tree.get("evaluation", [])
            own = {"task": "harness", "tasks": harness.split(","), **tree.pop("harness", {})}
            tree["evaluation"] = [*(asked_too if isinstance(asked_too, list) else [asked_too]), own]
        from attn_plugins.tasks import get_task
        from attn_plugins.training.config import EvaluateConfig
        from attn_plugins.training.evaluate import prepare_evaluation, without_recall
        from attn_plugins.training.processes import is_main_process

        parsed = build(EvaluateConfig, tree)
        spread_out()
        run = prepare_evaluation(parsed)
    result = run.run()
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        served = ", ".join(f"{kind} in {count}" for kind, count in result["attention"]["modules"].items())
        found = {result["task"]: result["result"], **result["others"]}
        for name, figures in found.items():
            title = f"{name} of {result['model']} ({served} attention modules)"
            print_figures(title, {"": figures}, get_task(name).metric)
        note = without_recall(list(found), result["attention"])
        if note is not None:
            print(f"note: {note}")
        if result["new_weights"]:
            print(
                f"note: {result['new_weights']} weights of the attention are at their initial values: it is untrained"
            )
