"""What a model is inspected on: its inputs, and what its tokens are called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_plugins.core.rules import parse_rules
from attn_plugins.data.text import position_limit
from attn_plugins.hf.swap import describe_attention, swap_attention, unwrap


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Inputs of one forward pass, of one row, and what is known of the tokens in it."""

    inputs: dict[str, Any] = field(repr=False)
    tokens: dict[str, list[str]]
    """By what reads them, "encoder" or "decoder": the text of each token."""
    written: list[str] = field(default_factory=list)
    """What an encoder-decoder model writes at each of the decoder's positions: the token after."""

    def queries_of(self, role: str) -> list[str]:
        """Texts of the queries of modules of this role; empty where they are no tokens of text."""
        return self.written if role == "cross" else self.tokens.get(role, [])

    def keys_of(self, role: str) -> list[str]:
        """Texts of the keys."""
        return self.tokens.get("encoder" if role == "cross" else role, [])


def of_text(model: nn.Module, tokenizer: Any, text: str, *, length: int, generate: int) -> Subject:
    """A text, cut to ``length`` tokens and to what the model has positions for, and what it writes of it.

    An encoder-decoder model reads the text and writes up to ``generate`` tokens, greedily; a decoder goes on with the
    text by as many. Anything else reads it.

    Raises:
        ValueError: it has no tokens, or what is no decoder is to write, or more than it has positions for.
    """
    inner: Any = unwrap(model)
    decodes = any(row.role == "decoder" for row in describe_attention(inner))
    if generate and not decodes:
        raise ValueError(f"generate={generate}, and {type(inner).__name__} writes nothing; allowed: 0")
    places, two = position_limit(inner), getattr(inner.config, "is_encoder_decoder", False)
    if places is not None and generate >= places:
        raise ValueError(f"generate={generate}; allowed: at most {places - 1}, as the model has {places} positions")
    most = [length, tokenizer.model_max_length, *([] if places is None else [places if two else places - generate])]
    inputs = dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=min(most)))
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the text has no tokens; allowed: at least one")
    place = next(inner.parameters()).device
    inputs = {name: x.to(place) for name, x in inputs.items()}
    if two:
        return written_by(inner, tokenizer, inputs, generate, encoder=labels(tokenizer, inputs["input_ids"][0]))
    if generate:
        inputs.pop("token_type_ids", None)
        ids = _generate(inner, inputs, generate)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Subject(
        inputs=inputs, tokens={"decoder" if decodes else "encoder": labels(tokenizer, inputs["input_ids"][0])}
    )


def written_by(
    model: Any, tokenizer: Any, inputs: dict[str, Any], generate: int, *, encoder: Sequence[str] = ()
) -> Subject:
    """What an encoder-decoder model reads, and the decoder's inputs as it writes of it, greedily.

    Args:
        encoder: texts of what the encoder reads, where these are tokens.

    Raises:
        ValueError: it is to write nothing.
    """
    if generate < 1:
        raise ValueError(
            f"generate={generate}, and {type(model).__name__} is inspected as it writes; allowed: 1 or more"
        )
    ids = _generate(model, inputs, generate)
    start = model.generation_config.decoder_start_token_id
    if start is not None and int(ids[0, 0]) != start:  # Whisper gives what it wrote without what it begins with
        begun = _generate(model, inputs, 1, return_dict_in_generate=True)["sequences"][:, :-1]
        ids = torch.cat([begun, ids], dim=1)
    texts = labels(tokenizer, ids[0])
    return Subject(
        inputs={**inputs, "decoder_input_ids": ids[:, :-1]},
        tokens={"decoder": texts[:-1]} | ({"encoder": list(encoder)} if encoder else {}),
        written=texts[1:],
    )


def _generate(model: Any, inputs: dict[str, Any], number: int, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=number, do_sample=False, num_beams=1, **options)


def labels(tokenizer: Any, ids: Any) -> list[str]:
    """Each token as text."""
    return [tokenizer.decode([number]) for number in (ids.tolist() if hasattr(ids, "tolist") else ids)]


def with_own_attention_in_slots(model: nn.Module) -> list[str]:
    """Put softmax attention, which computes what the model's own does, into the modules without a slot.

    Returns:
        paths of these modules.
    """
    inner = unwrap(model)
    rows = [row for row in describe_attention(inner) if row.kv_heads is None and row.plugin is None]
    if rows:
        flag = inner.config.attn_plugin
        present = [] if flag is None else [rule.to_dict() for rule in parse_rules(flag)]
        roles = sorted({row.role for row in rows})
        paths = [row.path for row in rows]
        swap_attention(inner, [*present, {"type": "softmax", "roles": roles, "modules": paths}])
    return [row.path for row in rows]


def positions_of(query: str, tokens: Sequence[str]) -> list[int]:
    """What ``--query`` names among tokens: "last", a position such as 12 or -2, or each place of a text.

    Returns:
        positions from 0; of a text that spans tokens the last of these, wherever it stands. Empty where it stands
        nowhere.
    """
    if query == "last":
        return [len(tokens) - 1]
    if re.fullmatch(r"-?\d+", query):
        return [int(query) % len(tokens)] if -len(tokens) <= int(query) < len(tokens) else []
    ends, end = [], 0
    for token in tokens:
        end += len(token)
        ends.append(end)
    whole = "".join(tokens)
    word = rf"(?<!\w){re.escape(query)}(?!\w)"
    found = [next(n for n, end in enumerate(ends) if end >= match.end()) for match in re.finditer(word, whole)]
    if not found:  # tokenizers that drop the spaces between words
        found = [n for n, token in enumerate(tokens) if token.strip() == query]
    return sorted(set(found))
