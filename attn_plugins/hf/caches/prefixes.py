"""Keys that a cache holds before an encoder's own, as prefix tuning puts them there: one sequence with them.

Its queries are then the last of the keys, as in a decoder. Nothing else tells these keys from another sequence's: the
attention function is given no cache, and the mask is made without a look at it.
"""

from typing import Any

from torch import nn
from torch.nn.functional import pad
from transformers import Cache, EncoderDecoderCache

from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.masks.mask_function import LazyMask


def watch(module: nn.Module) -> None:
    """Have the masks that a module is given place its queries behind the keys that a cache holds."""
    module.register_forward_pre_hook(before_attention, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    remove_hooks(module, before_attention)


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook."""
    cache: Any = next((held for held in (*args, *kwargs.values()) if isinstance(held, Cache)), None)
    mask = next((held for held in (*args, *kwargs.values()) if isinstance(held, LazyMask)), None)
    index = getattr(module, "layer_idx", None)
    if cache is None or mask is None or index is None:
        return None
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    length = cache.get_seq_length(index)
    if not length or mask.causal or not mask.plain:
        return None
    moved = mask.cached(("prefix", length), lambda: behind(mask, length))
    args = tuple(moved if held is mask else held for held in args)
    return args, {name: moved if held is mask else held for name, held in kwargs.items()}


def behind(mask: LazyMask, length: int) -> LazyMask:
    """The mask of queries after ``length`` keys of their sequence, which all see if the mask knows nothing of them."""
    missing = mask.q_length + length - mask.kv_length
    if missing not in (0, length):
        return mask
    padding_BK = mask.padding_BK if mask.padding_BK is None else pad(mask.padding_BK, (missing, 0), value=True)
    sizes = {"kv_length": mask.kv_length + missing, "q_offset": mask.kv_offset + length}
    return mask._copy(**sizes, padding_BK=padding_BK, fixed_length=False, last_queries=True)
