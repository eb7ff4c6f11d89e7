"""Batches of rows with structures: padded where the rows are, and refused where a row has none."""

import pytest
import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.structure import Structure
from attn_plugins.data.structure_collator import StructureCollator

ROWS = [{"input_ids": [5] * n, "structure": Structure.blocks([0] * n)} for n in (2, 4)]


def pad(side, length=5):
    def collate(rows):
        assert all(set(row) == {"input_ids"} for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[number, slice(0, n) if side == "right" else slice(length - n, length)] = 5
        return {"input_ids": ids}

    return collate


@pytest.mark.parametrize("side", ["left", "right"])
def test_structures_are_padded_as_rows_are(side):
    batch = StructureCollator(pad(side), padding_side=side)(ROWS)
    mask = AttentionMask(2, 5, 5, causal=False).with_structure(batch["structure"])
    real = batch["input_ids"] > 0
    assert torch.equal(mask.dense()[:, 0], real.unsqueeze(1) & real.unsqueeze(2))


def test_what_it_cannot_make_is_refused():
    with pytest.raises(ValueError, match="padding_side='top'; allowed: 'left', 'right'"):
        StructureCollator(pad("left"), padding_side="top")
    with pytest.raises(ValueError, match=r"a row has input_ids, and not structure; Trainer takes away"):
        StructureCollator(pad("left"))([{"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"the structure of a row is 3; allowed: an attn_plugins.Structure of one row"):
        StructureCollator(pad("left"), lambda row: 3, fields=["structure"])(ROWS)
    with pytest.raises(ValueError, match="the batch has input_ids, and none of pixel_values to tell its length"):
        StructureCollator(pad("left"), length_of="pixel_values")(ROWS)
    with pytest.raises(ValueError, match="num_tokens=3; allowed: 4 or more"):
        StructureCollator(lambda rows: {"input_ids": torch.zeros(2, 3)})(ROWS)
