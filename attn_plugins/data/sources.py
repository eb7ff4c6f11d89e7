"""Where rows come from: a data set on the hub, local files or a folder, or text that every Python carries.

Every source ends as two ``datasets.Dataset`` (train, held-out), whose columns have the names of their roles
(:data:`attn_plugins.data.columns.ROLES`) and hold what these ask for; or, streamed, as a
:class:`attn_plugins.data.stream.Stream` to train on, and a Dataset that is held out.
"""

import glob
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need
from attn_plugins.data.columns import ROLES, named_by_role
from attn_plugins.data.idx import idx_splits
from attn_plugins.data.sound import sound_folder
from attn_plugins.data.stream import Stream, streamed, text_pieces
from attn_plugins.data.text import PYTHON_DOCS, python_docs

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""Suffix of a local file -> loader of ``datasets``."""

MADE = "made-by-the-task"
"""Source of the rows of a task that makes them itself."""

HELD_OUT = 1000
"""Rows that are held out of a stream where ``max_eval_rows`` does not say."""

LOOKED_AT = 16 << 20
"""Characters of a streamed file that :func:`check_file` reads."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and which of it is held out for evaluation."""

    source: str | list[str]
    """python-docs, a data set on the hub, a local folder, or local files (globs too) that are all of one kind. Folders
    may hold pictures or sound with a table, and idx files as MNIST has them."""
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
    """Column of the text; of a caption or a transcript; of the words, for token-classification."""
    text_pair_column: str | None = None
    """Column of a second text, for tasks on pairs."""
    label_column: str = "label"
    """Column of the class; of the words' classes, for token-classification; of the score, for sentence-similarity."""
    source_column: str = "source"
    """Column of the text to translate or to summarize."""
    target_column: str = "target"
    """Column of the translation, or the summary."""
    image_column: str = "image"
    """Column of pictures, or of their paths."""
    audio_column: str = "audio"
    """Column of recordings, or of their paths."""
    question_column: str = "question"
    """Column of the question."""
    context_column: str = "context"
    """Column of the text that answers it."""
    answer_column: str = "answers"
    """Column of the answers: a text, or as SQuAD has them."""
    prompt_column: str = "prompt"
    """Column of what is answered, for preference."""
    chosen_column: str = "chosen"
    """Column of the better answer."""
    rejected_column: str = "rejected"
    """Column of the worse answer."""
    max_train_rows: int | None = None
    """Use only the first so many rows for training."""
    max_eval_rows: int | None = None
    """Use only the first so many rows for evaluation; null for all, of a split of a stream 1000."""
    streaming: bool = False
    """Read rows to train on as they are needed, over and over, and never hold all of them; ``training.max_steps`` then
    says how long. Where there is no held-out split, the first ``max_eval_rows`` are held out."""
    chunk_rows: int = 1000
    """Rows of a stream that are read, checked and made into examples at once; classes are those of the first."""
    shuffle_rows: int = 1000
    """Rows of a stream that are shuffled among each other in memory, by the seed; 0 keeps their order."""

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}; allowed: between 0 and 1")
        for name, least in {"chunk_rows": 1, "shuffle_rows": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least {least}")
        for name in ("max_train_rows", "max_eval_rows"):
            rows = getattr(self, name)
            if rows is not None and rows < 1:
                raise ValueError(f"{name}={rows}; allowed: at least 1, or null")
        if not self.source:
            raise ValueError(f"source={self.source!r}; allowed: {PYTHON_DOCS!r}, a data set on the hub, or local files")


def no_data() -> DataConfig:
    """What settings say that name no data, as is right for a task that makes its rows itself."""
    return DataConfig(source=MADE)


def check_named(config: DataConfig, columns: Sequence[str], task: str) -> None:
    """Raise a ValueError where no data is named for a task that reads columns, or some for one that reads none."""
    if columns and config.source == MADE:
        raise ValueError(
            f"data is missing; task={task!r} reads rows with {', '.join(ROLES[one].option for one in columns)}"
        )
    if not columns and config != no_data():
        raise ValueError(f"task={task!r} makes its rows itself; leave data out, and see the task's own options")


def load_data(config: DataConfig, columns: Sequence[str] = ("text",)) -> "tuple[Dataset | Stream, Dataset]":
    """The training and the held-out rows.

    Args:
        columns: roles that rows have to have, as tasks name them; with a "text" comes a "text_pair" where the settings
            name a column for it. None at all: of a task that makes its rows, for which both are empty.

    Returns:
        (train, held-out), with these columns alone. Of a stream nothing to train on is read yet.

    Raises:
        ValueError: the source, a split or a column does not exist, or holds something else; the message says what.
    """
    if not columns:
        empty = need("datasets", "train").Dataset.from_dict({})
        return empty, empty
    splits = _splits(config, any(ROLES[role].files for role in columns))
    if config.train_split not in splits:
        raise ValueError(
            f"{spelled_source(config.source)} has no split {config.train_split!r}; it has: {', '.join(splits)}"
        )
    if config.streaming:
        return _streamed(config, splits, _wanted(config, columns))
    train = splits[config.train_split]
    if config.eval_source is not None:
        held_out = _files(_paths(config.eval_source) or [], config.eval_source)
    elif config.eval_split in splits and config.eval_split != config.train_split:
        held_out = splits[config.eval_split]
    elif len(train) < 2:
        raise ValueError(
            f"{spelled_source(config.source)} has no split {config.eval_split!r} and only {len(train)} row, "
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
        limited = _limited(split, limit)
        rows.append(named_by_role(limited, _wanted(config, columns), spelled_source(source), _base(source)))
    return rows[0], rows[1]


def _streamed(config: DataConfig, splits: dict[str, Any], wanted: dict[str, str]) -> "tuple[Stream, Dataset]":
    """The stream to train on, and the first rows of the held-out split; of the training split, which then goes on after
    them, where there is no other."""
    train, number, kept = streamed(splits[config.train_split]), config.max_eval_rows or HELD_OUT, 0
    source = spelled_source(config.source)
    its: dict[str, Any] = {"wanted": wanted, "source": source, "folder": _base(config.source), "shuffle_rows": 0}
    if config.eval_source is not None:
        rows = _limited(_files(_paths(config.eval_source) or [], config.eval_source), config.max_eval_rows)
        held_out = named_by_role(rows, wanted, spelled_source(config.eval_source), _base(config.eval_source))
    elif config.eval_split in splits and config.eval_split != config.train_split:
        rows = streamed(splits[config.eval_split]).take(number)
        held_out = Stream(rows=rows, chunk_rows=number, **its).first
    else:
        held_out = Stream(rows=train.take(number), chunk_rows=number, **its).first
        train, kept = train.skip(number), number
    if config.max_train_rows is not None:
        train = train.take(config.max_train_rows)
    its |= {"chunk_rows": config.chunk_rows, "shuffle_rows": config.shuffle_rows}
    return Stream(rows=train, held_out=kept, **its), held_out


def _limited(rows: "Dataset", limit: int | None) -> "Dataset":
    """At most so many rows."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _splits(config: DataConfig, media: bool) -> dict[str, Any]:
    if config.source == PYTHON_DOCS:
        return python_docs()
    paths = _paths(config.source)
    if paths is None:
        return _hub(config)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _folder(paths[0], config, media)
    return {config.train_split: _files(paths, config.source, config.streaming)}


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


def _files(paths: list[str], source: str | list[str], streaming: bool = False) -> Any:
    """Rows of local files: a Dataset, or an IterableDataset."""
    suffixes = sorted({Path(path).suffix for path in paths})
    if len(suffixes) != 1 or suffixes[0] not in READERS:
        raise ValueError(
            f"{spelled_source(source)} has suffixes {suffixes}; allowed: files of one kind of {', '.join(READERS)}"
        )
    for path in paths:
        check_file(Path(path), LOOKED_AT if streaming else None)
    reader = READERS[suffixes[0]]
    if streaming and reader == "text":
        return text_pieces(paths)
    # A text file is one document; by default datasets would make each of its lines one.
    options = {"sample_by": "document"} if reader == "text" else {}
    datasets = need("datasets", "train")
    try:
        files = {"train": paths}
        return datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming, **options)
    except Exception as error:  # the loaders raise many kinds; each means that a file is not what its suffix says
        reason = textwrap.shorten(str(error.__cause__ or error), 400, placeholder=" ...") or type(error).__name__
        raise ValueError(f"cannot read {spelled_source(source)} as {suffixes[0]}: {reason}") from error


def check_file(path: Path, most: int | None = None) -> None:
    """Raise a ValueError for a file that the loaders read wrong without a word, or that ends their process.

    Args:
        most: characters that are read of it; None for all.

    JSON that is not UTF-8 comes back with letters exchanged, and pyarrow crashes on JSON that holds null alone.
    """
    if READERS.get(path.suffix) in (None, "parquet"):
        return
    try:
        size = path.stat().st_size
        with path.open(encoding="utf-8", newline="") as lines:
            first, looked_at = "", 0
            for number, line in enumerate(lines, 1):
                looked_at += len(line)
                if most is not None and looked_at > most:
                    break
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


def _folder(path: str, config: DataConfig, media: bool) -> dict[str, Any]:
    """The splits of a folder.

    Args:
        media: rows name files, of pictures or sound: tables at its top are the splits that their names say, rather than
            stray files beside what ``datasets`` finds in its folders. A metadata.jsonl or .csv is read by ``datasets``,
            but for sound.
    """
    if media and (splits := idx_splits(Path(path)) or _tables(Path(path), config)):
        return splits
    datasets = need("datasets", "train")
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    saved = (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists()
    for file in files:
        if not saved and READERS.get(file.suffix) == "json":
            check_file(file, LOOKED_AT if config.streaming else None)
    sound = sound_folder(Path(path), files, lambda table: _files([str(table)], str(table))) if media else None
    if sound is not None:
        return sound
    try:
        options = {"streaming": config.streaming}
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config.name, **options)
    except Exception as error:  # as in _files
        for file in files:  # the loader names none; not before, since it may not read them all
            check_file(file, LOOKED_AT if config.streaming else None)
        raise ValueError(f"cannot read the folder {path} as a data set: {' '.join(str(error).split())}") from error
    return dict(loaded) if isinstance(loaded, dict) else {config.train_split: loaded}


def _tables(folder: Path, config: DataConfig) -> dict[str, Any]:
    """The tables at the top of a folder, by their names; one that is alone is the training split."""
    files: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if READERS.get(file.suffix) not in (None, "text") and file.stem != "metadata":
            files.setdefault(file.stem, []).append(str(file))
    if len(files) == 1:
        files = {config.train_split: next(iter(files.values()))}
    return {split: _files(paths, paths, config.streaming) for split, paths in files.items()}


def _hub(config: DataConfig) -> dict[str, Any]:
    assert isinstance(config.source, str)
    datasets = need("datasets", "train")
    try:
        return dict(datasets.load_dataset(config.source, config.name, streaming=config.streaming))
    except Exception as error:  # not there, no network, a wrong configuration: the message is the hub client's
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data {config.source!r} is neither {PYTHON_DOCS!r} nor a local file, and the hub did not give it: {reason}"
        ) from error


def _wanted(config: DataConfig, columns: Sequence[str]) -> dict[str, str]:
    """Role -> name of its column."""
    wanted = {role: getattr(config, ROLES[role].option) for role in columns}
    if "text" in wanted and config.text_pair_column is not None:
        wanted["text_pair"] = config.text_pair_column
    return wanted


def _base(source: str | list[str]) -> Path | None:
    """The folder in which relative paths of a source's rows start: its own; None where it has none, or several."""
    found = {path if path.is_dir() else path.parent for path in map(Path, _paths(source) or [])}
    return found.pop() if len(found) == 1 else None


def spelled_source(source: str | list[str]) -> str:
    """A source as messages and cards show it."""
    return source if isinstance(source, str) else ", ".join(source)
