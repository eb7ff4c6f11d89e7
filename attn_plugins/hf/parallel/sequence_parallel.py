"""Programs that give each process a part of a text know some attention functions, and ours is none of them.

Attention over the part would be taken for attention over the whole text. So each call of a model around swapped modules
looks for what these programs leave behind while they are at work.
"""

from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_plugins.hf.attention_function import attention_forward
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.names import IMPLEMENTATION
from attn_plugins.hf.parallel import context

ADVICE = "train without it, or call attn_plugins.restore_attention(model) first"
TORCHS_OWN = nn.functional.scaled_dot_product_attention


def guard(model: nn.Module) -> None:
    """Refuse to call a model where each process has a part of the text, but by :func:`context.context_parallel`."""
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


def unguard(model: nn.Module) -> None:
    """Undo :func:`guard`."""
    remove_hooks(model, refuse, leave)


def leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook, called after an error too."""
    context.end(model, output)


def refuse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook.

    Raises:
        ValueError: torch's own context_parallel is on, or another function serves in place of ours (DeepSpeed's
            Ulysses), or the model cannot be served in ours.
    """
    # torch's context_parallel exchanges this function for one of its own; nothing public tells that it is on.
    held = nn.functional.scaled_dot_product_attention
    if held is not TORCHS_OWN and held.__module__.startswith("torch.distributed") and context.entered() is None:
        raise ValueError(
            "torch's context_parallel gives each process a part of the text, and a swapped attention would take it for "
            f"all of it; {ADVICE}, or enter attn_plugins.context_parallel in its place, with the same arguments"
        )
    if ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] is not attention_forward:
        raise ValueError(
            f"another program (DeepSpeed's Ulysses, sp_size?) has put its function in place of {IMPLEMENTATION!r}, "
            f"which would leave out every swapped attention; {ADVICE}"
        )
    return args, context.begin(model, args, kwargs)
