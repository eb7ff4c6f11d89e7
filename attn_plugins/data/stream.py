"""Rows to train on that are read as they are needed, a chunk at a time, and never held whole."""

import contextlib
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need
from attn_plugins.data.columns import named_by_role
from attn_plugins.data.text import NoExamplesError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

PIECE = 1 << 16
"""Characters of a text file that are one row."""

Make = Callable[["Dataset"], Any]
"""Rows named by role -> a sequence of examples, such as a ``Dataset``, as a task makes them."""


class StreamError(ValueError):
    """Rows of a stream cannot be read, or are not what they have to be, which shows when they come."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Rows to train on whose number nobody knows, of which so many are in memory as are read, checked and made into
    examples at once, and as are shuffled."""

    rows: Any
    """A ``datasets.IterableDataset`` of them as their source has them, which decodes no pictures or sound."""
    wanted: Mapping[str, str]
    """Role -> name of the column."""
    source: str
    """What messages call them."""
    folder: Path | None
    """Where relative paths in columns start; None for the current one."""
    chunk_rows: int
    """Rows that are read, checked and made into examples at once."""
    shuffle_rows: int
    """Rows that are shuffled among each other; 0 for the order of the source."""
    held_out: int = 0
    """How many of the source come before them and are held out."""

    @cached_property
    def first(self) -> "Dataset":
        """The first chunk, in the order of the source, named by role: what is known of the rows before they are read.

        Raises:
            ValueError: there is none, or its columns are not those that are wanted.
        """
        return named_by_role(self._table(self._start, self.source), self.wanted, self.source, self.folder)

    def examples(self, make: Make, *, seed: int, shares: int, features: "Features | None" = None) -> "IterableDataset":
        """Examples of the rows, round after round and without end, in an order that the seed tells.

        Args:
            make: called on a chunk of rows at a time.
            shares: of the rows, each of which is a shard: one for each process and worker of its DataLoader. A share
                has every n-th row, so that no row is in two, and the last row of one may come a step later than that
                of another.
            features: of the examples, for a trainer that asks for them.

        Raises:
            StreamError: from its iterator, where rows that come cannot be read or do not fit.
        """
        datasets, iterable = need("datasets", "train"), need("datasets.iterable_dataset", "train")

        def endless(numbers: list[int]) -> Iterator[tuple[tuple[int, int, int], Any]]:
            (share,) = numbers
            for turn in itertools.count():
                place = -1
                for place, example in enumerate(self._round(make, seed, turn, share, shares)):
                    yield (share, turn, place), example
                if place < 0:
                    of = f"share {share + 1} of {shares} of {self.source}, every {shares}th row," if shares > 1 else ""
                    raise StreamError(f"{of or self.source} gives nothing to train on; allowed: more rows")

        made = iterable.ExamplesIterable(endless, {"numbers": list(range(shares))})
        return datasets.IterableDataset(made, info=datasets.DatasetInfo(features=features))

    def some(self, make: Make, number: int, *, seed: int) -> list[Any]:
        """At most so many examples, of one round.

        Raises:
            StreamError: there is none, or rows cannot be read or do not fit.
        """
        found = list(itertools.islice(self._round(make, seed, 0, 0, 1), number))
        if not found:
            raise StreamError(f"{self.source} gives no example; allowed: more rows")
        return found

    def _round(self, make: Make, seed: int, turn: int, share: int, shares: int) -> Iterator[Any]:
        """Examples of a share of the rows, once."""
        import numpy as np

        rows = self.rows
        if self.shuffle_rows:
            rows = rows.shuffle(generator=np.random.default_rng([seed, turn]), buffer_size=self.shuffle_rows)
        own = itertools.islice(self._read(rows), share, None, shares)
        start = share
        while part := list(itertools.islice(own, self.chunk_rows)):
            last = start + (len(part) - 1) * shares
            place = f"{self.source}, rows {start + 1:,} to {last + 1:,} as they were read"
            try:
                with _no_progress():
                    examples = make(named_by_role(self._table(part, place), self.wanted, place, self.folder))
            except NoExamplesError:
                examples = []
            except ValueError as error:
                raise StreamError(str(error) if place in str(error) else f"{place}: {error}") from error
            order = range(len(examples))
            if self.shuffle_rows:
                order = np.random.default_rng([seed, turn, start]).permutation(len(examples)).tolist()
            yield from (examples[at] for at in order)
            start = last + shares

    def _read(self, rows: Any) -> Iterator[dict[str, Any]]:
        batches, number = rows.iter(batch_size=self.chunk_rows), 0
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # as many kinds as there are loaders; each means that the source is broken there
                reason = textwrap.shorten(str(error.__cause__ or error), 400, placeholder=" ...")
                raise StreamError(
                    f"cannot read {self.source} after {number:,} rows: {reason or type(error).__name__}"
                ) from error
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
                number += 1

    @cached_property
    def _start(self) -> list[dict[str, Any]]:
        """Rows of the first chunk, as they are; ValueError where there is none."""
        start = list(itertools.islice(self._read(self.rows), self.chunk_rows))
        if not start:
            after = f" after the first {self.held_out:,}, which are held out" if self.held_out else ""
            allowed = "; allowed: a smaller max_eval_rows, an eval_split or an eval_source" if self.held_out else ""
            raise ValueError(f"{self.source} has no rows{after}{allowed}")
        return start

    @cached_property
    def _features(self) -> "Features | None":
        """What columns hold, as the source says, or the first rows show; None where these have nothing but null."""
        datasets = need("datasets", "train")
        known = self.rows.features or datasets.Dataset.from_dict(self._columns(self._start)).features
        kept = {name: known[name] for name in self._columns(self._start)}
        return None if any(getattr(of, "dtype", None) == "null" for of in kept.values()) else datasets.Features(kept)

    def _columns(self, part: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Columns that are wanted, or that have fields which are; all of them, without rows, where one is missing."""
        there = dict.fromkeys(name for row in self._start for name in row)
        kept = [
            column if column is None or column in there else column.partition(".")[0]
            for column in dict.fromkeys(self.wanted.values())
        ]
        if not set(kept) <= set(there):
            return {name: [] for name in there}
        return {name: [row.get(name) for row in part] for name in dict.fromkeys(kept)}

    def _table(self, part: list[dict[str, Any]], place: str) -> "Dataset":
        datasets = need("datasets", "train")
        try:
            return datasets.Dataset.from_dict(self._columns(part), features=self._features)
        except Exception as error:  # pyarrow's, of many kinds
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise StreamError(f"{place}: something else than in the first rows: {reason}") from error


def streamed(rows: Any) -> "IterableDataset":
    """Rows of a ``datasets.Dataset`` or ``IterableDataset`` as an IterableDataset that decodes no pictures or sound."""
    datasets = need("datasets", "train")
    made = rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows
    media = made.features is not None and any(getattr(of, "decode", False) for of in made.features.values())
    return made.decode(False) if media else made


def text_pieces(paths: list[str]) -> "IterableDataset":
    """Text files as rows of a file, or where it is longer of so many characters and what is left of their line."""
    datasets = need("datasets", "train")
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(_pieces, features=features, gen_kwargs={"paths": paths})


def _pieces(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            while text := file.read(PIECE):
                yield {"text": text + file.readline(PIECE)}


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Without progress bars of ``datasets``, which would come with each chunk."""
    datasets = need("datasets", "train")
    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
