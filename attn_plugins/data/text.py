"""Text for training and measuring: Python's own, and how text becomes blocks of tokens or labelled examples."""

import hashlib
from itertools import chain
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of a token that has no loss."""

PYTHON_DOCS = "python-docs"
"""Built-in source: the help topics that every Python carries, split by topic."""


class NoExamplesError(ValueError):
    """Rows give no example at all, as a few of a stream's may."""


def python_docs() -> "dict[str, Dataset]":
    """Python's own help topics, one row a topic; every tenth by the hash of its name is held out.

    The same Python version gives the same rows; another version has slightly other texts and the same split of topics.
    """
    datasets = need("datasets", "train")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(f"this Python came without pydoc_data, which {PYTHON_DOCS!r} reads; name other data") from None
    held_out = {name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}
    splits = {"train": sorted(set(topics) - held_out), "validation": sorted(held_out)}
    return {
        split: datasets.Dataset.from_dict({"topic": names, "text": [topics[name] for name in names]})
        for split, names in splits.items()
    }


def position_limit(model: Any) -> int | None:
    """Tokens of the longest row that a model has positions for, None for no limit.

    That is its config's ``max_position_embeddings``, and where the config scales rotary positions, as for YaRN, the
    length that it scales them to.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if limit is None or "rope_type" not in rotary:
        return limit  # where layers differ in their positions, the config's own word counts
    pretrained = rotary.get("original_max_position_embeddings") or limit
    return max(limit, int(pretrained * (rotary.get("factor") or 1)))


def check_length(length: int, option: str, tokenizer: Any, model: Any) -> None:
    """Raise a ValueError where rows of so many tokens are more than the model or its tokenizer takes."""
    limits = [position_limit(model), tokenizer.model_max_length]
    limit = min(limit for limit in limits if limit is not None)
    if length > limit:
        raise ValueError(f"{option}={length}; allowed: at most {limit}, what the model takes")


def token_blocks(data: "Dataset", tokenizer: Any, length: int, *, special_tokens: bool = False) -> "Dataset":
    """Rows of exactly ``length`` tokens (column ``input_ids``), cut from the texts laid end to end.

    After each text comes the tokenizer's end-of-sequence token, where it has one: that is all that marks a boundary, a
    block may hold parts of several texts and its tokens see all of them. Texts are laid end to end in groups of 1000,
    and what is left at the end of a group, less than a block, is left out.

    Args:
        special_tokens: each text stands between the special tokens that the tokenizer puts around one, instead.

    Raises:
        NoExamplesError: the texts give less than one block.
    """
    end = [] if special_tokens or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # verbose=False: a text longer than the model's context is what is wanted here, not something to warn of
        options = {"add_special_tokens": special_tokens, "return_attention_mask": False, "verbose": False}
        texts = tokenizer(batch["text"], **options)
        tokens = list(chain.from_iterable([*ids, *end] for ids in texts["input_ids"]))
        whole = len(tokens) // length * length
        return {"input_ids": [tokens[start : start + length] for start in range(0, whole, length)]}

    blocks = data.map(cut, batched=True, batch_size=1000, remove_columns=data.column_names, desc="tokenizing")
    if len(blocks) == 0:
        raise NoExamplesError(
            f"{len(data)} texts give less than one block of {length} tokens; allowed: a smaller length, more text"
        )
    return blocks


def token_documents(data: "Dataset", tokenizer: Any, length: int) -> "Dataset":
    """Rows of at most ``length`` tokens (column ``input_ids``), one a text, cut where it is longer.

    After each text comes the tokenizer's end-of-sequence token, where it has one and there is room. Texts of less than
    two tokens, of which none follows another, are left out.

    Raises:
        NoExamplesError: no text is left.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows = [[*ids, *end][:length] for ids in texts["input_ids"]]
        return {"input_ids": [row for row in rows if len(row) >= 2]}

    rows = data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")
    if len(rows) == 0:
        raise NoExamplesError(f"none of {len(data)} texts has two tokens")
    return rows


def special_blocks(data: "Dataset", tokenizer: Any, length: int) -> "Dataset":
    """Rows of exactly ``length`` tokens (column ``input_ids``), cut from each text on its own.

    Each stands between the special tokens that the tokenizer puts around a text. What is left at the end of a text is
    left out.

    Raises:
        NoExamplesError: the texts give less than one block.
    """

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = tokenizer(batch["text"], truncation=True, max_length=length, return_overflowing_tokens=True)
        return {"input_ids": [ids for ids in rows["input_ids"] if len(ids) == length]}

    blocks = data.map(cut, batched=True, remove_columns=data.column_names, desc="tokenizing")
    if len(blocks) == 0:
        raise NoExamplesError(f"no text gives a block of {length} tokens; allowed: a smaller length, longer texts")
    return blocks


def cut_texts(data: "Dataset", tokenizer: Any, max_length: int) -> "Dataset":
    """One row a text of at most ``max_length`` tokens: ``input_ids`` and what else the tokenizer gives; not padded."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=max_length))

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")


def labelled_examples(data: "Dataset", tokenizer: Any, label2id: dict[str, int], max_length: int) -> "Dataset":
    """Rows of ``input_ids`` (at most ``max_length``), what else the tokenizer gives, and ``labels``; not padded.

    Raises:
        ValueError: a label of the data is none of the model's.
    """
    number = label_numbers(data, label2id)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [batch["text_pair"]] if "text_pair" in batch else []
        rows = tokenizer(batch["text"], *pairs, truncation=True, max_length=max_length)
        return {**rows, "labels": [number[label] for label in batch["label"]]}

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")


def label_names(data: "Dataset") -> list[str]:
    """Names of the classes, in the order of their numbers: the data set's own, else the labels that occur, sorted."""
    feature = data.features["label"]
    if hasattr(feature, "names"):
        return list(feature.names)
    return [str(label) for label in sorted(set(data["label"]))]


def check_classes(data: "Dataset") -> None:
    """Raise a ValueError where rows to train on are all of one class, so that there is nothing to tell apart."""
    found = set(data["label"])
    if len(found) < 2:
        names = getattr(data.features["label"], "names", None)
        only = "".join(f", {names[label] if names else label!r}" for label in found)
        raise ValueError(
            f"the {len(data)} rows to train on are all of one class{only}; allowed: at least two classes (in data that "
            "is sorted by class, the first max_train_rows may be of one)"
        )


def label_numbers(data: "Dataset", label2id: dict[str, int]) -> dict[Any, int]:
    """:func:`class_numbers` of the column ``label``."""
    return class_numbers(set(data["label"]), getattr(data.features["label"], "names", None), label2id)


def class_numbers(labels: set[Any], names: list[str] | None, label2id: dict[str, int]) -> dict[Any, int]:
    """Label as it stands in the data -> the model's number for it: by name, or where it has no such name, by number.

    Args:
        names: of the classes, where labels are their numbers.

    Raises:
        ValueError: a label is none of the model's.
    """
    found = sorted(labels)
    spelled = {label: str(names[label]) if names else str(label) for label in found}
    if all(name in label2id for name in spelled.values()):
        return {label: label2id[name] for label, name in spelled.items()}
    if all(isinstance(label, int) and 0 <= label < len(label2id) for label in found):
        return {label: label for label in found}
    unknown = sorted(set(spelled.values()) - set(label2id))
    known = sorted(label2id, key=lambda name: label2id[name])
    raise ValueError(f"the model has no class for the labels {unknown}; its classes are {known}")
