"""Text for training and measuring: where it comes from, and how it becomes blocks of tokens or labelled examples.

Every source ends as two ``datasets.Dataset`` (train, held-out) with the columns ``text`` and, where they were named,
``text_pair`` and ``label``.
"""

import glob
import hashlib
import textwrap
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need

if TYPE_CHECKING:
    from datasets import Dataset

PYTHON_DOCS = "python-docs"
"""Built-in source: the help topics that every Python carries, split by topic."""

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""Suffix of a local file -> loader of ``datasets``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and which of it is held out for evaluation."""

    source: str | list[str]
    """python-docs, a data set on the hub, a local folder, or local files (globs too) that are all of one kind."""
    name: str | None = None
    """Configuration of a data set on the hub, such as "wikitext-2-raw-v1"."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "validation"
    """Held-out split. Where the source has none of that name, ``eval_fraction`` of the training split is held out."""
    eval_source: str | list[str] | None = None
    """Local files to evaluate on, where they are not splits of ``source``."""
    eval_fraction: float = 0.1
    """Share of the rows that is held out where there is no held-out split; chosen with a fixed seed."""
    text_column: str = "text"
    """Column of the text."""
    text_pair_column: str | None = None
    """Column of a second text, for classification of pairs."""
    label_column: str = "label"
    """Column of the class, for classification."""
    max_train_rows: int | None = None
    """Use only the first so many rows for training."""
    max_eval_rows: int | None = None
    """Use only the first so many rows for evaluation."""

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}; allowed: between 0 and 1")
        for name in ("max_train_rows", "max_eval_rows"):
            rows = getattr(self, name)
            if rows is not None and rows < 1:
                raise ValueError(f"{name}={rows}; allowed: at least 1, or null")
        if not self.source:
            raise ValueError(f"source={self.source!r}; allowed: {PYTHON_DOCS!r}, a data set on the hub, or local files")


def load_data(config: DataConfig, *, labelled: bool = False) -> "tuple[Dataset, Dataset]":
    """The training and the held-out rows.

    Args:
        labelled: a label is needed.

    Returns:
        (train, held-out), both with the columns ``text``, ``text_pair`` where asked for, ``label`` where ``labelled``.

    Raises:
        ValueError: the source, a split or a column does not exist; the message says what there is.
    """
    splits = _splits(config)
    if config.train_split not in splits:
        raise ValueError(f"{_spelled(config.source)} has no split {config.train_split!r}; it has: {', '.join(splits)}")
    train = splits[config.train_split]
    if config.eval_source is not None:
        held_out = _files(_paths(config.eval_source) or [], config.eval_source)
    elif config.eval_split in splits and config.eval_split != config.train_split:
        held_out = splits[config.eval_split]
    elif len(train) < 2:
        raise ValueError(
            f"{_spelled(config.source)} has no split {config.eval_split!r} and only {len(train)} row, "
            "so nothing can be held out; name an eval_source"
        )
    else:
        parts = train.train_test_split(test_size=config.eval_fraction, seed=0)
        train, held_out = parts["train"], parts["test"]
    rows = []
    other = config.source if config.eval_source is None else config.eval_source
    for split, limit, source in (
        (train, config.max_train_rows, config.source),
        (held_out, config.max_eval_rows, other),
    ):
        limited = split if limit is None else split.select(range(min(limit, len(split))))
        rows.append(_columns(limited, config, source, labelled))
    return rows[0], rows[1]


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


