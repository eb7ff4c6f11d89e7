import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import ctc_loss
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from attn_plugins.config.extras import need
from attn_plugins.data.sound import seconds, waveform
from attn_plugins.data.text import IGNORED, NoExamplesError
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task
from attn_plugins.tasks.batches import Batches
from attn_plugins.tasks.metrics import compute_metrics
from attn_plugins.tasks.writing import decoded, let_generate

logger = logging.get_logger("transformers.attn_plugins")


@register_task("speech-recognition")
class SpeechRecognition(TrainableTask):
    """Word error rate of what a model writes of recordings: wrong, missing and added words by words of the transcripts.

    For encoder-decoders such as Whisper, which write by ``generate``, and for models that name a letter or none for
    each frame (CTC), such as wav2vec2 and HuBERT, of which the likeliest of each frame counts. Both texts are made
    alike first, as ``normalize`` says. ``loss`` is the mean over the transcripts' tokens.

    Recordings of more than ``max_seconds`` are left out, in training and measuring, and counted, not cut: a
    transcript would go on where its recording ends. In training so are transcripts of more than ``max_target_length``
    tokens.
    """

    metric, better, model, columns = "wer", "lower", "speech-to-text", ("audio", "text")
    pipeline_tag, row, trainer = "automatic-speech-recognition", "recording", "Seq2SeqTrainer"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 8
        """Recordings measured at once."""
        max_seconds: float = 30.0
        """Longer recordings are left out."""
        max_target_length: int = 225
        """Transcripts of more tokens are not trained on, and at most so many are written."""
        language: str | None = None
        """Language of the transcripts, for models of many languages, such as "french"; null where the model knows one,
        or, when it is measured, is to find out."""
        translate: bool = False
        """The transcripts are in English, whatever is spoken, for models that translate."""
        num_beams: int | None = None
        """Beams of the search; null for what the model's generation config says."""
        normalize: Literal["basic", "english", "none"] = "basic"
        """What is done to both texts before words are compared. basic: lower case, no punctuation. english: Whisper's
        normalizer, which also spells numbers, contractions and British words alike. none: nothing."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_seconds > 0, "max_seconds", "greater than 0")
            self.require(self.max_target_length >= 1, "max_target_length", "at least 1")
            self.require(self.num_beams is None or self.num_beams >= 1, "num_beams", "at least 1, or null")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def examples(self, data, processing, model):
        self._fit(processing, model)
        if _knows_languages(model) and self.config.language is None:
            raise ValueError('language=null; allowed for a model of many languages: one to train, such as "french"')
        if not model.config.is_encoder_decoder:
            model.config.ctc_zero_infinity = True  # a transcript of more letters than frames would end the training
        heard = self._heard(data)
        labels = [labels_of(text, processing, model) for text in heard["text"]]
        rows = heard.remove_columns("text").add_column("labels", labels)
        sizes = [len(labels) for labels in rows["labels"]]
        kept = [at for at, size in enumerate(sizes) if size <= self.config.max_target_length]
        if len(kept) < len(rows):
            limit = f"max_target_length={self.config.max_target_length}"
            if not kept:
                raise NoExamplesError(
                    f"{limit}, and all {len(rows)} transcripts have more tokens; allowed: a larger one"
                )
            logger.warning(f"{len(rows) - len(kept)} of {len(rows)} transcripts have more than {limit}: left out")
            rows = rows.select(kept)
        name = model.main_input_name
        rows = rows.rename_column("audio", name)

        def read(part: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {name: [_features(value, processing, name) for value in part[name]], "labels": part["labels"]}

        return rows.with_transform(read)

    def collator(self, processing, model):
        name, start = model.main_input_name, getattr(model.config, "decoder_start_token_id", None)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            inputs = processing.feature_extractor.pad([{name: row[name]} for row in rows], return_tensors="pt")
            labels = [torch.tensor(row["labels"]) for row in rows]
            if start is not None and all(len(one) and one[0] == start for one in labels):
                labels = [one[1:] for one in labels]  # the model puts it there itself
            padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
            return {**inputs, name: inputs[name].to(model.dtype), "labels": padded}

        return collate

    def make_trainer(self, **parts):
        let_generate(parts, self.config.max_target_length, self.config.num_beams)
        return super().make_trainer(**parts)

    def training_metrics(self, processing):
        def compute(predicted: Any) -> dict[str, float]:
            texts = [decoded(processing.tokenizer, ids) for ids in (predicted.predictions, predicted.label_ids)]
            return compute_metrics(["wer"], *(self._alike(its, processing) for its in texts))

        return compute

    def prepare(self, data, processing, model):
        need("jiwer", "audio")
        self._fit(processing, model)
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        rows = self._heard(data)
        if not any(self._alike(rows["text"], processing)):
            raise ValueError(f"the transcripts of {len(rows)} rows to measure have no word")
        collate, name, left_out = self.collator(processing, model), model.main_input_name, len(data) - len(rows)

        def make(part: dict[str, list[Any]]) -> dict[str, Any]:
            rows = [
                {name: _features(value, processing, name), "labels": labels_of(text, processing, model)}
                for value, text in zip(part["audio"], part["text"], strict=True)
            ]
            batch = collate(rows)
            told = {"texts": part["text"], "processing": processing, "left_out": left_out}
            return {"inputs": [key for key in batch if key != "labels"], **batch, **told}

        return Batches(rows, self.config.batch_size, make)

    def score(self, model, batch):
        inputs, labels, processing = {key: batch[key] for key in batch["inputs"]}, batch["labels"], batch["processing"]
        tokens, bare = (labels != IGNORED).sum(), getattr(model, "module", model)
        if bare.config.is_encoder_decoder:
            loss = model(**inputs, labels=labels, use_cache=False).loss.double() * tokens
            ids = bare.generate(**inputs, generation_config=self._generation(bare))
        else:
            loss, ids = _ctc(bare, model(**inputs).logits.float(), labels, inputs.get("attention_mask"))
        said, true = (
            self._alike(decoded(processing.tokenizer, ids), processing),
            self._alike(batch["texts"], processing),
        )
        return {"loss": loss, "tokens": tokens, "written": said, "wanted": true, "left_out": [batch["left_out"]]}

    def finish(self, sums):
        return {
            **compute_metrics(["wer"], sums["written"], sums["wanted"]),
            "loss": float(sums["loss"] / sums["tokens"]),
            "rows": len(sums["written"]),
            "left_out": sums["left_out"][0],
        }

    def _generation(self, model: Any) -> Any:
        """The model's generation config, with what the options say."""
        config = copy.deepcopy(model.generation_config)
        config.do_sample, config.max_length, config.max_new_tokens = False, None, self.config.max_target_length
        config.num_beams = self.config.num_beams or config.num_beams
        return config

    def _alike(self, texts: list[str], processing: Any) -> list[str]:
        """The texts as they are compared."""
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        make: Callable[[str], str] = str
        if self.config.normalize == "basic":
            make = BasicTextNormalizer()
        elif self.config.normalize == "english":
            make = EnglishTextNormalizer(getattr(processing.tokenizer, "english_spelling_normalizer", None) or {})
        return [make(text).strip() for text in texts]

    def _heard(self, data):
        """The rows whose recordings are not too long, with a word to the user on the others."""
        kept = [at for at, value in enumerate(data["audio"]) if seconds(value) <= self.config.max_seconds]
        if not kept:
            raise NoExamplesError(f"all {len(data)} recordings are longer than max_seconds={self.config.max_seconds:g}")
        if len(kept) < len(data):
            longer = f"{len(data) - len(kept)} of {len(data)} recordings are longer than max_seconds"
            logger.warning(f"{longer}={self.config.max_seconds:g}: left out")
        return data.select(kept)

    def _fit(self, processing, model):
        """Have tokenizer and generation write what the options ask for.

        Raises:
            ValueError: the model does not take what they say.
        """
        if not hasattr(processing, "feature_extractor") or not hasattr(processing, "tokenizer"):
            raise ValueError(
                f"the model comes with {type(processing).__name__} alone; speech-recognition needs a feature extractor "
                "and a tokenizer"
            )
        samples = getattr(processing.feature_extractor, "n_samples", None)
        limit = samples and samples / processing.feature_extractor.sampling_rate
        if limit and self.config.max_seconds > limit:
            raise ValueError(f"max_seconds={self.config.max_seconds:g}; allowed: at most {limit:g}, what it hears")
        if not model.config.is_encoder_decoder:
            if len(processing.tokenizer) > model.config.vocab_size:
                raise ValueError(
                    f"the tokenizer has {len(processing.tokenizer)} letters, and the model {model.config.vocab_size}"
                )
            return
        positions = getattr(model.config, "max_target_positions", None)
        if positions and self.config.max_target_length > positions - 4:  # what comes before the first word
            allowed = f"at most {positions - 4}, what the model writes"
            raise ValueError(f"max_target_length={self.config.max_target_length}; allowed: {allowed}")
        many = _knows_languages(model)
        if not many and (self.config.language is not None or self.config.translate):
            got = "translate=true" if self.config.translate else f"language={self.config.language!r}"
            raise ValueError(f"{got} is for models of many languages, and this one knows one")
        if many and self.config.language is not None:
            asked = {"language": self.config.language, "task": "translate" if self.config.translate else "transcribe"}
            processing.tokenizer.set_prefix_tokens(**asked)
            for name, value in {**asked, "forced_decoder_ids": None}.items():
                setattr(model.generation_config, name, value)


