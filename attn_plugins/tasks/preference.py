import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from attn_plugins.config.extras import need
from attn_plugins.hf.checkpoints.peft import FIELD
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task


@register_task("preference")
class Preference(TrainableTask):
    """Share of pairs of answers of which a model has come to prefer the chosen one, against its reference.

    The reward of an answer is the log-likelihood, in nats, that the model gives it, less what the reference gives it,
    as in direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). ``reward_accuracy``
    counts pairs whose chosen answer has the higher reward, half where both are equal: 0.5 of a model that is its own
    reference. ``margin`` is the mean difference of the two rewards. ``accuracy`` compares the log-likelihoods alone.

    The reference is the model as it is when the rows are prepared, which is before training, an adapter switched off.
    """

    metric, better, model = "reward_accuracy", "higher", "causal-lm"
    columns = ("prompt", "chosen", "rejected")
    pipeline_tag, row, distils = "text-generation", "pair of answers", False
    defaults: ClassVar[Mapping[str, Any]] = {"bf16": False, "gradient_checkpointing": False}  # TRL's are True

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 4
        """Pairs measured at once, padded to the longest answer of them."""
        max_length: int = 1024
        """Prompts with their answers are cut to so many tokens, and pairs whose prompt alone has as many are left out;
        of pairs to train on, ``training.max_length`` says the same."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""
        reference: str | None = None
        """Another model to measure against, a folder or a name on the hub, of the same tokenizer; null as above."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 2, "max_length", "at least 2")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def arguments(self):
        return need("trl", "preference").DPOConfig

    def make_trainer(self, **parts):
        model, reference = parts["model"], None
        adapters = getattr(model, "peft_config", {})
        # TRL would load a reference by the model's name alone: without its attention, and without what the slots hold.
        if not adapters and not parts["args"].precompute_ref_log_probs:
            reference = copy.deepcopy(model).requires_grad_(False)
        trainer = need("trl", "preference").DPOTrainer(**parts, ref_model=reference)
        if "ref" in adapters and FIELD not in vars(adapters["default"]):
            model.delete_adapter("ref")  # a copy of a new adapter: switched off, the model is what it began from
        return trainer

    def examples(self, data, tokenizer, model):
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-sequence token, which tells where an answer ends")
        return data

    def collator(self, tokenizer, model):
        return None  # the trainer's own

    def prepare(self, data, tokenizer, model):
        data = self.examples(data, tokenizer, model)
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        pairs = [_pair(row, tokenizer, self.config.max_length) for row in data]
        kept = [pair for pair in pairs if pair is not None]
        if not kept:
            raise ValueError(
                f"all {len(pairs)} prompts have max_length={self.config.max_length} tokens or more; allowed: more"
            )
        batches = []
        for start in range(0, len(kept), self.config.batch_size):
            part = kept[start : start + self.config.batch_size]
            batches.append({**_padded(part), "left_out": torch.tensor(0)})
        batches[0]["left_out"] += len(pairs) - len(kept)
        with _reference(model, self.config.reference) as reference:
            device = next(reference.parameters()).device
            for batch in batches:
                moved = {name: value.to(device) for name, value in batch.items()}
                batch["reference"] = _likelihoods(reference, moved).cpu()
        return batches

    def score(self, model, batch):
        found = _likelihoods(model, batch)
        rewards = found - batch["reference"]
        return {
            "reward_right": _right(rewards),
            "margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "right": _right(found),
            "rows": torch.tensor(len(found)),
            "left_out": batch["left_out"],
        }

    def finish(self, sums):
        rows = sums["rows"]
        return {
            "reward_accuracy": float(sums["reward_right"] / rows),
            "margin": float(sums["margin"] / rows),
            "accuracy": float(sums["right"] / rows),
            "rows": int(rows),
            "left_out": int(sums["left_out"]),
        }


def _pair(row: dict[str, str], tokenizer: Any, max_length: int) -> list[tuple[list[int], int]] | None:
    """(tokens of prompt and answer, how many of them are the prompt's) of the chosen answer and of the rejected one, as
    TRL makes them; None where the prompt leaves no room for an answer."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    both = []
    for answer in (row["chosen"], row["rejected"]):
        end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
        both.append(tokenizer(row["prompt"] + answer + end)["input_ids"])
    shared = min(
        sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(prompt, ids, strict=False))) for ids in both
    )
    return None if shared >= max_length else [(ids[:max_length], shared) for ids in both]


def _padded(pairs: list[list[tuple[list[int], int]]]) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``answer`` (whether a token is the answer's), all (2 x pairs, length)."""
    rows = [row for pair in pairs for row in pair]
    ids = [torch.tensor(ids) for ids, _ in rows]
    answer = [torch.arange(len(one)) >= shared for one, (_, shared) in zip(ids, rows, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "answer": pad_sequence(answer, batch_first=True),
    }


def _likelihoods(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihood of each answer, in nats, (pairs, 2), float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    found = []
    for row, ids, answer in zip(logits, batch["input_ids"], batch["answer"], strict=True):  # a float32 copy of one
        losses = cross_entropy(row[:-1].float(), ids[1:], reduction="none")
        found.append(-losses.double()[answer[1:]].sum())
    return torch.stack(found).unflatten(0, (-1, 2))


def _right(values: torch.Tensor) -> torch.Tensor:
    chosen, rejected = values.unbind(1)
    return ((chosen > rejected).double() + (chosen == rejected).double() / 2).sum()


@contextlib.contextmanager
def _reference(model: Any, other: str | None):
    """The model to measure against, in evaluation mode, where the model is, without gradients."""
    device = next(model.parameters()).device
    reference: Any = model if other is None else AutoModelForCausalLM.from_pretrained(other).to(device)
    was_training = reference.training
    off = reference.disable_adapter() if hasattr(reference, "disable_adapter") else contextlib.nullcontext()
    try:
        with off, torch.no_grad():
            yield reference.eval()
    finally:
        reference.train(was_training)