def token_blocks(data: "Dataset", tokenizer: Any, length: int) -> "Dataset":
    """Rows of exactly ``length`` tokens (column ``input_ids``), cut from the texts laid end to end.

    After each text comes the tokenizer's end-of-sequence token, where it has one: that is all that marks a boundary, a
    block may hold parts of several texts and its tokens see all of them. Texts are laid end to end in groups of 1000,
    and what is left at the end of a group, less than a block, is left out.

    Raises:
        ValueError: the texts give less than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # verbose=False: a text longer than the model's context is what is wanted here, not something to warn of
        texts = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = list(chain.from_iterable([*ids, *end] for ids in texts["input_ids"]))
        whole = len(tokens) // length * length
        return {"input_ids": [tokens[start : start + length] for start in range(0, whole, length)]}

    blocks = data.map(cut, batched=True, batch_size=1000, remove_columns=data.column_names, desc="tokenizing")
    if len(blocks) == 0:
        raise ValueError(
            f"{len(data)} texts give less than one block of {length} tokens; allowed: a smaller length, more text"
        )
    return blocks


def special_blocks(data: "Dataset", tokenizer: Any, length: int) -> "Dataset":
    """Rows of exactly ``length`` tokens (column ``input_ids``), cut from each text on its own.

    Each stands between the special tokens that the tokenizer puts around a text. What is left at the end of a text is
    left out.

    Raises:
        ValueError: the texts give less than one block.
    """

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = tokenizer(batch["text"], truncation=True, max_length=length, return_overflowing_tokens=True)
        return {"input_ids": [ids for ids in rows["input_ids"] if len(ids) == length]}

    blocks = data.map(cut, batched=True, remove_columns=data.column_names, desc="tokenizing")
    if len(blocks) == 0:
        raise ValueError(f"no text gives a block of {length} tokens; allowed: a smaller length, longer texts")
    return blocks


def labelled_examples(data: "Dataset", tokenizer: Any, label2id: dict[str, int], max_length: int) -> "Dataset":
    """Rows of ``input_ids`` (at most ``max_length``), what else the tokenizer gives, and ``labels``; not padded.

    Raises:
        ValueError: a label of the data is none of the model's.
    """
    number = _label_numbers(data, label2id)

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


def _label_numbers(data: "Dataset", label2id: dict[str, int]) -> dict[Any, int]:
    """Label as it stands in the data -> the model's number for it: by name, or where it has no such name, by number."""
    found = sorted(set(data["label"]))
    names = getattr(data.features["label"], "names", None)
    spelled = {label: str(names[label]) if names else str(label) for label in found}
    if all(name in label2id for name in spelled.values()):
        return {label: label2id[name] for label, name in spelled.items()}
    if all(isinstance(label, int) and 0 <= label < len(label2id) for label in found):
        return {label: label for label in found}
    unknown = sorted(set(spelled.values()) - set(label2id))
    known = sorted(label2id, key=lambda name: label2id[name])
    raise ValueError(f"the model has no class for the labels {unknown}; its classes are {known}")


def _splits(config: DataConfig) -> "dict[str, Dataset]":
    if config.source == PYTHON_DOCS:
        return python_docs()
    paths = _paths(config.source)
    if paths is None:
        return _hub(config)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _folder(paths[0], config)
    return {config.train_split: _files(paths, config.source)}


def _paths(source: str | list[str]) -> list[str] | None:
    """Local files or one folder, or None where ``source`` can only be a data set on the hub.

    Raises:
        ValueError: it looks like a local file, and nothing is there.
    """
    found: list[str] = []
    for pattern in [source] if isinstance(source, str) else source:
        path = Path(pattern).expanduser()
        matches = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        looks_local = isinstance(source, list) or path.is_absolute() or pattern.startswith((".", "~"))
        if not matches and (looks_local or path.suffix in READERS or glob.has_magic(pattern) or pattern.count("/") > 1):
            raise ValueError(f"no such file or folder: {pattern}")
        found += matches
    return found or None


def _files(paths: list[str], source: str | list[str]) -> "Dataset":
    suffixes = sorted({Path(path).suffix for path in paths})
    if len(suffixes) != 1 or suffixes[0] not in READERS:
        raise ValueError(
            f"{_spelled(source)} has suffixes {suffixes}; allowed: files of one kind of {', '.join(READERS)}"
        )
    for path in paths:
        check_file(Path(path))
    reader = READERS[suffixes[0]]
    # A text file is one document; by default datasets would make each of its lines one.
    options = {"sample_by": "document"} if reader == "text" else {}
    datasets = need("datasets", "train")
    try:
        return datasets.load_dataset(reader, data_files={"train": paths}, split="train", **options)
    except Exception as error:  # the loaders raise many kinds; each means that a file is not what its suffix says
        reason = textwrap.shorten(str(error.__cause__ or error), 400, placeholder=" ...") or type(error).__name__
        raise ValueError(f"cannot read {_spelled(source)} as {suffixes[0]}: {reason}") from error


