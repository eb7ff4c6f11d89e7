"""Source and target texts as examples: apart for encoder-decoders, one after the other for decoder-only models."""

from typing import TYPE_CHECKING, Any

from attn_plugins.data.text import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "{source}"
"""What stands for the source text in a prompt."""
CUT = ("sources_cut", "targets_cut")
"""Columns that say whether a row's text was cut."""


def encoder_examples(
    data: "Dataset", tokenizer: Any, *, prompt: str, max_source_length: int, max_target_length: int
) -> "Dataset":
    """Rows of ``input_ids``, ``attention_mask`` and ``labels``, not padded, and CUT.

    A text of more tokens than its limit, special ones counted, is cut at its end.

    Raises:
        ValueError: the prompt does not end with SOURCE, so that more would be lost of a text that is cut.
    """
    if not prompt.endswith(SOURCE):
        raise ValueError(f"prompt={prompt!r}; allowed for a model with an encoder: a text that ends with {SOURCE}")

    def tokens(kind: str, texts: list[str], limit: int) -> tuple[list[list[int]], list[bool]]:
        rows = tokenizer(**{kind: texts}, verbose=False)["input_ids"]
        cut = [len(ids) > limit for ids in rows]
        for number in [number for number, long in enumerate(cut) if long]:
            rows[number] = tokenizer(**{kind: texts[number]}, truncation=True, max_length=limit)["input_ids"]
        return rows, cut

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        sources = [prompt.replace(SOURCE, text) for text in batch["source"]]
        given, source_cut = tokens("text", sources, max_source_length)
        wanted, target_cut = tokens("text_target", batch["target"], max_target_length)
        mask = [[1] * len(ids) for ids in given]
        cut = {"sources_cut": source_cut, "targets_cut": target_cut}
        return {"input_ids": given, "attention_mask": mask, "labels": wanted, **cut}

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")


def decoder_examples(
    data: "Dataset", tokenizer: Any, *, prompt: str, max_source_length: int, max_target_length: int
) -> "Dataset":
    """As :func:`encoder_examples`, each of the prompt with the source in it, the target and the end token; ``labels``
    are IGNORED up to the target.

    A source is cut at its end so that prompt and source are ``max_source_length`` tokens, a target so that it and the
    end token are ``max_target_length``.

    Raises:
        ValueError: nothing follows SOURCE in the prompt, to tell where the target begins; the prompt alone is longer
            than ``max_source_length``; or the tokenizer has no end token.
    """
    before, _, after = prompt.partition(SOURCE)
    end = tokenizer.eos_token_id
    if not after:
        raise ValueError(
            f"prompt={prompt!r}; allowed for a model without an encoder: one with text after {SOURCE} too, which tells "
            "it where to go on"
        )
    if end is None:
        raise ValueError("the tokenizer has no end token, by which a model without an encoder ends what it writes")
    tail = tokenizer(after, add_special_tokens=False)["input_ids"]
    room = max_source_length - len(tail)
    least = len(_opening(tokenizer, [before])[0]) + len(tail) + 1
    if max_source_length < least:
        raise ValueError(f"max_source_length={max_source_length}; allowed: at least {least}, more than the prompt")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        sources = _opening(tokenizer, [before + text for text in batch["source"]])
        targets = tokenizer(batch["target"], add_special_tokens=False, verbose=False)["input_ids"]
        rows = [
            ([*source[:room], *tail], [*target[: max_target_length - 1], end])
            for source, target in zip(sources, targets, strict=True)
        ]
        return {
            "input_ids": [[*given, *wanted] for given, wanted in rows],
            "attention_mask": [[1] * (len(given) + len(wanted)) for given, wanted in rows],
            "labels": [[*[IGNORED] * len(given), *wanted] for given, wanted in rows],
            "sources_cut": [len(source) > room for source in sources],
            "targets_cut": [len(target) >= max_target_length for target in targets],
        }

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")


def _opening(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that go on: as the tokenizer begins a text, without the end that some of them give it."""
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in rows]
