"""Queries, keys and values as they arrive at the bridge: they fit each other before an attention sees them."""

import torch
from torch import nn

from attn_plugins.ops.reference import expand_heads


def fitted(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of as many rows as the keys, and keys and values of as many heads.

    Some models share keys among more heads than values (Nemotron 3's audio encoders), as torch's own attention allows.

    Raises:
        ValueError: they do not fit; the message begins with the class of the module.
    """
    shapes = query.shape, key.shape, value.shape
    if shapes[1] == shapes[2] and query.device == key.device == value.device and len(shapes[0]) == len(shapes[1]) == 4:
        (rows, heads, _, size), (key_rows, key_heads, _, key_size), _ = shapes
        if rows == key_rows and size == key_size and key_heads and not heads % key_heads:
            return query, key, value  # as nearly all models have them
    given = {"queries": query, "keys": key, "values": value}
    if not query.ndim == key.ndim == value.ndim == 4:
        raise _refusal(module, given, "(rows, heads, length, size) each")
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries, the same for every row (granite_speech)
        query = query.expand(key.shape[0], -1, -1, -1)
    (rows, heads, _, size), (key_rows, key_heads, length, key_size) = query.shape, key.shape
    most, least = max(key_heads, value.shape[1]), min(key_heads, value.shape[1])
    if not rows == key_rows == value.shape[0]:
        raise _refusal(module, given, "as many rows in all")
    if length != value.shape[2]:
        raise _refusal(module, given, "keys as long as values")
    if size != key_size:
        raise _refusal(module, given, "queries and keys of one size")
    if least == 0 or heads % most or most % least:
        raise _refusal(module, given, "key and value heads that divide the query heads, and each other")
    if not query.device == key.device == value.device:
        devices = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"{type(module).__name__} gives its attention {devices}; allowed: one device")
    return query, expand_heads(key, most), expand_heads(value, most)


def _refusal(module: nn.Module, given: dict[str, torch.Tensor], allowed: str) -> ValueError:
    got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
    return ValueError(f"{type(module).__name__} gives its attention {got}; allowed: {allowed}")