def _knows_languages(model: Any) -> bool:
    return getattr(getattr(model, "generation_config", None), "is_multilingual", None) is True


def labels_of(text: str, processing: Any, model: Any) -> list[int]:
    """Tokens of a transcript, with the special ones that the model writes; of CTC models, letters that they know.

    CTC models often know capitals alone, or none: the transcript is spelled as they do.
    """
    tokenizer = processing.tokenizer
    if model.config.is_encoder_decoder:
        return list(tokenizer(text, verbose=False)["input_ids"])
    known = tokenizer.get_vocab()
    if ("A" in known) != ("a" in known):
        text = text.upper() if "A" in known else text.lower()
    return [number for number in tokenizer(text)["input_ids"] if number != tokenizer.unk_token_id]


def _features(value: dict[str, Any], processing: Any, name: str) -> Any:
    """What a model hears of a row's sound."""
    rate = processing.feature_extractor.sampling_rate
    return processing.feature_extractor(waveform(value, rate), sampling_rate=rate)[name][0]


def _ctc(model: Any, logits_BTV: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """Loss, as a sum over all labels, and the likeliest letter of each frame, none where there is padding."""
    batch, frames, _ = logits_BTV.shape
    lengths = torch.full((batch,), frames, device=labels.device)
    if mask is not None:
        lengths = model._get_feat_extract_output_lengths(mask.sum(-1)).long()
    blank, there = model.config.pad_token_id, labels != IGNORED
    loss = ctc_loss(
        logits_BTV.log_softmax(-1).transpose(0, 1),
        labels[there],
        lengths,
        there.sum(-1),
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )
    inside = torch.arange(frames, device=lengths.device) < lengths[:, None]
    return loss, logits_BTV.argmax(-1).where(inside, blank)