def check_file(path: Path) -> None:
    """Raise a ValueError for a file that the loaders read wrong without a word, or that ends their process.

    JSON that is not UTF-8 comes back with letters exchanged, and pyarrow crashes on JSON that holds null alone.
    """
    if READERS.get(path.suffix) in (None, "parquet"):
        return
    try:
        size = path.stat().st_size
        with path.open(encoding="utf-8", newline="") as lines:
            first = ""
            for number, line in enumerate(lines, 1):
                first = first or line.strip()
                alone = path.suffix == ".jsonl" or first.endswith("}") or first.startswith("null")
                if READERS[path.suffix] == "json" and alone and line.split() and set(line.split()) == {"null"}:
                    raise ValueError(f'{path}, line {number} is null; allowed: objects such as {{"text": ...}}')
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{byte:02x}; convert it, such as by iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if size == 0 and path.suffix not in (".txt", ".md"):
        raise ValueError(f"{path} is empty")


def _folder(path: str, config: DataConfig) -> "dict[str, Dataset]":
    datasets = need("datasets", "train")
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    saved = (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists()
    for file in files:
        if not saved and READERS.get(file.suffix) == "json":
            check_file(file)
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config.name)
    except Exception as error:  # as in _files
        for file in files:  # the loader names none; not before, since it may not read them all
            check_file(file)
        raise ValueError(f"cannot read the folder {path} as a data set: {' '.join(str(error).split())}") from error
    return dict(loaded) if isinstance(loaded, dict) else {config.train_split: loaded}


def _hub(config: DataConfig) -> "dict[str, Dataset]":
    assert isinstance(config.source, str)
    datasets = need("datasets", "train")
    try:
        return dict(datasets.load_dataset(config.source, config.name))
    except Exception as error:  # not there, no network, a wrong configuration: the message is the hub client's
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data {config.source!r} is neither {PYTHON_DOCS!r} nor a local file, and the hub did not give it: {reason}"
        ) from error


def _columns(data: "Dataset", config: DataConfig, source: str | list[str], labelled: bool) -> "Dataset":
    wanted = {"text": config.text_column}
    if config.text_pair_column is not None:
        wanted["text_pair"] = config.text_pair_column
    if labelled:
        wanted["label"] = config.label_column
    for role, column in wanted.items():
        if column not in data.column_names:
            known = textwrap.shorten(", ".join(data.column_names), 400, placeholder=" ...")
            raise ValueError(f"{_spelled(source)} has no column {column!r} ({role}_column); it has: {known}")
    data = data.select_columns(list(wanted.values()))
    for role, column in wanted.items():
        what = f"{_spelled(source)}: column {column!r} ({role}_column)"
        (_check_labels if role == "label" else _check_texts)(data, column, what)
    return data.rename_columns({column: role for role, column in wanted.items() if column != role})


def _check_texts(data: "Dataset", column: str, what: str) -> None:
    kind = getattr(data.features[column], "dtype", type(data.features[column]).__name__)
    if kind not in ("string", "large_string", "string_view") and kind != "null":
        raise ValueError(f"{what} holds {kind}; allowed: strings")
    _check_nulls(data, column, what)


def _check_labels(data: "Dataset", column: str, what: str) -> None:
    feature = data.features[column]
    kind = getattr(feature, "dtype", type(feature).__name__)
    _check_nulls(data, column, what)
    if kind not in ("string", "large_string", "string_view", "bool") and not kind.startswith(("int", "uint")):
        whole = kind.startswith("float") and all(float(value).is_integer() for value in data[column])
        if not whole:
            raise ValueError(f"{what} holds {kind}; allowed: one class a row, as a string or a whole number")
    names = getattr(feature, "names", None)
    if names is not None and len(data) and not 0 <= min(data[column]) <= max(data[column]) < len(names):
        raise ValueError(
            f"{what} holds numbers from {min(data[column])} to {max(data[column])} for {len(names)} classes; allowed: "
            f"0 to {len(names) - 1}. Test sets without labels have -1"
        )


def _check_nulls(data: "Dataset", column: str, what: str) -> None:
    if data.data.column(column).null_count:  # of the whole table, of which the rows here may be a part
        nulls = sum(value is None for value in data[column])
        if nulls:
            raise ValueError(f"{what} is null in {nulls} of {len(data)} rows; fill them, or leave these rows out")


def _spelled(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)
