"""The hidden states that a module makes its queries of, for attentions that want them."""

import torch
from torch import nn

from attn_plugins.hf.arguments import SIGNATURE, hidden_argument
from attn_plugins.hf.call import Call


def refuse_unnamed(module: nn.Module, path: str, attention: str) -> None:
    """Raise a ValueError unless the forward of a module shows its input."""
    if hidden_argument(type(module)) is None:
        raise ValueError(
            f"attention {attention!r} needs the hidden states of {path}, and the forward of {type(module).__name__} "
            "does not name its input; choose other modules with layers, roles or modules"
        )


def hidden_states_of(module: nn.Module, call: Call | None, query: torch.Tensor) -> torch.Tensor:
    """The input (B, Q, E) of which a module has made its queries.

    Args:
        query: (B, H, Q, D).

    Raises:
        ValueError: its forward has not been called with a tensor of these sizes.
    """
    rows, _, queries, _ = query.shape
    hidden = None
    if call is not None:
        name, place = getattr(module, SIGNATURE).hidden
        hidden = call.args[place] if place < len(call.args) else call.kwargs.get(name)
        if isinstance(hidden, torch.Tensor) and (change := getattr(module, "hidden_given", None)) is not None:
            hidden = change(hidden)
    if isinstance(hidden, torch.Tensor) and hidden.ndim == 4:  # images or windows in rows and columns, or prompts (SAM)
        prompts = hidden.shape[0] * hidden.shape[1] == rows and hidden.shape[2] == queries
        hidden = hidden.flatten(0, 1) if prompts else hidden.flatten(1, 2)
    if (
        not isinstance(hidden, torch.Tensor)
        or hidden.ndim != 3
        or hidden.shape[:2] not in ((rows, queries), (1, queries))
    ):
        got = f"a tensor {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ValueError(
            f"the attention of {type(module).__name__} needs its input as a tensor ({rows}, {queries}, size), as many "
            f"as queries, got {got}; leave its modules out with layers, roles or modules"
        )
    return hidden.to(query.device).expand(rows, -1, -1)
