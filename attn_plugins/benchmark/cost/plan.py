"""What a fine-tune asks of memory and time, before it starts: no weights are read, and no step is run.

Counted is a step on tensors without values (:mod:`attn_plugins.benchmark.cost.blank_step`). What several processes
hold, and how long a GPU takes at least, is arithmetic on these counts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from attn_plugins.benchmark.cost.blank_step import StepCounts, count_step, optimizer_bytes, without_values
from attn_plugins.benchmark.cost.roofline import DEVICES, LAUNCH, batched, takes
from attn_plugins.benchmark.results.cells import described
from attn_plugins.core.options import did_you_mean
from attn_plugins.data.sources import load_data
from attn_plugins.data.stream import Stream
from attn_plugins.hf.swap import unwrap
from attn_plugins.tasks import TrainableTask
from attn_plugins.tasks.kinds import KINDS
from attn_plugins.training.arguments import training_arguments
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.evaluate import attention_summary
from attn_plugins.training.finetune import choose_parameters, parameter_counts
from attn_plugins.training.models import Loaded, load_blank, read_processing, resolve
from attn_plugins.training.new_models import is_new
from attn_plugins.training.streaming import classes

KEPT_FREE = 0.1
"""Share of a GPU's memory that a run is not to take: for what is not counted, and for what lies between tensors."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a fine-tune would run on."""

    gpu: str | None = None
    """A key of :data:`attn_plugins.benchmark.cost.roofline.DEVICES`, in any case; None estimates no time."""
    processes: int = 1
    """How many train, each on a device of its own."""
    sharding: str = "ddp"
    """ddp: each holds all. fsdp: each holds a share of weights, gradients and the optimizer's states."""

    def __post_init__(self) -> None:
        if self.gpu is not None:
            object.__setattr__(self, "gpu", self.gpu.lower())
            if self.gpu not in DEVICES:
                raise ValueError(
                    f"gpu={self.gpu!r}{did_you_mean(self.gpu, DEVICES)}; allowed, since their rates are published and "
                    f"known here: {', '.join(sorted(DEVICES))}"
                )
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}; allowed: at least 1")
        if self.sharding not in ("ddp", "fsdp"):
            raise ValueError(f"sharding={self.sharding!r}; allowed: ddp, fsdp")


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of a device, of a step with or without gradient checkpointing."""

    kept: int
    """What the backward pass finds of the forward pass, beside weights."""
    outputs: int
    """Of the most at once, logits and what the loss makes of them."""
    peak: int
    """The most at once: weights, gradients, states of the optimizer, ``kept`` and what is there for a moment."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fine-tune would take; bytes, FLOPs, launches and seconds are those of one process."""

    machines: Machines
    parameters: dict[str, int]
    """total, trained, attention."""
    attention: dict[str, int]
    """What serves how many attention modules."""
    optim: str
    batch: dict[str, list[int]]
    """Name of an input -> its shape, in one of ``repeats`` batches of a step."""
    repeats: int
    row: str
    rows: int | None
    """Rows to train on, where they were read and have a number."""
    steps: int
    tokens: int | None
    """Of a batch, where it has some."""
    weights: int
    gradients: int
    optimizer: int
    beside: int
    """What processes need of each other's, by arithmetic: buckets of gradients, or parts that are together for a
    while."""
    held: dict[bool, Held]
    """With gradient checkpointing -> bytes."""
    flops: dict[bool, int]
    """With gradient checkpointing -> FLOPs of a step."""
    checkpointed: bool
    """Whether the settings ask for it."""
    launches: int
    """Operations that forward and backward passes of a step start."""
    seconds: float | None
    """Of a step, at least, by the rates of the GPU."""
    uncounted: dict[str, str]
    """What could not be counted -> why."""


