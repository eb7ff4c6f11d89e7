"""A transfer from a folder or a name to a folder: text, model, stage 1, and what is written of it."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.versions import versions
from attn_plugins.data.sources import load_data
from attn_plugins.data.stream import Make, Stream
from attn_plugins.data.text import special_blocks, token_blocks
from attn_plugins.hf.checkpoints.card import START
from attn_plugins.hf.swap import describe_attention, unwrap
from attn_plugins.tasks import TrainableTask
from attn_plugins.training.card import told
from attn_plugins.training.evaluate import attention_summary, place, write_json
from attn_plugins.training.history import stage_of, stages_of
from attn_plugins.training.models import Loaded, load, refuse_new, resolve
from attn_plugins.training.processes import is_main_process, start_processes
from attn_plugins.training.resume import METRICS, check_resume, check_rows, note_settings, settings_of
from attn_plugins.training.streaming import classes
from attn_plugins.transfer.attention_transfer import AUTOCAST, checked, training_arguments, transfer_attention
from attn_plugins.transfer.body import slots_of
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.errors import measure_errors
from attn_plugins.transfer.report import TransferReport

REPORT, PICTURE, CARD = "report.json", "errors.png", "README.md"

Batches = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A transfer whose inputs are all there: what can be wrong in a config has shown by now."""

    config: TransferConfig
    trained: TrainableTask | None
    """The task that made the batches, if one did."""
    loaded: Loaded
    batches: Batches
    held_out: Batches
    twice: Batches
    """Held-out batches of twice the length; none where there is no text so long, or the model reads none."""
    resume: bool
    rows: int
    """That a step is made from, in all processes together."""

    def run(self, progress: bool = True) -> tuple[TransferReport, dict[str, Any]]:
        """Train, measure, and write everything into ``config.output_dir``.

        Returns:
            the report, and what metrics.json holds.
        """
        config, main = self.config, is_main_process()
        model: Any = self.loaded.model
        if main:
            note_settings(config, self.rows)
        report = transfer_attention(
            model,
            self.batches,
            config.steps,
            loss=config.loss,
            learning_rate=config.learning_rate,
            held_out=self.held_out,
            body_dtype=config.body_dtype,
            output_dir=config.output_dir,
            resume=self.resume,
            seed=config.seed,
            training=config.training,
            progress=progress,
        )
        report = self._at_twice(report)
        metrics = self._metrics(report)
        if main:
            out = Path(config.output_dir)
            (out / CARD).unlink(missing_ok=True)
            model.save_pretrained(out)
            self.loaded.processing.save_pretrained(out)
            write_json(out / REPORT, report.as_dict())
            report.plot(out / PICTURE)
            write_json(out / METRICS, metrics)
            _write_section(out / CARD, metrics)
        return report, metrics

    def _at_twice(self, report: TransferReport) -> TransferReport:
        if not self.twice:
            return report
        model: Any = unwrap(self.loaded.model)
        dtype = None if self.config.body_dtype is None else AUTOCAST[self.config.body_dtype]
        found = measure_errors(model, slots_of(model), self.twice, dtype=dtype)
        layers = [dataclasses.replace(layer, after_at_twice=found[layer.path]) for layer in report.layers]
        return dataclasses.replace(report, layers=layers)

    def _metrics(self, report: TransferReport) -> dict[str, Any]:
        """What stages that follow tell of this one, and how it can be gone on with."""
        config = self.config
        model: Any = self.loaded.model
        means = {name: getattr(report, name) for name in ("before", "after", "after_at_twice")}
        return {
            "stage": "transfer",
            "model": config.model,
            "base_model": self.loaded.source,
            "history": stages_of(resolve(config.model)),
            "attention": attention_summary(model),
            "rules": model.config.attn_plugin,
            "tune": "new",
            "loss": config.loss,
            "seed": config.seed,
            "data": dataclasses.asdict(config.data),
            "errors": {**means, "worst": {"path": report.worst.path, "after": report.worst.mean()}},
            "train": {
                "losses": report.losses,
                "steps": report.steps,
                "rows": report.steps * config.batch_size * report.processes,
                "row": f"text of {config.length} tokens" if self.trained is None else self.trained.row_of(),
                "tokens": report.tokens,
                "processes": report.processes,
                "seconds": report.seconds,
                "resumed_from": report.resumed_from,
            },
            "settings": settings_of(config),
            "versions": versions(),
        }


