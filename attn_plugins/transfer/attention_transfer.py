"""Stage 1: the new weights of a swapped model learn to attend as the model's own attention does, layer by layer."""

import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.core.attention import Attention
from attn_plugins.core.learned_choice import LearnsChoice
from attn_plugins.hf.split import attentions_in, parts_of
from attn_plugins.hf.swap import describe_attention, unwrap
from attn_plugins.training.config import check_training
from attn_plugins.training.processes import start_processes
from attn_plugins.training.resume import last_whole_checkpoint, steps_of
from attn_plugins.training.stop import train
from attn_plugins.transfer.body import heads_that_learn, learning, slots_of
from attn_plugins.transfer.errors import Loss, measure_errors
from attn_plugins.transfer.report import LayerErrors, TransferReport
from attn_plugins.transfer.trainer import NewWeights, TransferTrainer

logger = logging.get_logger("transformers.attn_plugins")

Batches = Iterable[Mapping[str, Any]]

MEASURED = 4
"""How many of the batches are measured where none are held out."""

OURS = {
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batches of the size that you want",
    "bf16": "body_dtype",
    "fp16": "body_dtype",
    "gradient_checkpointing": None,
    "activation_checkpointing": None,
    "fsdp": None,
    "deepspeed": None,
    "eval_strategy": "held_out",
}
"""Fields of TrainingArguments that are set elsewhere, or mean nothing where gradients stay within a layer."""

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def transfer_attention(
    model: Any,
    batches: Batches,
    steps: int = 100,
    *,
    loss: Loss = "output",
    learning_rate: float = 1e-2,
    held_out: Batches | None = None,
    body_dtype: str | None = None,
    output_dir: str | None = None,
    resume: bool = False,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TransferReport:
    """Teach the new weights of a swapped model what its own attention does; in place, in minutes.

    While the model runs as it was before the swap, each slot is shown the queries, keys and values of its layer, and
    gets the gradient of its own error at once. Layers are independent, memory is that of one layer, and a step costs
    about two forward passes. Nothing but the weights in slots changes. (Attention transfer of LoLCATs, Zhang et al.
    2024, arXiv 2410.10254.)

    Texts should be as long as those that the model will read: what sums over far keys learns their number.

    Args:
        model: a transformers model with swapped attention, of text, vision or speech. It runs where it is.
        batches: any iterable of model inputs, each a mapping of tensors, as ``model(**batch)`` takes it; labels are
            left out. They are taken in their order, over and over until ``steps`` are done; of an iterator, as many as
            there are steps. Each process of several takes every n-th.
        steps: updates of the weights.
        loss: output: squared error of a head's outputs over the squared length of the model's own. weights:
            cross-entropy of its weights against the model's own, both N x N. Each is a mean over real queries of a
            row, then over rows and heads. Weights that only choose keys, as ``dsa``'s, learn by the cross-entropy of
            their scores' softmax against the model's own weights, averaged over heads, whatever is said here.
        learning_rate: of AdamW without decay; falls to a tenth as a cosine.
        held_out: batches to measure errors on, before and after; without any, the first four of ``batches``.
        body_dtype: "bfloat16" or "float16" runs the model in it by autocast; slots and losses stay in float32.
        output_dir: where checkpoints of the new weights go, at most one at a time; None writes nothing.
        resume: go on from the last whole checkpoint in ``output_dir``, with the same model, batches and settings.
        seed: of what an attention draws.
        training: more fields of transformers' TrainingArguments: save_steps, logging_steps, report_to, ...
        progress: show a progress bar.

    Returns:
        errors of each layer and head before and after, and what was done.

    Raises:
        ValueError: nothing in the model is swapped or what is has no weights, an argument is wrong, or a module that
            should learn is not called by the model. Nothing has changed then.
    """
    need("accelerate", "train")
    check_settings(steps, learning_rate, body_dtype, training or {})
    inner, slots = checked(model, loss)
    trained = {path: slot for path, slot in slots.items() if next(slot.parameters(), None) is not None}
    without = [path for path in slots if path not in trained]
    if without:
        logger.warning(f"no weights to train in {len(without)} of {len(slots)} slots: {', '.join(without)}")
    dtype = None if body_dtype is None else AUTOCAST[body_dtype]
    arguments, checkpoint = training_arguments(
        inner, steps, learning_rate, output_dir, resume, seed, training or {}, progress
    )
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch; allowed: an iterable of them, such as a list or a DataLoader")
    start_processes()
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, steps * arguments.gradient_accumulation_steps * arguments.world_size))
    measured = list(itertools.islice(batches, MEASURED) if held_out is None else held_out)
    if not measured:
        raise ValueError(f"{'batches' if held_out is None else 'held_out'} holds no batch")
    with learning(inner, trained):
        before = measure_errors(inner, slots, measured, dtype=dtype)
        unseen = [path for path in trained if before[path] is None]
        if unseen:
            raise ValueError(f"the batches do not reach {', '.join(unseen[:3])}, which could learn nothing from them")
        trainer = TransferTrainer(inner, trained, batches, arguments, loss=loss, body_dtype=dtype)
        if not progress:
            trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        state = _trained(trainer, steps, checkpoint)
        seconds = time.perf_counter() - started
        tokens = trainer.accelerator.reduce(torch.as_tensor(trainer.tokens, device=arguments.device), "sum")
        after = measure_errors(inner, slots, measured, dtype=dtype)
    rows = {row.path: row for row in describe_attention(inner)}
    return TransferReport(
        layers=[
            LayerErrors(
                path=path,
                layer=rows[path].layer,
                role=rows[path].role,
                attention=" + ".join("own" if p.attention is None else p.attention.name for p in parts_of(slot)),
                learned=heads_that_learn(slot, len(before[path] or [])),
                before=before[path] or [],
                after=after[path] or [],
            )
            for path, slot in slots.items()
            if before[path] is not None
        ],
        measured_on="the first batches" if held_out is None else "held-out batches",
        loss=loss,
        steps=state.global_step,
        losses=[{"step": entry["step"], "loss": entry["loss"]} for entry in state.log_history if "loss" in entry],
        tokens=int(tokens),
        seconds=round(seconds, 2),
        processes=arguments.world_size,
        resumed_from=checkpoint,
    )


