from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from attn_plugins.data.pictures import pixels, rgb
from attn_plugins.data.text import IGNORED
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task
from attn_plugins.tasks.batches import Batches
from attn_plugins.tasks.metrics import compute_metrics, load_metric
from attn_plugins.tasks.picture_size import sized, vision_part

METRICS = ("chrf", "sacrebleu", "rouge")


@register_task("captioning")
class Captioning(TrainableTask):
    """How near captions that a model writes of pictures come to those of the data, by chrF, BLEU and ROUGE.

    For vision encoder-decoders, BLIP, GIT and their kin, which write from a picture alone. Each writes the tokens that
    its own ``generate`` finds most likely, or with ``num_beams`` the most likely caption of a search. Captions are
    often of few words, of which BLEU has no four in a row to count: chrF stands for the task.
    """

    metric, better, model, columns = "chrf", "higher", "image-to-text", ("image", "text")
    pipeline_tag, row = "image-to-text", "picture"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 8
        """Pictures that captions are written of at once."""
        image_size: int | None = None
        """Height and width that pictures get, in pixels, above or below those that the model was trained on, whose
        positions are then interpolated; null for what its processor says. It is saved with the model."""
        max_length: int = 64
        """Longer captions are cut to so many tokens, and no more are written."""
        num_beams: int = 1
        """Captions that generation keeps beside each other; 1 is greedy."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.image_size is None or self.image_size >= 1, "image_size", "at least 1, or null")
            self.require(self.max_length >= 2, "max_length", "at least 2: a token and the end")
            self.require(self.num_beams >= 1, "num_beams", "at least 1")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def examples(self, data, processing, model):
        _check(processing, model)
        sized(processing, vision_part(model), self.config.image_size, save=True)
        rows = data.rename_columns({"image": "pixel_values", "text": "labels"})

        def batch(part: dict[str, list[Any]]) -> dict[str, Any]:
            pictures = pixels(processing, [rgb(value) for value in part["pixel_values"]])
            return {"pixel_values": pictures, "labels": self._tokens(part["labels"], processing, model)}

        return rows.with_transform(batch)

    def _tokens(self, captions: list[str], processing: Any, model: Any) -> list[list[int]]:
        """Tokens of captions: of those with an encoder without the first, which the model puts before them itself."""
        tokenizer = processing.tokenizer
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        start = [] if model.config.is_encoder_decoder else [model.config.get_text_config().bos_token_id]
        room = self.config.max_length - 1 - len(start)
        ids = tokenizer(captions, add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
        return [[*start, *caption, end] for caption in ids]

    def collator(self, processing, model):
        _, told = sized(processing, vision_part(model), self.config.image_size, save=True)
        filler = processing.tokenizer.pad_token_id

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            captions = [torch.tensor(row["labels"]) for row in rows]
            pictures = torch.stack([row["pixel_values"] for row in rows]).to(model.dtype)
            labels = pad_sequence(captions, batch_first=True, padding_value=IGNORED)
            batch = {"pixel_values": pictures, "labels": labels, **told}
            if not model.config.is_encoder_decoder:
                real = labels != IGNORED
                batch |= {"input_ids": labels.where(real, filler), "attention_mask": real.long()}
            return batch

        return collate

    def prepare(self, data, processing, model):
        for name in METRICS:
            load_metric(name)  # what is not there shows now
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        _check(processing, model)
        processing, told = sized(processing, vision_part(model), self.config.image_size)

        def batch(part: dict[str, list[Any]]) -> dict[str, Any]:
            pictures = pixels(processing, [rgb(value) for value in part["image"]]).to(model.dtype)
            return {"pixel_values": pictures, "told": told, "captions": part["text"], "tokenizer": processing.tokenizer}

        return Batches(data, self.config.batch_size, batch)

    def score(self, model, batch):
        tokens = getattr(model, "module", model).generate(
            pixel_values=batch["pixel_values"],
            max_new_tokens=self.config.max_length - 1,
            num_beams=self.config.num_beams,
            do_sample=False,
            **batch["told"],
        )
        written = batch["tokenizer"].batch_decode(tokens, skip_special_tokens=True)
        return {"written": [text.strip() for text in written], "wanted": [text.strip() for text in batch["captions"]]}

    def finish(self, sums):
        figures = compute_metrics(METRICS, sums["written"], sums["wanted"])
        return {**figures, "rows": len(sums["written"])}


def _check(processing: Any, model: Any) -> None:
    """Raise a ValueError for models whose captions are written otherwise."""
    if getattr(processing, "image_token", None) is not None:
        raise ValueError(
            f"{type(model).__name__} has its pictures among the tokens of a text; allowed: models that write from a "
            "picture alone, such as VisionEncoderDecoderModel, BLIP and GIT"
        )
    if not hasattr(processing, "image_processor") or not hasattr(processing, "tokenizer"):
        raise ValueError(
            f"the model came with a {type(processing).__name__}; allowed: a processor that holds an image processor "
            "and a tokenizer, such as TrOCRProcessor, saved beside the model"
        )
    if model.config.is_encoder_decoder and model.config.decoder_start_token_id is None:
        raise ValueError("the model's config has no decoder_start_token_id, from which a caption starts; set it there")
