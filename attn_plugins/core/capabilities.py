"""What a call may need of an attention, and which of it a class declares that it can honour."""

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
