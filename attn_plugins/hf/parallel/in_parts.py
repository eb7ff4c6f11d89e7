"""The attention function's work where each process has a part of the rows."""

from typing import Any

import torch
from torch import nn

from attn_plugins.core.registry import get_attention
from attn_plugins.hf.call import Call
from attn_plugins.hf.grouped_keys import fitted
from attn_plugins.hf.hidden_states import hidden_states_of
from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.parallel.context import WholeRows, whole_rows


def rows_of(module: nn.Module, mask: Any) -> WholeRows | None:
    """What a mask's whole rows hold, None where it is of whole rows.

    The mask has it, and not only the model's call: a layer may be run again in the backward.

    Raises:
        ValueError: the model has made a mask of its own for its part.
    """
    rows = mask.rows if isinstance(mask, LazyMask) else None
    if rows is None and whole_rows() is not None:
        got = f"a tensor {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"in context_parallel each process has a part of the rows, and {type(module).__name__} got {got} for its "
            "mask; allowed there: models that make masks by transformers' mask functions"
        )
    return rows


def attend_in_part(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask,
    rows: WholeRows,
    call: Call | None,
    *,
    scale: float,
    dropout: float,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the module's slot, or by softmax attention where it has none.

    Raises:
        ValueError: the call needs what cannot be told of a part.
    """
    if not mask.plain or extras["position_bias"] is not None or key.shape[2] != query.shape[2]:
        needs = (
            "a mask of its own" if not mask.plain else "a position bias" if key.shape[2] == query.shape[2] else "keys"
        )
        raise ValueError(
            f"in context_parallel each process has a part of the rows, and {type(module).__name__} brings {needs} that "
            "cannot be told of a part; give each process whole rows (data parallelism, FSDP)"
        )
    softmax = get_attention("softmax")
    attend = module._modules.get(SLOT) or softmax(softmax.Config())
    attention = slot_of(module)
    if attention is not None and attention.wants_hidden:
        extras["hidden"] = hidden_states_of(module, call, query)
    query, key, value = fitted(module, query, key, value)
    part = rows.part(mask.causal, query.device)
    return attend(query, key, value, mask=part.mask, part=part, scale=scale, dropout=dropout, **extras)
