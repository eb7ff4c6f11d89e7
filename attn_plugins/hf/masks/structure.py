"""The structure of transformers' mask functions: causality and segments, or that they are more than these.

transformers composes mask functions as closures, which show nothing of their parts, and which torch.compile cannot look
into. So the functions that make them note the structure on each (hf/patches.py wraps them).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

STRUCTURE = "_attn_plugin_structure"
"""Attribute of a mask function: its :class:`Structure`."""


class Structure(NamedTuple):
    """What is known of a mask function without evaluating it."""

    causal: bool
    """Hides what follows a query, at least."""
    plain: bool
    """Causality, or its absence, and segments are all of it."""
    segments_BK: torch.Tensor | None = None
    """Number of the packed sequence that a key belongs to."""


UNSTRUCTURED = Structure(causal=False, plain=False)


def structure_of(rule: Callable) -> Structure:
    """Read the structure of a mask function.

    Of one that a user made, of whatever kind, nothing is known: exact where it is evaluated, refused where it can't be.
    """
    if rule is masking_utils.causal_mask_function:
        return Structure(causal=True, plain=True)
    if rule is masking_utils.bidirectional_mask_function:
        return Structure(causal=False, plain=True)
    structure = getattr(rule, STRUCTURE, UNSTRUCTURED)
    return structure if isinstance(structure, Structure) else UNSTRUCTURED


def with_structure_of_all(original: Callable, *parts: Callable) -> Any:
    """Around ``and_masks``."""
    rule, structures = original(*parts), [structure_of(part) for part in parts]
    segments = [one.segments_BK for one in structures if one.segments_BK is not None]
    alone = segments[0] if len(segments) == 1 else None
    plain = all(one.plain for one in structures) and len(segments) <= 1
    setattr(rule, STRUCTURE, Structure(any(one.causal for one in structures), plain, alone))
    return rule


def with_segments(original: Callable, packed_sequence_mask: torch.Tensor) -> Any:
    """Around ``packed_sequence_mask_function``."""
    rule = original(packed_sequence_mask)
    setattr(rule, STRUCTURE, Structure(causal=False, plain=True, segments_BK=packed_sequence_mask))
    return rule


def with_remapped_positions(original: Callable, mask_function: Callable, position_ids: torch.Tensor) -> Any:
    """Around ``remap_positions_for_packed_sequence``.

    Within a segment positions differ from indices by a constant, so order is the same.
    """
    rule = original(mask_function, position_ids)
    setattr(rule, STRUCTURE, structure_of(mask_function))
    return rule


COMPOSERS: dict[str, Callable[..., Any]] = {
    "and_masks": with_structure_of_all,
    "packed_sequence_mask_function": with_segments,
    "remap_positions_for_packed_sequence": with_remapped_positions,
}
"""Functions of transformers.masking_utils that compose mask functions, and what goes around them."""