def make_plan(config: FinetuneConfig, machines: Machines) -> Plan:
    """Count what a fine-tune would take.

    Rows are read where their number or their size is asked for: without ``training.max_steps``, and of tasks whose rows
    are not all of one length.

    Raises:
        ValueError: as the run itself would, or it is of a kind that cannot be counted.
    """
    trained = config.trained()
    _check_countable(config, trained)
    arguments = training_arguments(config, trained, quiet=True)
    number, rows = arguments.per_device_train_batch_size, None
    loaded = _blank(config, trained, None)
    batch: Any = trained.blank(number, loaded.model)
    if batch is None or arguments.max_steps <= 0:
        train, _ = load_data(config.data, trained.columns)
        labels = classes(trained, train)
        processing = loaded.processing
        if not is_new(config.model):
            processing = read_processing(trained.model, resolve(config.model), loaded.source)
        asked = _blank(config, trained, labels).model  # which size of pictures fits is tried with it
        with FakeTensorMode(allow_non_fake_inputs=True):
            without_values(asked)
        examples = trained.examples(train.first if isinstance(train, Stream) else train, processing, asked)
        rows = None if isinstance(train, Stream) else len(examples)
        if batch is None:
            collate = trained.collator(processing, asked)
            assert collate is not None
            batch = _unmasked(dict(collate(_longest(trained, examples, number))))
        loaded = _blank(config, trained, labels)
    with torch.device("meta"):
        model: Any = choose_parameters(config, loaded)
    unwrap(model).config.use_cache = arguments.use_cache
    parameters, attention = parameter_counts(model), attention_summary(model)["modules"]
    uncounted: dict[str, str] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        counts = _counted(without_values(model), batch, arguments, uncounted)
    optimizer = _optimizer(model, mode, arguments)
    weights, gradients = _bytes([*model.parameters(), *model.buffers()]), _bytes(_trained(model))
    processes, repeats = machines.processes, arguments.gradient_accumulation_steps
    share = processes if machines.sharding == "fsdp" else 1
    beside = _beside(model, machines)
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts = {name: -(-size // share) for name, size in parts.items()}
    together = repeats > 1 or share > 1  # gradients are there from before, or a share of them stays
    held = {
        how: Held(
            kept=one.kept,
            outputs=one.outputs,
            peak=parts["weights"]
            + parts["optimizer"]
            + beside
            + (parts["gradients"] + one.peak_without_gradients if together else one.peak),
        )
        for how, one in counts.items()
    }
    chosen, seconds = counts[_checkpointed(arguments)], None
    if machines.gpu is not None:
        moved = sum(2 * size for size in (parts["gradients"], parts["optimizer"])) + parts["gradients"]
        seconds = repeats * takes(batched(chosen.operations, [machines.gpu]), machines.gpu)
        seconds += moved / DEVICES[machines.gpu].bandwidth
    return Plan(
        machines=machines,
        parameters=parameters,
        attention=attention,
        optim=_name(arguments.optim),
        batch={name: list(x.shape) for name, x in batch.items() if isinstance(x, torch.Tensor)},
        repeats=repeats,
        row=trained.row_of(),
        rows=rows,
        steps=steps_of_run(arguments, rows, processes),
        tokens=batch["input_ids"].numel() if "input_ids" in batch else None,
        **parts,
        beside=beside,
        held=held,
        flops={how: one.operations.flops * repeats for how, one in counts.items()},
        checkpointed=_checkpointed(arguments),
        launches=len(chosen.operations.launches) * repeats,
        seconds=seconds,
        uncounted=uncounted,
    )


def _check_countable(config: FinetuneConfig, trained: TrainableTask) -> None:
    """Raise a ValueError for a step that is more than the model's own loss of a batch."""
    if config.loss != "task":
        raise ValueError(f"loss={config.loss!r} runs a second model, which a plan does not count; allowed: loss='task'")
    if not trained.distils or KINDS[trained.model].library != "transformers":
        raise ValueError(f"the loss of task={config.task!r} is another library's, which a plan does not count")
    if config.quantization is not None:
        raise ValueError("a plan does not count quantized weights; leave quantization out: it then says at most")


def _blank(config: FinetuneConfig, trained: TrainableTask, labels: list[str] | None) -> Loaded:
    options: dict[str, Any] = {"attention": config.attention, "kind": trained.model, "dtype": config.dtype}
    return load_blank(config.model, **options, labels=labels)


def _longest(trained: TrainableTask, examples: Any, number: int) -> list[Any]:
    """So many of the longest rows; the first ones where all have one length."""
    lengths = list(trained.lengths(examples).values())
    order = sorted(range(len(examples)), key=lambda at: -max((its[at] for its in lengths), default=0))
    return [examples[at] for at in order[:number]]


def _unmasked(batch: dict[str, Any]) -> dict[str, Any]:
    """Without a mask that hides nothing, which models leave out by its values."""
    mask = batch.get("attention_mask")
    return {name: x for name, x in batch.items() if x is not mask or mask is None or not bool(mask.all())}


def steps_of_run(arguments: Any, rows: int | None, processes: int) -> int:
    """Steps that Trainer would make of so many rows.

    Args:
        arguments: TrainingArguments.
        rows: None where ``max_steps`` says.
    """
    if arguments.max_steps > 0 or rows is None:
        return int(arguments.max_steps)
    size = arguments.per_device_train_batch_size
    batches = rows // size if arguments.dataloader_drop_last else math.ceil(rows / size)
    updates = math.ceil(math.ceil(batches / processes) / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * max(updates, 1))


def _checkpointed(arguments: Any) -> bool:
    """By either of the names that transformers has for it."""
    return bool(arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False))


def _counted(model: Any, batch: Any, arguments: Any, uncounted: dict[str, str]) -> dict[bool, StepCounts]:
    """With gradient checkpointing -> counts; what the settings do not ask for is left out where it cannot be had.

    Raises:
        ValueError: what they ask for cannot be counted.
    """
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    asked = _checkpointed(arguments)
    options = arguments.gradient_checkpointing_kwargs or getattr(arguments, "activation_checkpointing_kwargs", None)
    found = {}
    for how in (asked, not asked):
        try:
            found[how] = count_step(model, batch, autocast=autocast, checkpointing=(options or {}) if how else None)
        except Exception as error:  # a model may do whatever it likes
            if how == asked:
                raise ValueError(
                    f"a step of this model cannot be counted without values of tensors: {described(error)}; "
                    "--dry-run runs one"
                ) from error
            uncounted["with gradient checkpointing" if how else "without gradient checkpointing"] = described(error)
    return found


def _optimizer(model: Any, mode: FakeTensorMode, arguments: Any) -> int:
    """Bytes of the states of Trainer's optimizer, which all are made in the first step."""
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError) as error:
        raise ValueError(f"training.optim: {' '.join(str(error).split())}") from error
    try:
        return optimizer_bytes(_trained(model), mode, cls, options)
    except Exception as error:  # other libraries' optimizers do what they like
        raise ValueError(
            f"the states of training.optim={_name(arguments.optim)!r} cannot be counted: {described(error)}; --dry-run "
            "runs a step of it"
        ) from error


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _trained(model: Any) -> list[torch.Tensor]:
    return [one for one in model.parameters() if one.requires_grad]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all of them, each once."""
    return sum(one.nbytes for one in {id(one): one for one in tensors}.values())


def _beside(model: Any, machines: Machines) -> int:
    """Bytes that several processes need more: DDP's buckets, as large as gradients; of FSDP, which gathers a layer and
    the next, and keeps what is in no layer together, these weights, and the gradients of the larger."""
    if machines.processes == 1:
        return 0
    if machines.sharding == "ddp":
        return _bytes(_trained(model))
    inner = unwrap(model)
    kinds = set(inner._no_split_modules or [])
    layers = [module for module in inner.modules() if type(module).__name__ in kinds]
    layer = max((_bytes(module.parameters()) for module in layers), default=0)
    inside = {id(one) for module in layers for one in module.parameters()}
    rest = [one for one in model.parameters() if id(one) not in inside]
    gradients = max([_bytes(_trained(module)) for module in layers] + [_bytes(x for x in rest if x.requires_grad)])
    return 2 * layer + _bytes(rest) + gradients


LEFT_OUT = (
    "CUDA's own memory, what lies between tensors, evaluation, saving",
    "what kernels fall short of published rates, mostly a quarter to a half; data; traffic between processes",
)
"""What the figures leave out: of all, and of the time."""


def told(found: Plan) -> str:
    """A plan in a few lines."""
    machines, counts, other = found.machines, found.parameters, not found.checkpointed
    held = found.held[found.checkpointed]
    many = machines.processes > 1
    shape = " and ".join(f"{name} {tuple(size)}" for name, size in found.batch.items())
    per = f" of each of {machines.processes} processes ({machines.sharding})" if many else ""
    how = {True: "with gradient checkpointing", False: "without gradient checkpointing"}
    lines = {
        "parameters": f"{counts['total']:,}, of which {counts['trained']:,} train",
        "attention": ", ".join(f"{kind} in {number} modules" for kind, number in found.attention.items()),
        "batch": f"{shape}; {found.repeats} of them a step{per}",
        "steps": _steps(found),
        "weights": _size(found.weights),
        "gradients": _size(found.gradients),
        "optimizer": f"{_size(found.optimizer)} ({found.optim})",
        "activations": f"{_size(held.kept)} kept for the backward pass, {how[found.checkpointed]}",
        "logits": f"{_size(held.outputs)} of the most at once: logits, and what the loss makes of them",
    }
    if found.beside:
        what = "buckets of gradients" if machines.sharding == "ddp" else "layers that are gathered, by arithmetic"
        lines["processes"] = f"{_size(found.beside)} for {what}"
    lines["memory"] = f"{_size(held.peak)} at once, at the most{per}"
    lines["FLOPs"] = f"{found.flops[found.checkpointed]:.3g} a step{per}"
    if other in found.held:
        more = found.flops[other] / found.flops[found.checkpointed]
        lines[how[other]] = (
            f"{_size(found.held[other].peak)} at once, {_size(found.held[other].kept)} of activations, "
            f"{more:.2f} times the FLOPs"
        )
    if machines.gpu is not None:
        lines |= _on_gpu(found, machines.gpu)
    lines |= {f"not counted {what}": why for what, why in found.uncounted.items()}
    lines["left out"] = "; ".join(LEFT_OUT[: 1 if machines.gpu is None else 2])
    width = max(map(len, lines))
    return "\n".join([*(f"{name:{width}}  {line}" for name, line in lines.items()), "an estimate: nothing was run"])


def _steps(found: Plan) -> str:
    seen = found.steps * found.repeats * found.machines.processes
    rows = "" if found.rows is None else f" over {found.rows:,} rows (a row is a {found.row})"
    return f"{found.steps:,}{rows}" + ("" if found.tokens is None else f", {seen * found.tokens:,} tokens")


def _on_gpu(found: Plan, gpu: str) -> dict[str, str]:
    """Whether it fits, and the least time."""
    device, seconds, peak = DEVICES[gpu], found.seconds or 0.0, found.held[found.checkpointed].peak
    share = peak / device.memory
    fits = "fits" if share <= 1 - KEPT_FREE else "does not fit" if share > 1 else "hardly fits"
    whole = timedelta(seconds=round(seconds * found.steps))
    return {
        device.name: f"{fits}: {share:.0%} of {_size(device.memory)}",
        "time": f"at least {seconds:.3g} s a step by its published rates ({found.launches:,} launches at "
        f"{LAUNCH * 1e6:g} us, in the batched form of attentions), {whole} for all steps",
    }


def _size(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} GB" if number < 1000 else f"{number:,.0f} GB"
