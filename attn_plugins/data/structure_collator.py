"""Batches of rows that have a structure each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attn_plugins.core.structure import Structure


class StructureCollator:
    """A data collator whose batches have a ``structure`` beside what another collator makes of the rows.

    For Trainer, or as the ``collate_fn`` of a DataLoader.

    Args:
        collator: makes a batch of rows without their structures, such as DataCollatorWithPadding of transformers.
        make: makes the structure of a row, a mapping, of whatever is in it. None takes it from the field ``structure``.
        fields: what of a row is for ``make`` alone: the other collator doesn't get it.
        padding_side: where ``collator`` pads rows.
        length_of: name of the batch's tensor whose second dimension is the number of tokens; None is ``input_ids``,
            or ``inputs_embeds`` where there are none.

    Trainer takes away columns that the model's forward does not name, before its collator: with
    ``TrainingArguments(remove_unused_columns=False)`` it leaves them.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        make: Callable[[Mapping[str, Any]], Structure] | None = None,
        *,
        fields: Sequence[str] = ("structure",),
        padding_side: str = "right",
        length_of: str | None = None,
    ):
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}; allowed: 'left', 'right'")
        self.collator, self.make, self.fields = collator, make, tuple(fields)
        self.padding_side, self.length_of = padding_side, length_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        structures = [self._structure(feature) for feature in features]
        rest = [{name: value for name, value in row.items() if name not in self.fields} for row in features]
        batch = dict(self.collator(rest))
        names = ("input_ids", "inputs_embeds") if self.length_of is None else (self.length_of,)
        found = next((batch[name] for name in names if isinstance(batch.get(name), torch.Tensor)), None)
        if found is None:
            raise ValueError(f"the batch has {', '.join(batch)}, and none of {', '.join(names)} to tell its length")
        batch["structure"] = Structure.stack(structures, found.shape[1], self.padding_side)  # type: ignore[arg-type]
        return batch

    def _structure(self, feature: Mapping[str, Any]) -> Structure:
        missing = [name for name in self.fields if name not in feature]
        if missing:
            raise ValueError(
                f"a row has {', '.join(feature)}, and not {', '.join(missing)}; Trainer takes away what the model's "
                "forward does not name: TrainingArguments(remove_unused_columns=False)"
            )
        made = feature["structure"] if self.make is None else self.make(feature)
        if not isinstance(made, Structure) or made.batch_size != 1:
            raise ValueError(f"the structure of a row is {made!r}; allowed: an attn_plugins.Structure of one row")
        return made