def prepare_transfer(config: TransferConfig, *, resume: bool = False) -> Transfer:
    """Load text and model.

    Args:
        resume: go on from the last whole checkpoint in ``config.output_dir``, from the start if there is none.

    Raises:
        ValueError: something that the config names is not there or does not fit, nothing could learn, ``output_dir``
            cannot be written, or the run that it holds is not one to go on with.
    """
    need("accelerate", "train")
    need("matplotlib", "compare")
    refuse_new(config.model)
    if check_folder(config.output_dir).resolve() == Path(config.model).expanduser().resolve():
        raise ValueError(f"output_dir={config.output_dir!r} is the model's own folder; allowed: another")
    checkpoint = check_resume(config, resume=resume)
    start_processes()
    trained = config.trained()
    train, held_out = load_data(config.data) if trained is None else load_data(config.data, trained.columns)
    loaded = place(
        load(
            config.model,
            attention=config.attention,
            kind="any",
            dtype=config.dtype,
            seed=config.seed,
            processing=None if trained is None else trained.model,
        )
    )
    inner, _ = checked(loaded.model, config.loss)
    arguments, _ = training_arguments(
        inner, config.steps, config.learning_rate, config.output_dir, resume, config.seed, config.training, True
    )
    per_step = arguments.gradient_accumulation_steps * arguments.world_size
    wanted, rows = config.steps * per_step, config.batch_size * per_step
    if checkpoint is not None:
        check_rows(config, rows)
    shared: dict[str, Any] = {"config": config, "trained": trained, "loaded": loaded, "resume": resume, "rows": rows}
    if trained is not None:
        with labelled(inner, classes(trained, train)):
            batches = task_batches(trained, inner, loaded, train, config.batch_size, wanted, config.seed)
            measured = task_batches(trained, inner, loaded, held_out, config.batch_size, config.held_out)
        return Transfer(**shared, batches=batches, held_out=measured, twice=[])
    _check_length(config, inner)
    return Transfer(
        **shared,
        batches=batches_of(inner, loaded.tokenizer, train, config.length, config.batch_size, wanted, config.seed),
        held_out=batches_of(inner, loaded.tokenizer, held_out, config.length, config.batch_size, config.held_out),
        twice=_twice(config, inner, loaded.tokenizer, held_out),
    )


@contextlib.contextmanager
def labelled(model: Any, names: list[str] | None) -> Iterator[None]:
    """While it lasts the model's config names these classes, by which a task numbers labels; its head is not used."""
    before = model.config.id2label, model.config.label2id
    try:
        if names is not None:
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: number for number, name in enumerate(names)}
        yield
    finally:
        model.config.id2label, model.config.label2id = before


def task_batches(
    trained: TrainableTask, model: Any, loaded: Loaded, data: Any, size: int, number: int, seed: int | None = None
) -> Batches:
    """At most ``number`` batches of ``size`` examples of a task, as it trains on them.

    Args:
        seed: of the order; None is that of the data.

    Raises:
        ValueError: the data do not fit the task or the model.
    """
    collate = trained.collator(loaded.processing, model)
    if collate is None:
        raise ValueError(f"task={trained.called()!r} makes no batches that a model is called with; allowed: another")
    examples = _examples(data, lambda rows: trained.examples(rows, loaded.processing, model), size * number, seed)
    order = list(range(len(examples)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    size = min(size, len(order))
    starts = range(0, len(order) - size + 1, size)[:number]
    return [collate([examples[index] for index in order[start : start + size]]) for start in starts]


def batches_of(
    model: Any, tokenizer: Any, data: Any, length: int, size: int, number: int, seed: int | None = None
) -> Batches:
    """At most ``number`` batches of ``size`` texts of exactly ``length`` tokens, as the model takes them.

    Decoders get texts laid end to end, others get each text on its own, between the tokenizer's special tokens.

    Args:
        seed: of the order; None is that of the data.

    Raises:
        ValueError: the data give less than one text of that length.
    """
    pairs = bool(getattr(model.config, "is_encoder_decoder", False))
    causal = not pairs and any(row.role == "decoder" for row in describe_attention(model))
    cut = token_blocks if causal else special_blocks
    blocks = _examples(data, lambda rows: cut(rows, tokenizer, length), size * number, seed)
    order = list(range(len(blocks)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    size = min(size, len(order))
    chosen: list[Sequence[int]] = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    rows = [torch.tensor([blocks[at]["input_ids"] for at in numbers]) for numbers in chosen[:number]]
    return [{"input_ids": ids, **({"labels": ids} if pairs else {})} for ids in rows]


def _examples(data: Any, make: Make, number: int, seed: int | None) -> Any:
    """What is made of the rows; of a stream, as many as are used."""
    return data.some(make, number, seed=seed or 0) if isinstance(data, Stream) else make(data)


def _check_length(config: TransferConfig, model: Any) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.length > limit:
        raise ValueError(f"length={config.length}; allowed: at most {limit}, the model's max_position_embeddings")


def _twice(config: TransferConfig, model: Any, tokenizer: Any, held_out: Any) -> Batches:
    """Held-out batches of twice the length, half as many; none where it cannot be."""
    length = 2 * config.length
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        return []
    try:
        return batches_of(model, tokenizer, held_out, length, config.batch_size, max(1, config.held_out // 2))
    except ValueError:  # no text is so long
        return []


def _write_section(card: Path, metrics: dict[str, Any]) -> None:
    """Tell in the model card what was done, before the part about the attention."""
    errors = metrics["errors"]
    twice = "" if errors["after_at_twice"] is None else f", {errors['after_at_twice']:.3f} at twice the length"
    stages = [*metrics["history"], stage_of(metrics)]
    section = [
        f"# {metrics['model']} with another attention",
        "",
        "Only the weights of the attention that are new were trained, on what the model's own attention does.",
        "",
        *(f"{number}. {told(stage)}" for number, stage in enumerate(stages, 1)),
        "",
        "Squared error of outputs over their squared length, the mean over layers and heads, on held-out text: "
        f"{errors['before']:.3f} before, {errors['after']:.3f} after{twice}. report.json has it by layer and head.",
        "",
        f"Base model: {metrics['base_model']}. "
        f"{', '.join(f'{name} {version}' for name, version in metrics['versions'].items())}.",
        "",
    ]
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace(START, "\n".join([*section, START]), 1), encoding="utf-8")
