"""The model card of a fine-tune, README.md beside the weights: base model, attention, data, results, how to load it."""

from typing import Any

import yaml

from attn_plugins.data.columns import ROLES
from attn_plugins.data.sources import spelled_source
from attn_plugins.hf.checkpoints.card import END, START, rules_block, served, tags
from attn_plugins.tasks import figure, get_task, rows_of, trained_task
from attn_plugins.tasks.kinds import KINDS
from attn_plugins.training.new_models import is_new, told_model


def model_card(metrics: dict[str, Any]) -> str:
    """Markdown with the front matter that the hub reads, from what metrics.json holds."""
    kinds = metrics["attention"]["modules"]
    names = [kind for kind in kinds if not kind.startswith("own (")]
    lora = metrics["tune"] == "lora"
    library = _library(metrics)
    new = is_new(metrics["base_model"])
    front = {
        **({} if new else {"base_model": metrics["base_model"]}),
        "library_name": "peft" if lora and library == "transformers" else library.replace("_", "-"),
        "pipeline_tag": trained_task(metrics["task"]).pipeline_tag,
        "tags": [*tags(kinds), *(["lora"] if lora else [])],
    }
    train, parameters = metrics["train"], metrics["parameters"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {told_model(metrics['model'])} with {' + '.join(names) or 'its own'} attention",
        "",
        f"{_FROM_SCRATCH if new else _DONE[metrics['loss']]} with attn-plugins: {_TUNED[metrics['tune']]}.",
        "",
        *([START] if metrics["rules"] else []),
        "## Attention",
        "",
        f"Attention modules of the model: {served(kinds)}. "
        f"New parameters in them: {metrics['attention']['new_params']:,}.",
        "",
        *rules_block(metrics["rules"]),
        *([END] if metrics["rules"] else []),
        "",
        "## Results",
        "",
        *_results(metrics["evaluation"]["task"], metrics["evaluation"]),
        "",
        *(line for task, found in metrics["evaluation"]["others"].items() for line in [*_results(task, found), ""]),
        *_recall(metrics["recall"]),
        *_before(metrics["history"]),
        "## Training",
        "",
        f"- {'Model' if new else 'Base model'}: {told_model(metrics['base_model'])}{_quantized(metrics)}",
        f"- Data: {', '.join([spelled_source(metrics['data']['source']), *_columns(metrics)])}",
        f"- {train['steps']} steps, {train['rows']:,} rows (a row is a {train['row']}), {train['seconds']:,} s, "
        f"{train['processes']} {'process' if train['processes'] == 1 else 'processes'}, mean loss {train['loss']:.4f}",
        f"- Parameters: {parameters['trained']:,} trained of {parameters['total']:,}",
        f"- Seed: {metrics['seed']}",
        f"- {', '.join(f'{name} {version}' for name, version in metrics['versions'].items())}",
        "",
        "## Use",
        "",
        "```python",
        *_use(metrics, lora),
        "```",
        "",
        _WARNINGS[lora],
    ]
    return "\n".join(lines) + "\n"


_DONE = {
    "task": "Fine-tuned",
    "kl": "Distilled from itself with its own attention (KL divergence of its logits)",
    "hidden": "Distilled from itself with its own attention (squared error of its last hidden states)",
}


_FROM_SCRATCH = "Trained from scratch"


_TUNED = {
    "lora": "LoRA adapters, and all weights of the attention that are new",
    "full": "all weights trained",
    "new": "only the weights that the base model did not have were trained",
}


_WARNINGS = {
    False: "Without attn-plugins (`pip install attn-plugins`) transformers refuses to load this model.",
    True: "The adapter brings its attention, and gives it to the base model. Without attn-plugins (`pip install "
    "attn-plugins`) PEFT refuses to load it.",
}


def _recall(recall: dict[str, Any] | None) -> list[str]:
    if recall is None:
        return []
    if "missing" in recall:
        return [f"Recall of what stood far away was not measured: {recall['missing']}.", ""]
    lines = [
        f"Recall at {recall['distance']:,} tokens, share of tokens that are right in {recall['rows']} rows:",
        "",
        "| | before training | after training |",
        "|---|---|---|",
    ]
    for part, its in recall["parts"].items():
        lines.append(f"| {part} | {' | '.join(figure(its[stage]['accuracy']) for stage in ('before', 'after'))} |")
    return [*lines, "", *([f"**Note that {recall['warning']}.**", ""] if recall["warning"] else [])]


def _results(task: str, evaluation: dict[str, Any]) -> list[str]:
    stages = [stage for stage in ("before", "after") if evaluation[stage] is not None]
    metric = get_task(task).metric
    columns = [rows_of(evaluation[stage], metric) for stage in stages]
    lines = [f"Held-out {task}:", ""]
    lines += [f"| | {' | '.join(f'{stage} training' for stage in stages)} |", "|---" * (len(stages) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(figure(column[name]) for column in columns)} |" for name in columns[0]]


def _before(stages: list[dict[str, Any]]) -> list[str]:
    """What was done before, if anything."""
    return ["## Before that", "", *(f"{n}. {told(stage)}" for n, stage in enumerate(stages, 1)), ""] if stages else []


def told(stage: dict[str, Any]) -> str:
    """A stage in a line: what was trained by which loss, how long, on what, and what came of it."""
    train, loss = stage["train"], stage.get("loss", "task")
    return (
        f"{stage['stage']}{'' if loss == 'task' else f' ({loss})'}, {SHORT[stage['tune']]}: {train['steps']} steps, "
        f"{train['rows']:,} rows of {spelled_source(stage['data']['source'])}, {train['seconds']:,} s{_outcome(stage)}"
    )


SHORT = {"lora": "LoRA and new weights", "full": "all weights", "new": "new weights alone"}


def _outcome(stage: dict[str, Any]) -> str:
    evaluation = stage.get("evaluation")
    if evaluation is None:
        return ""
    metric = get_task(evaluation["task"]).metric
    ends = [f"{figure(evaluation[end][metric])} {end}" for end in ("before", "after") if evaluation[end] is not None]
    return f"; {metric} {', '.join(ends)}"


def _quantized(metrics: dict[str, Any]) -> str:
    method = metrics["quantization"]
    return f", its linear layers but heads quantized by {method}" if method else ""


def _use(metrics: dict[str, Any], lora: bool) -> list[str]:
    auto, library = metrics["auto"], _library(metrics)
    lines = ["import attn_plugins", f"from {library} import {auto}", ""]
    if library == "sentence_transformers":
        return [*lines, f'model = {auto}("path/to/this/folder")']
    if not lora:
        return [*lines, f'model = {auto}.from_pretrained("path/to/this/folder")']
    asked = f'"{metrics["base_model"]}"'
    if metrics["quantization"]:
        lines[1] += ", AutoConfig"
        lines.append('config = AutoConfig.from_pretrained("path/to/this/folder")')
        asked += ", quantization_config=config.quantization_config"
    return [
        *lines[:1],
        "from peft import PeftModel",
        *lines[1:],
        f"base = {auto}.from_pretrained({asked})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]


def _library(metrics: dict[str, Any]) -> str:
    """Module that loads the model."""
    return KINDS[trained_task(metrics["task"]).model].library


def _columns(metrics: dict[str, Any]) -> list[str]:
    names = [repr(metrics["data"][ROLES[role].option]) for role in trained_task(metrics["task"]).columns]
    return [f"{'column' if len(names) == 1 else 'columns'} {', '.join(names)}"] if names else []
