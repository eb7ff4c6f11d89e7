"""What a call may need of an attention, and which of it a class declares that it can honour."""

import math
from collections.abc import Iterable
from typing import Any

from attn_plugins.core.mask import AttentionMask

NEEDS = {
    "position_bias": "a position bias added to the scores",
    "softcap": "a softcap on the scores",
    "sinks": "learned sink logits",
    "segments": "packed sequences",
    "any_mask": "a mask beyond causal, padding and segments",
    "structure": "the structure of its input (structure=)",
    "cross": "keys of another sequence",
    "causal": "causal attention",
    "bidirectional": "bidirectional attention",
}
"""What a call needs of an attention, by the capability that it has for that; for a structure that is any_mask."""

CAPABILITIES = (
    "causal",
    "bidirectional",
    "cross",
    "any_mask",
    "segments",
    "position_bias",
    "softcap",
    "sinks",
    "dropout",
)


def capabilities(attention: type) -> list[str]:
    """Names of what a class of attention can honour, in the order of :data:`CAPABILITIES`."""
    return [name for name in CAPABILITIES if getattr(attention, name)]


def refuse_lacking(attention: Any, mask: AttentionMask, extras: Iterable[str]) -> None:
    """Raise a ValueError where a call needs what a class of attention cannot honour.

    Args:
        extras: what it adds to scores, by the names in :data:`NEEDS`.
    """
    needs = [*extras]
    if mask.segments_BK is not None:
        needs.append("segments")
    if mask.ruled:
        needs.append("any_mask")
    elif mask.structure is not None:
        needs.append("structure")
    if mask.cross:
        needs.append("cross")
    elif not mask.ruled:
        needs.append("causal" if mask.causal else "bidirectional")
    for capability in needs:
        if not getattr(attention, "any_mask" if capability == "structure" else capability):
            raise ValueError(
                f"this call needs {NEEDS[capability]}, which attention {attention.name!r} cannot honour; "
                f"it can honour: {', '.join(capabilities(attention))}"
            )


def check_numbers(scale: Any, dropout: Any, softcap: Any) -> None:
    """Raise a ValueError unless the numbers of a call are in their ranges."""
    if isinstance(scale, (int, float)) and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r}; allowed: a finite number above 0")
    if isinstance(softcap, (int, float)) and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap!r}; allowed: a finite number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}; allowed: a probability from 0 to below 1")
