"""Batches that are made when they are asked for: those of pictures and sound would not fit into memory together."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload


class Batches(Sequence[dict[str, Any]]):
    """What a task measures, batch by batch; each is made anew whenever it is asked for.

    Args:
        rows: of all batches together, sliced like a ``datasets.Dataset``, which gives a mapping of lists.
        batch_size: rows in a batch; the last may have fewer.
        make: of a slice, the batch.
    """

    def __init__(self, rows: Any, batch_size: int, make: Callable[[Any], dict[str, Any]]):
        self.rows, self.batch_size, self.make = rows, batch_size, make

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.make(self.rows[index * self.batch_size : (index + 1) * self.batch_size])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))
