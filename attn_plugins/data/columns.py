"""Columns of rows by the role that they have for a task, and what each has to hold."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attn_plugins.config.extras import need
from attn_plugins.data.answers import check_answers, read_answers
from attn_plugins.data.pictures import check_pictures, read_pictures
from attn_plugins.data.sound import check_sound, read_sound
from attn_plugins.data.tags import check_tags, check_words

if TYPE_CHECKING:
    from datasets import Dataset

Check = Callable[["Dataset", str, str], None]
"""(rows with roles for names, role, what messages call the column); raises a ValueError where it holds something else
than it should."""
Reader = Callable[["Dataset", str, Path | None], "Dataset"]
"""(rows, role, folder in which relative paths start, or None for the current one) -> rows whose column holds what the
role promises, whatever form it had."""


def named_by_role(data: "Dataset", wanted: Mapping[str, str], source: str, folder: Path | None = None) -> "Dataset":
    """These columns alone, with their roles for names.

    Args:
        wanted: role -> name of the column; of a field of a column, as translation.en.
        source: what messages call the rows.
        folder: where relative paths in columns start; None for the current one.

    Raises:
        ValueError: there is no such column, or it holds something else than its role asks for.
    """
    data = _with_fields(data, wanted.values())
    for role, column in wanted.items():
        if column not in data.column_names:
            known = textwrap.shorten(", ".join(data.column_names), 400, placeholder=" ...")
            if column is None:
                raise ValueError(f"{ROLES[role].option} names no column, and the task needs one; {source} has: {known}")
            raise ValueError(f"{source} has no column {column!r} ({ROLES[role].option}); it has: {known}")
    data = data.select_columns(list(dict.fromkeys(wanted.values())))
    data = data.rename_columns({column: role for role, column in wanted.items() if column != role})
    for role in wanted:
        read = ROLES[role].read
        data = data if read is None else read(data, role, folder)
    for role, column in wanted.items():
        ROLES[role].check(data, role, f"{source}: column {column!r} ({ROLES[role].option})")
    return data


def _with_fields(data: "Dataset", columns: Iterable[str]) -> "Dataset":
    """Rows in which those of these columns that are fields of others, such as translation.en, are columns too."""
    over = {column.partition(".")[0] for column in columns if column and column not in data.column_names}
    over &= set(data.column_names)
    if not over:
        return data
    fields = data.select_columns(sorted(over)).flatten()
    others = data.remove_columns(sorted(over))
    datasets = need("datasets", "train")
    return datasets.concatenate_datasets([others, fields], axis=1) if others.column_names else fields


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


def _check_scores(data: "Dataset", column: str, what: str) -> None:
    kind = getattr(data.features[column], "dtype", type(data.features[column]).__name__)
    if not kind.startswith(("int", "uint", "float")):
        raise ValueError(f"{what} holds {kind}; allowed: a number a row")
    _check_nulls(data, column, what)
    if not all(map(math.isfinite, data[column])):
        raise ValueError(f"{what} holds numbers that are not finite; leave these rows out")


def _check_nulls(data: "Dataset", column: str, what: str) -> None:
    if data.data.column(column).null_count:  # of the whole table, of which the rows here may be a part
        nulls = sum(value is None for value in data[column])
        if nulls:
            raise ValueError(f"{what} is null in {nulls} of {len(data)} rows; fill them, or leave these rows out")


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a column is for."""

    option: str
    """Setting that names the column, a field of DataConfig."""
    check: Check
    read: Reader | None = None
    files: bool = False
    """Whether rows name files that lie beside their table."""


ROLES = {
    "text": Role(option="text_column", check=_check_texts),
    "text_pair": Role(option="text_pair_column", check=_check_texts),
    "label": Role(option="label_column", check=_check_labels),
    "words": Role(option="text_column", check=check_words),
    "tags": Role(option="label_column", check=check_tags),
    "audio": Role(option="audio_column", check=check_sound, read=read_sound, files=True),
    "question": Role(option="question_column", check=_check_texts),
    "context": Role(option="context_column", check=_check_texts),
    "answer": Role(option="answer_column", check=check_answers, read=read_answers),
    "image": Role(option="image_column", check=check_pictures, read=read_pictures, files=True),
    "source": Role(option="source_column", check=_check_texts),
    "target": Role(option="target_column", check=_check_texts),
    "score": Role(option="label_column", check=_check_scores),
    "prompt": Role(option="prompt_column", check=_check_texts),
    "chosen": Role(option="chosen_column", check=_check_texts),
    "rejected": Role(option="rejected_column", check=_check_texts),
}
