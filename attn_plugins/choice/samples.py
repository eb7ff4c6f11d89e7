"""What a model is run on to score its heads: rows made of a user's text, or inputs that the user has made."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from attn_plugins.choice.places import Place
from attn_plugins.data.recall import RecallRow, recall_rows

ENCODED_TEXTS = 8
"""Texts of a batch, where an encoder is scored."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Inputs of one forward pass."""

    inputs: Mapping[str, Any]
    answers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """As in :class:`~attn_plugins.data.recall.RecallRow`; empty where nothing is recalled."""

    @classmethod
    def of(cls, given: Any) -> "Sample":
        """A row, or inputs of a model.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(given, RecallRow):
            return cls(inputs={"input_ids": given.input_ids_N[None]}, answers=given.answers)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"texts holds a {type(given).__name__} and there is no tokenizer; allowed then: inputs of the model, "
                "such as {'pixel_values': images}, and rows of attn_plugins.data.recall"
            )
        return cls(inputs=dict(given))

    def to(self, device: torch.device) -> "Sample":
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs)

    def predicted_by(self, *parts: str) -> list[int]:
        """Queries whose outputs predict the tokens of these parts; of everything that is recalled without any."""
        spans = [
            span for name, span in self.answers.items() if (name.split(" ")[0] in parts if parts else name != "text")
        ]
        return [token - 1 for start, stop in spans for token in range(start, stop)]


def samples_of(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Iterable[Any],
    places: Sequence[Place],
    *,
    length: int,
    rows: int,
    seed: int,
) -> list[Sample]:
    """Samples for these modules of a model.

    Rows of :func:`~attn_plugins.data.recall.recall_rows` for a decoder, batches of whole texts, cut to ``length``
    tokens, for an encoder; without a tokenizer ``texts`` as they are, all of them.

    Raises:
        ValueError: the texts are none, or too short, or the model takes more than text.
    """
    device = next(model.parameters()).device
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("texts is empty; allowed: at least one")
    if tokenizer is None:
        return [Sample.of(one).to(device) for one in texts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("texts holds other things than strings; allowed beside a tokenizer: strings")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} takes two sequences; allowed: tokenizer=None, and for texts its inputs, such as "
            "{'input_ids': ..., 'decoder_input_ids': ...}"
        )
    if all(place.target.role == "decoder" for place in places):
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = min(length, longest) if isinstance(longest, int) and longest > 0 else length
        documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        made = recall_rows(documents, tokenizer, length=length, count=rows, seed=seed)
        return [Sample.of(row).to(device) for row in made]
    chosen = texts[: rows * ENCODED_TEXTS]
    batches = [chosen[start : start + ENCODED_TEXTS] for start in range(0, len(chosen), ENCODED_TEXTS)]
    longest = min(length, tokenizer.model_max_length)
    how = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return [Sample(inputs=dict(tokenizer(batch, **how))).to(device) for batch in batches]
