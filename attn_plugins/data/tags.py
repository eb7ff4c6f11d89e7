"""Rows of words, each with its class: what columns have to hold of them, and how they become labelled tokens."""

from typing import TYPE_CHECKING, Any

from attn_plugins.data.text import IGNORED, class_numbers

if TYPE_CHECKING:
    from datasets import Dataset

STRINGS = ("string", "large_string", "string_view")


def check_words(data: "Dataset", role: str, what: str) -> None:
    """Raise a ValueError where rows are no lists of strings."""
    _check_lists(data, role, what, STRINGS, "a list of words a row, as strings")


def check_tags(data: "Dataset", role: str, what: str) -> None:
    """Raise a ValueError where rows are no lists of classes, as many as the row has words."""
    allowed = "a list of classes a row, one for each word, as strings or whole numbers"
    of = _check_lists(data, role, what, (*STRINGS, "int8", "int16", "int32", "int64", "uint8", "uint16"), allowed)
    names = getattr(of, "names", None)
    for number, row in enumerate(data.select_columns([role, *({"words"} & set(data.column_names))]), 1):
        if "words" in row and len(row["words"]) != len(row[role]):
            raise ValueError(
                f"{what} has {len(row[role])} classes in row {number} of {len(data)}, which has {len(row['words'])} "
                "words; allowed: one for each word"
            )
        outside = [] if names is None else [tag for tag in row[role] if not 0 <= tag < len(names)]
        if names is not None and outside:
            raise ValueError(
                f"{what} has {outside[0]} in row {number} of {len(data)}, and its classes are 0 to {len(names) - 1}"
            )


def tag_names(data: "Dataset") -> list[str]:
    """Names of the classes, in the order of their numbers: the data set's own, else those that occur, sorted.

    Raises:
        ValueError: all words to train on are of one class.
    """
    found = {tag for row in data["tags"] for tag in row}
    names = getattr(data.features["tags"].feature, "names", None)
    if len(found) < 2:
        only = "".join(f", {names[tag] if names else tag!r}" for tag in found)
        raise ValueError(
            f"the words of {len(data)} rows to train on are all of one class{only}; allowed: at least two classes"
        )
    return [str(name) for name in names] if names is not None else [str(tag) for tag in sorted(found)]


def tagged_examples(data: "Dataset", tokenizer: Any, label2id: dict[str, int], max_length: int) -> "Dataset":
    """Rows of ``input_ids`` (at most ``max_length``), what else the tokenizer gives, and ``labels``; not padded.

    Words are laid into a text with a space between, so that each becomes the tokens that it is in running text,
    whatever the tokenizer. Its class stands at the first of them, and -100 at all other tokens.

    Raises:
        ValueError: a class of the data is none of the model's, or the tokenizer does not tell where its tokens stood.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where tokens stood; allowed: a fast tokenizer")
    tags = {tag for row in data["tags"] for tag in row}
    number = class_numbers(tags, getattr(data.features["tags"].feature, "names", None), label2id)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = tokenizer([" ".join(words) for words in batch["words"]], truncation=True, max_length=max_length)
        labels = [[IGNORED] * len(ids) for ids in rows["input_ids"]]
        for row, (words, tags) in enumerate(zip(batch["words"], batch["tags"], strict=True)):
            start = 0
            for word, tag in zip(words, tags, strict=True):
                token = rows.char_to_token(row, start) if word else None
                if token is not None:
                    labels[row][token] = number[tag]
                start += len(word) + 1
        return {**rows, "labels": labels}

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")


def _check_lists(data: "Dataset", role: str, what: str, kinds: tuple[str, ...], allowed: str) -> Any:
    """The feature of what the lists hold; ValueError where it is of another kind, or a row or part of one is null."""
    feature = data.features[role]
    of = getattr(feature, "feature", None)
    kind = getattr(of if of is not None else feature, "dtype", type(feature).__name__)
    if of is None or kind not in kinds:
        raise ValueError(f"{what} holds {kind if of is None else f'lists of {kind}'}; allowed: {allowed}")
    nulls = [number for number, row in enumerate(data[role], 1) if row is None or any(one is None for one in row)]
    if nulls:
        raise ValueError(
            f"{what} is null, or has a null, in {len(nulls)} of {len(data)} rows, the first of them row {nulls[0]}; "
            "fill them, or leave these rows out"
        )
    return of
