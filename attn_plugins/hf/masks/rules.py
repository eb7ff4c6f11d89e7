"""What transformers' mask functions say beyond their values: causality, segments, or something that is not known.

transformers composes mask functions as closures, which tell nothing of their parts, and which torch.compile cannot look
into. So the functions that make them note on each what it says (hf/patches.py puts these notes in).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

SAYS = "_attn_plugin_says"
"""Attribute of a mask function: its Said."""


class Said(NamedTuple):
    """What a mask function says."""

    causal: bool
    """It is at most causal."""
    plain: bool
    """Causality, or its absence, and segments are all that it says."""
    segments_BK: torch.Tensor | None = None
    """Number of the packed sequence that a key belongs to."""


UNKNOWN = Said(causal=False, plain=False)


def read_rule(rule: Callable) -> Said:
    """What a mask function of transformers says.

    One that a user made, of whatever kind, is taken for a rule of which nothing is known: exact where it is evaluated,
    refused where it can't be.
    """
    if rule is masking_utils.causal_mask_function:
        return Said(causal=True, plain=True)
    if rule is masking_utils.bidirectional_mask_function:
        return Said(causal=False, plain=True)
    said = getattr(rule, SAYS, UNKNOWN)
    return said if isinstance(said, Said) else UNKNOWN


def said_together(original: Callable, *parts: Callable) -> Any:
    """Around ``and_masks``."""
    rule, said = original(*parts), [read_rule(part) for part in parts]
    segments = [one.segments_BK for one in said if one.segments_BK is not None]
    alone = segments[0] if len(segments) == 1 else None
    plain = all(one.plain for one in said) and len(segments) <= 1
    setattr(rule, SAYS, Said(any(one.causal for one in said), plain, alone))
    return rule


def said_of_segments(original: Callable, packed_sequence_mask: torch.Tensor) -> Any:
    """Around ``packed_sequence_mask_function``."""
    rule = original(packed_sequence_mask)
    setattr(rule, SAYS, Said(causal=False, plain=True, segments_BK=packed_sequence_mask))
    return rule


def said_of_positions(original: Callable, mask_function: Callable, position_ids: torch.Tensor) -> Any:
    """Around ``remap_positions_for_packed_sequence``.

    Within a segment positions differ from indices by a constant, so order is the same.
    """
    rule = original(mask_function, position_ids)
    setattr(rule, SAYS, read_rule(mask_function))
    return rule


COMPOSERS: dict[str, Callable[..., Any]] = {
    "and_masks": said_together,
    "packed_sequence_mask_function": said_of_segments,
    "remap_positions_for_packed_sequence": said_of_positions,
}
"""Functions of transformers.masking_utils that make mask functions, and what goes around them."""
