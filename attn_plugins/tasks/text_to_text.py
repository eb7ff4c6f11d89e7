"""What translation and summarization share: a source text in, a target text out, written by generate()."""

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer

from attn_plugins.data.pairs import CUT, SOURCE, decoder_examples, encoder_examples
from attn_plugins.data.text import IGNORED
from attn_plugins.tasks import TaskConfig
from attn_plugins.tasks.languages import set_languages
from attn_plugins.tasks.metrics import compute_metrics, load_metric
from attn_plugins.tasks.writing import decoded, let_generate


@dataclass(frozen=True, kw_only=True)
class TextToTextConfig(TaskConfig):
    """Options of translation and of summarization."""

    batch_size: int = 8
    """Rows measured at once, padded to the longest of them."""
    max_source_length: int = 512
    """Longer sources are cut at their end to so many tokens, the prompt's and special ones counted."""
    max_target_length: int = 128
    """Longer targets are cut to so many tokens, and at most so many are written."""
    num_beams: int | None = None
    """Beams of the search; null for what the model's generation config says."""
    prompt: str | None = None
    """What a model reads: {source} stands for the text, {source_lang} and {target_lang} for the languages. null:
    the text alone for encoder-decoders, else the task's own."""
    source_lang: str | None = None
    """Language of the sources, as the tokenizer of a model of many languages calls it: en_XX, eng_Latn, en."""
    target_lang: str | None = None
    """Language of the targets."""
    leave_out_longer: bool = False
    """Rows to train on that are longer than a limit are left out, not cut: cut apart, source and target say different
    things."""
    lengths: list[int] | None = None
    """``by_length`` has the task's figure for rows by the words of their sources: up to the first of these numbers, to
    the next, ..., and beyond the last; null for none."""
    metrics: list[str] = field(default_factory=list)
    """More metrics: sacrebleu, chrf, rouge, or others that ``evaluate`` knows."""
    max_rows: int | None = None
    """Measure only the first so many rows; null for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.max_source_length >= 1, "max_source_length", "at least 1")
        self.require(self.max_target_length >= 2, "max_target_length", "at least 2: a token and the end")
        self.require(self.num_beams is None or self.num_beams >= 1, "num_beams", "at least 1, or null")
        self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")
        edges = [1] if self.lengths is None else self.lengths
        rising = bool(edges) and sorted({*edges}) == edges and edges[0] >= 1
        self.require(rising, "lengths", "numbers of words from 1 on, each more than the one before, or null")
        once = self.prompt is None or self.prompt.count(SOURCE) == 1
        self.require(once, "prompt", f"a text with {SOURCE} in it, once, or null")


class TextToText:
    """What such a task is beside a TrainableTask: texts that a model writes from others.

    For encoder-decoders, and for decoder-only models by a prompt. Trained on the loss of the targets' tokens alone.
    Measured by what ``generate`` writes with the model's cache, beside the targets as the rows have them, uncut;
    ``loss`` is the mean over the targets' tokens, and ``sources_cut`` and ``targets_cut`` are how many rows were longer
    than the limits.
    """

    better, model = "higher", "text-to-text"
    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    row, trainer = "pair of texts", "Seq2SeqTrainer"
    metrics: ClassVar[tuple[str, ...]]
    """Metrics that are always computed, as ``load_metric`` takes them."""
    config: Any

    Config: ClassVar[type[TaskConfig]] = TextToTextConfig

    @abc.abstractmethod
    def asks(self) -> str:
        """The prompt of decoder-only models, unless the options have one."""

    def examples(self, data, tokenizer, model):
        rows = self._encoded(data, tokenizer, model)
        if self.config.leave_out_longer:
            rows = rows.filter(lambda cut, also: not (cut or also), input_columns=list(CUT), desc="leaving out")
            if len(rows) == 0:
                raise ValueError(
                    f"leave_out_longer: every row is longer than max_source_length={self.config.max_source_length} or "
                    f"max_target_length={self.config.max_target_length} tokens; allowed: larger limits"
                )
        return rows.remove_columns(list(CUT))

    def limits(self):
        return {"input_ids": "max_source_length", "labels": "max_target_length"}

    def lengths(self, rows):
        if self.config.leave_out_longer:
            return {}  # none has been cut
        given = [labels.count(IGNORED) for labels in rows["labels"]]  # of a decoder's row, in which the target follows
        return {
            "max_source_length": [number or len(ids) for number, ids in zip(given, rows["input_ids"], strict=True)],
            "max_target_length": [len(labels) - number for number, labels in zip(given, rows["labels"], strict=True)],
        }

    def _encoded(self, data, tokenizer, model):
        self._check_lengths(model.config)
        encoder = model.config.is_encoder_decoder
        prompt = self.config.prompt or (SOURCE if encoder else self.asks())
        prompt = set_languages(
            tokenizer, model, prompt, source_lang=self.config.source_lang, target_lang=self.config.target_lang
        )
        limits = {name: getattr(self.config, name) for name in ("max_source_length", "max_target_length")}
        return (encoder_examples if encoder else decoder_examples)(data, tokenizer, prompt=prompt, **limits)

    def _check_lengths(self, config):
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        source, target = self.config.max_source_length, self.config.max_target_length
        asked = {"max_source_length": source, "max_target_length": target}
        if not config.is_encoder_decoder:
            asked = {"max_source_length + max_target_length": source + target}
        for option, length in asked.items():
            if length > limit:
                raise ValueError(f"{option}={length}; allowed: at most {limit}, the model's max_position_embeddings")

    def collator(self, tokenizer, model):
        if model.config.is_encoder_decoder:
            return DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)

        def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
            return {name: _padded([row[name] for row in rows], fill) for name, fill in fills.items()}

        return collate

    def make_trainer(self, **parts):
        let_generate(parts, self.config.max_target_length + 1, self.config.num_beams)  # and the start token
        return Seq2SeqTrainer(**parts)

    def training_metrics(self, tokenizer):
        def compute(predicted: Any) -> dict[str, float]:
            written, wanted = (decoded(tokenizer, ids) for ids in (predicted.predictions, predicted.label_ids))
            return compute_metrics(self._metrics(), written, wanted)

        return compute

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys([*self.metrics, *self.config.metrics]))

    def prepare(self, data, tokenizer, model):
        for name in self._metrics():
            load_metric(name)  # what is not there shows now
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        rows, collate = self._encoded(data, tokenizer, model), self.collator(tokenizer, model)
        batches = []
        for start in range(0, len(rows), self.config.batch_size):
            part = list(rows.select(range(start, min(start + self.config.batch_size, len(rows)))))
            texts = data[start : start + len(part)]
            targets, words = texts["target"], [len(text.split()) for text in texts["source"]]
            cut = {name: torch.tensor(sum(row.pop(name) for row in part)) for name in CUT}
            batch = {**collate(part), **cut, "targets": targets, "words": words, "tokenizer": tokenizer}
            prompt, mask, ends = batch["input_ids"], batch["attention_mask"], {}
            if not model.config.is_encoder_decoder:
                ids = [row["input_ids"][: row["labels"].count(IGNORED)] for row in part]
                prompt = _padded(ids, tokenizer.pad_token_id, left=True)
                mask = _padded([[1] * len(row) for row in ids], 0, left=True)
                ends = {"eos_token_id": tokenizer.eos_token_id}
            given = 1 if model.config.is_encoder_decoder else prompt.shape[1]
            batches.append({**batch, "prompt": prompt, "prompt_mask": mask, "given": given, "ends": ends})
        return batches

    def score(self, model, batch):
        given = batch["given"]  # tokens that come before the first that is written
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs, use_cache=False).loss
        tokens = (batch["labels"] != IGNORED).sum()
        written = getattr(model, "module", model).generate(
            input_ids=batch["prompt"],
            attention_mask=batch["prompt_mask"],
            max_length=given + self.config.max_target_length,
            pad_token_id=batch["tokenizer"].pad_token_id,
            do_sample=False,
            **batch["ends"],
            **({} if self.config.num_beams is None else {"num_beams": self.config.num_beams}),
        )
        return {
            "loss": loss.double() * tokens,
            "tokens": tokens,
            **{name: batch[name] for name in CUT},
            "written": decoded(batch["tokenizer"], written[:, given:]),
            "wanted": [text.strip() for text in batch["targets"]],
            "words": batch["words"],
        }

    def finish(self, sums):
        return {
            **compute_metrics(self._metrics(), sums["written"], sums["wanted"]),
            "loss": float(sums["loss"] / sums["tokens"]),
            "rows": len(sums["written"]),
            **{name: int(sums[name]) for name in CUT},
            **({} if self.config.lengths is None else {"by_length": self._by_length(self.config.lengths, sums)}),
        }

    def _by_length(self, lengths: list[int], sums: dict[str, Any]) -> list[dict[str, Any]]:
        """Figure and number of rows by the words of a source, such as "11-20", or "41-" for all longer ones."""
        found = []
        for first, last in zip([0, *lengths], [*lengths, None], strict=True):
            chosen = [n for n, words in enumerate(sums["words"]) if words > first and (last is None or words <= last)]
            if chosen:
                written, wanted = ([sums[name][n] for n in chosen] for name in ("written", "wanted"))
                figures = compute_metrics([self._metrics()[0]], written, wanted)
                found.append({"length": f"{first + 1}-{'' if last is None else last}", **figures, "rows": len(chosen)})
        return found


def _padded(rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill, padding_side=side)
