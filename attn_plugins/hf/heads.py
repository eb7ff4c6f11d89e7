"""Queries, keys and values as they arrive at the bridge: they fit each other before an attention sees them."""

import torch

from attn_plugins.ops.reference import expand_heads


def fitted(
    caller: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of as many rows as the keys, and keys and values of as many heads.

    Some models share keys among more heads than values (Nemotron 3's audio encoders), as torch's own attention allows.

    Raises:
        ValueError: they do not fit; the message begins with ``caller``.
    """
    given = {"queries": query, "keys": key, "values": value}

    def spelled() -> str:
        return ", ".join([f"{name} {tuple(held.shape)}" for name, held in given.items()])

    if any(held.ndim != 4 for held in given.values()):
        raise ValueError(f"{caller} gives its attention {spelled()}; allowed: (rows, heads, length, size) each")
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries, the same for every row (granite_speech)
        query = query.expand(key.shape[0], -1, -1, -1)
    heads, shared = query.shape[1], (key.shape[1], value.shape[1])
    needs = {
        "as many rows in all": query.shape[0] == key.shape[0] == value.shape[0],
        "keys as long as values": key.shape[2] == value.shape[2],
        "queries and keys of one size": query.shape[3] == key.shape[3],
        "key and value heads that divide the query heads, and each other": all(
            more > 0 and less > 0 and more % less == 0
            for more, less in ((heads, max(shared)), (max(shared), min(shared)))
        ),
    }
    for allowed, holds in needs.items():
        if not holds:
            raise ValueError(f"{caller} gives its attention {spelled()}; allowed: {allowed}")
    if len({held.device for held in given.values()}) > 1:
        devices = ", ".join(f"{name} on {held.device}" for name, held in given.items())
        raise ValueError(f"{caller} gives its attention {devices}; allowed: one device")
    return query, expand_heads(key, max(shared)), expand_heads(value, max(shared))