def checked(model: Any, loss: Loss) -> tuple[Any, dict[str, Attention]]:
    """The model itself, whatever is around it, and its slots by path.

    Raises:
        ValueError: there is nothing in it that could learn, or it is one whose slots cannot be trained in place.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss={loss!r}; allowed: {', '.join(get_args(Loss))}")
    inner: Any = unwrap(model)
    if hasattr(getattr(model, "_orig_mod", model), "peft_config"):
        raise ValueError(
            "this model has adapters of PEFT; transfer comes before them: call it on the swapped model, then add "
            "adapters, or merge them first (merge_and_unload)"
        )
    slots = slots_of(inner)
    if not slots:
        raise ValueError("no attention module of this model is swapped; call attn_plugins.swap_attention(model, ...)")
    without = [path for path, slot in slots.items() if next(slot.parameters(), None) is None]
    if len(without) == len(slots):
        names = ", ".join(sorted({one.name for slot in slots.values() for one in attentions_in(slot)}))
        raise ValueError(
            f"nothing could learn: what is in the slots ({names}) has no weights of its own; choose an attention or an "
            "option that has some, such as linear with feature_map: hedgehog"
        )
    choosing = sorted(
        {
            one.name
            for slot in slots.values()
            for one in attentions_in(slot)
            if isinstance(one, LearnsChoice) and one is not slot
        }
    )
    if choosing:
        raise ValueError(
            f"{', '.join(choosing)} learns its choice of keys from all heads of a module, and serves some of them; "
            "allowed: a rule without kv_heads"
        )
    weights = {path: weight for path, slot in slots.items() for weight in slot.parameters()}
    for path, weight in weights.items():
        if weight.is_meta or hasattr(weight, "device_mesh"):
            how = (
                "has no data" if weight.is_meta else "is sharded; leave slots out with fully_shard(ignored_params=...)"
            )
            raise ValueError(f"a weight of the slot of {path} {how}")
    if loss == "weights":
        signed = sorted({one.name for slot in slots.values() for one in attentions_in(slot) if not one.convex})
        if signed:
            raise ValueError(
                f"loss='weights' compares weights that sum to 1, which those of {', '.join(signed)} do not; "
                "allowed here: loss='output'"
            )
    return inner, slots


def check_settings(steps: int, learning_rate: float, body_dtype: str | None, training: Mapping[str, Any]) -> None:
    """Raise a ValueError for a setting that is wrong whatever the model."""
    if steps < 1:
        raise ValueError(f"steps={steps}; allowed: at least 1")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate}; allowed: greater than 0")
    if body_dtype is not None and body_dtype not in AUTOCAST:
        raise ValueError(f"body_dtype={body_dtype!r}; allowed: {', '.join(AUTOCAST)}, or None for what the model is in")
    for name in training:
        if name in OURS:
            instead = f"; use {OURS[name]}" if OURS[name] else ""
            raise ValueError(f"training.{name} is not for a transfer{instead}")
    check_training(dict(training))


def training_arguments(
    model: nn.Module,
    steps: int,
    learning_rate: float,
    output_dir: str | None,
    resume: bool,
    seed: int,
    training: Mapping[str, Any],
    progress: bool,
) -> tuple[TrainingArguments, str | None]:
    """(Trainer's arguments, the checkpoint that the run goes on from).

    Raises:
        ValueError: ``output_dir`` holds a run that is not to be gone on with, or cannot be, or Trainer refuses.
    """
    for name, what in {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(name, "").lower() == "true":
            raise ValueError(
                f"accelerate was asked for {what}, which would shard the new weights; allowed: several processes "
                "without it (a model that needs it: fully_shard(..., ignored_params=...), then transfer_attention)"
            )
    folder, checkpoint = Path(tempfile.gettempdir()), None
    if output_dir is not None:
        folder = check_folder(output_dir)
        checkpoint = last_whole_checkpoint(folder) if resume else None
        if not resume and any(folder.glob("checkpoint-*")):
            raise ValueError(f"{folder} holds an earlier run; go on with it with resume, or name another output_dir")
    elif resume:
        raise ValueError("resume goes with output_dir, where the checkpoints are")
    options: dict[str, Any] = {
        "logging_steps": max(1, steps // 10),
        "report_to": "none",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_grad_norm": 0.0,
        "disable_tqdm": not progress,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no" if output_dir is None else "steps",
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        **training,
    }
    try:
        arguments = TrainingArguments(
            output_dir=str(folder), seed=seed, max_steps=steps, learning_rate=learning_rate, **options
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    if checkpoint is not None:
        begun = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json").max_steps
        if begun != steps:
            raise ValueError(f"{checkpoint} is of a run of {begun} steps, and steps={steps}; name another output_dir")
    return arguments, checkpoint


def _trained(trainer: TransferTrainer, steps: int, checkpoint: str | None) -> TrainerState:
    """Train; where the checkpoint is the end of the run, take its weights alone."""
    if checkpoint is not None and steps_of(checkpoint) == steps:
        from safetensors.torch import load_file

        NewWeights(trainer.slots).load_state_dict(load_file(f"{checkpoint}/model.safetensors"))
        return TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    if trainer.args.save_strategy == "no":  # nothing is to be left
        trainer.train()
    else:
        train(trainer, checkpoint)
    return trainer.state
