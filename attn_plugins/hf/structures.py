"""A structure that a model is given beside its inputs, ``structure=``: part of all masks of self-attention in the call.

No model knows the argument: it is taken off before the model sees it, and noted for the thread while the model runs.
From then on it is part of the masks that the model asks for, which layers get again where they run again in a backward.
Masks that a model makes itself get it where modules attend.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import and_masks

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.relations import ReaderOfRows
from attn_plugins.core.structure import Structure, is_structure, structure_of
from attn_plugins.hf.names import SLOT
from attn_plugins.hf.under_way import thread

ARGUMENT = "structure"


@dataclass
class Given:
    """The structure of a call of a model that is under way."""

    model: PreTrainedModel
    structure: Structure
    stack: nn.Module
    """The part of the model whose tokens it is about: the encoder of one that has a decoder too."""
    running: bool
    """Whether that part is running."""
    trains: bool
    """Whether the call is one that gradients may be wanted of; within it checkpointing may turn them off."""
    used: bool = False
    masks: dict[Any, tuple[Any, AttentionMask]] = field(default_factory=dict)
    """Masks that the model made itself, with the structure in them."""


def call(original: Callable[..., Any], self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Around ``PreTrainedModel.__call__``.

    Raises:
        ValueError: a structure was given that is none, or that the model cannot take; or that nothing attended with.
    """
    given = innermost()
    if ARGUMENT in kwargs and ARGUMENT not in _named(type(self)):
        swapped = any(hasattr(module, SLOT) for module in self.modules())
        if not (swapped or is_structure(kwargs[ARGUMENT])):
            return original(self, *args, **kwargs)  # some other thing of that name
        structure = kwargs.pop(ARGUMENT)
        if structure is not None:
            return _with(structure_of(structure), swapped, given, original, self, *args, **kwargs)
    if given is None or given.stack is not self or given.running:
        return original(self, *args, **kwargs)
    given.running = True
    try:
        return original(self, *args, **kwargs)
    finally:
        given.running = False


def _with(
    structure: Structure,
    swapped: bool,
    outer: Given | None,
    original: Callable[..., Any],
    self: PreTrainedModel,
    *args: Any,
    **kwargs: Any,
) -> Any:
    name = type(self).__name__
    if not swapped:
        raise ValueError(
            f"structure= was given to {name}, none of whose modules has an attention of attn_plugins; swap it first, "
            'for instance attn_plugins.swap_attention(model, "graph")'
        )
    if outer is not None:
        raise ValueError(f"structure= was given to {name} inside a model that was given one; give it to the outer one")
    cache = next((held for held in kwargs.values() if hasattr(held, "get_seq_length")), None)
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(
            f"structure= was given beside a cache that holds {int(cache.get_seq_length())} tokens; a structure is that "
            "of all tokens of a call: give them all, without past_key_values"
        )
    own = self.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else self
    thread.notes.structure = here = Given(self, structure, own, own is self, self.training and torch.is_grad_enabled())
    try:
        out = original(self, *args, **kwargs)
    finally:
        thread.notes.structure = None
    if not here.used:
        raise ValueError(
            f"structure= was given to {name}, and no attention in it has asked for the mask of its "
            f"{structure.num_tokens} tokens; give it to the part of the model that has them"
        )
    return out


def innermost() -> Given | None:
    """The call under way in this thread."""
    return thread.notes.structure


def active() -> Given | None:
    """The same, while the tokens that it is about are being worked on."""
    given = innermost()
    return given if given is not None and given.running else None


def in_mask(
    rule: Callable[..., Any], batch: int, queries: int, keys: int, offsets: tuple[Any, Any], device: Any
) -> tuple[Callable[..., Any], Structure] | None:
    """(The rule of a mask that a model asks for, with the structure in it; the structure), None where none was given.

    Raises:
        ValueError: it is a structure of other sizes.
    """
    given = active()
    if given is None:
        return None
    check(given.structure, batch, queries, keys, offsets)
    given.used = True
    structure = given.structure.to(device)
    return and_masks(_rule_of(structure), rule), structure


def check(structure: Structure, batch: int, queries: int, keys: int, offsets: tuple[Any, Any]) -> None:
    """Raise a ValueError unless a structure is that of these rows of queries and keys."""
    rows, tokens = structure.batch_size, structure.num_tokens
    first = all(isinstance(offset, int) and offset == 0 for offset in offsets)
    if first and rows in (1, batch) and tokens == queries == keys:
        return
    raise ValueError(
        f"structure= is of {rows} rows of {tokens} tokens, and the model attends in {batch} rows of {queries} queries "
        f"to {keys} keys; allowed: 1 row or {batch}, as many tokens as queries and keys, padding among them "
        "(Structure.pad, Structure.stack), without a cache that holds tokens or is of fixed length"
    )


def refuse_unwatched(kwargs: dict[str, Any]) -> None:
    """Refuse a structure that has come to an attention as any other argument: nothing has taken it off.

    Raises:
        ValueError: there is one.
    """
    if kwargs.get(ARGUMENT) is not None:
        raise ValueError("structure= was given to a model's forward; call the model itself: model(..., structure=...)")


def _rule_of(structure: Structure) -> Callable[..., torch.Tensor]:
    """A structure as a mask function of transformers."""

    def rule(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return structure.shows(ReaderOfRows(batch), q, k)

    return rule


def _named(cls: type) -> Any:
    if cls not in _names:
        _names[cls] = frozenset(inspect.signature(inspect.unwrap(cls.forward)).parameters)  # type: ignore[attr-defined]
    return _names[cls]


_names: dict[type, frozenset[str]] = {}
