"""Attention to a few keys that all queries see and along a few diagonals: O(N (vertical_size + slash_size) D).

Letter beside the legend's: S sampled queries.
"""

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks import batched
from attn_plugins.ops.blocks.gather import PairTiles, gathered_attention
from attn_plugins.ops.reference import masked_softmax, scores

ROWS = 64
"""Queries that are multiplied with the vertical keys at a time."""
BATCHED_ROWS = 1024
"""The same where a device is not a CPU: a gradient of the vertical keys is added up for each."""
KEYS_AT_ONCE = 2**16
"""Keys along diagonals that are copied at a time."""


def sample(mask: AttentionMask, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``number`` real tokens of each row, evenly spaced: (B, S) positions and whether there is one."""

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        not_padding_BK = torch.ones(mask.batch_size, mask.kv_length, dtype=torch.bool, device=mask.device)
        if mask.padding_BK is not None:
            not_padding_BK = mask.padding_BK.expand(mask.batch_size, -1)
        count = not_padding_BK.sum(dim=1, keepdim=True)
        taken = count.clamp(max=number)
        slot = torch.arange(min(number, mask.kv_length), device=mask.device)
        rank = (2 * slot + 1) * count // (2 * taken).clamp(min=1)  # the middle of each of ``taken`` equal parts
        index = (~not_padding_BK).long().argsort(dim=1, stable=True)
        return index.gather(1, rank.clamp(max=mask.kv_length - 1)), slot < taken

    return mask.cached(("sample", number), build)


@torch.no_grad()
def choose(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    mask: AttentionMask,
    *,
    vertical_size: int,
    slash_size: int,
    last_q: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the diagonals of highest weight, summed over the sampled queries, of each head.

    Returns:
        (B, H, K) bool, keys that all queries see; (B, H, at most slash_size) distances from query to key, the first of
        them 0, and 0 again where there are fewer.

    Raises:
        ValueError: there are other queries than keys.
    """
    if mask.q_length != mask.kv_length:
        raise ValueError(
            f"attention 'vertical_slash' takes a sample of all queries, got {mask.q_length} queries and "
            f"{mask.kv_length} keys; allowed: as many queries as keys"
        )
    at_BS, there_BS = sample(mask, last_q)
    batch, heads, length = *q_BHQD.shape[:2], mask.kv_length
    q_BHSD = q_BHQD.gather(2, at_BS[:, None, :, None].expand(-1, heads, -1, q_BHQD.shape[3]))
    visible = there_BS.unsqueeze(2)
    if mask.padding_BK is not None:
        visible = visible & mask.padding_BK.unsqueeze(1)
    weights_BHSK = masked_softmax(scores(q_BHSD, k_BGKD, scale=scale), visible.unsqueeze(1))
    vertical = weights_BHSK.sum(dim=2)
    best = vertical.topk(min(vertical_size, length), dim=-1)
    all_see = torch.zeros(vertical.shape, dtype=torch.bool, device=vertical.device)
    all_see.scatter_(2, best.indices, best.values > 0)
    # Distances -(K - 1)..K - 1 are counted at 0..2 K - 2.
    middle = length - 1
    distance = torch.arange(length, device=at_BS.device) - at_BS.unsqueeze(2) + middle
    slash = weights_BHSK.new_zeros(batch, heads, 2 * length - 1)
    slash.scatter_add_(2, distance.unsqueeze(1).expand(weights_BHSK.shape).flatten(2), weights_BHSK.flatten(2))
    slash[..., middle] = torch.inf
    best = slash.topk(min(slash_size, 2 * length - 1), dim=-1)
    return all_see, (best.indices - middle) * (best.values > 0)


def dense_visible(all_see_BHK: torch.Tensor, distance_BHS: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, K) bool: the definition, through the whole matrix."""
    length = all_see_BHK.shape[2]
    along = all_see_BHK.new_zeros(*all_see_BHK.shape[:2], 2 * length - 1)
    along.scatter_(2, distance_BHS + length - 1, 1)
    j = torch.arange(length, device=along.device)
    return all_see_BHK.unsqueeze(2) | along[..., j - j.unsqueeze(1) + length - 1]


def parts_of(
    all_see_BHK: torch.Tensor, distance_BHS: torch.Tensor, mask: AttentionMask, groups: int
) -> list[PairTiles]:
    """Tiles of all pairs, each once: the keys that all queries see, then what else lies on the diagonals."""
    (batch, heads, length), device = all_see_BHK.shape, all_see_BHK.device
    head = torch.arange(batch * heads, device=device)
    first_key = head // (heads // groups) * length  # numbers go by row, head and position
    all_see = all_see_BHK.flatten(0, 1)
    parts = []
    most = int(all_see.sum(dim=1).max())
    if most:
        keys = all_see.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        rows = torch.nn.functional.pad(torch.arange(length, device=device), (0, -length % ROWS), value=-1).view(
            -1, ROWS
        )
        rows = torch.where(rows < 0, -1, rows + length * head[:, None, None])
        held = all_see.gather(1, keys)
        not_padding_XC = None if bool(held.all()) else held
        parts.append(
            PairTiles(
                rows.flatten(0, 1),
                first_key[:, None] + keys,
                not_padding_XC,
                head.repeat_interleave(rows.shape[1]),
                None,
            )
        )
    distance = distance_BHS.flatten(0, 1)[:, None]
    counts = torch.ones_like(distance, dtype=torch.bool)
    counts[..., 1:] = distance[..., 1:] != 0
    not_padding_BK = (
        None if mask.padding_BK is None else mask.padding_BK.expand(batch, -1).repeat_interleave(heads, dim=0)
    )
    step = max(1, KEYS_AT_ONCE // (batch * heads * distance.shape[2]))
    for low in range(0, length, step):
        i = torch.arange(low, min(low + step, length), device=device)
        keys = i[:, None] + distance
        inside = keys.clamp(0, length - 1)
        not_padding = (keys == inside) & counts & ~all_see.gather(1, inside.flatten(1)).view(keys.shape)
        if not_padding_BK is not None:
            not_padding &= not_padding_BK.gather(1, inside.flatten(1)).view(keys.shape)
        rows = (length * head[:, None] + i).view(-1, 1)
        keys = (first_key[:, None, None] + inside).flatten(0, 1)
        parts.append(PairTiles(rows, keys, not_padding.flatten(0, 1), torch.arange(len(rows), device=device), None))
    return parts


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def vertical_slash_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    **sizes: int,
) -> torch.Tensor:
    """Softmax attention over the keys and along the diagonals that :func:`choose` chooses.

    Args:
        mask: bidirectional, of padding only.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    parts = parts_of(*choose(q_BHQD, k_BGKD, mask, scale=scale, **sizes), mask, k_BGKD.shape[1])
    return gathered_attention(q_BHQD, k_BGKD, v_BGKV, mask, parts, scale=scale, dropout=dropout)


def batched_parts_of(
    all_see_BHK: torch.Tensor, distance_BHS: torch.Tensor, mask: AttentionMask, groups: int, vertical_size: int
) -> list[batched.PairTiles]:
    """As :func:`parts_of`, with as many vertical keys as there can be; a query has one pair in each part."""
    (batch, heads, length), device = all_see_BHK.shape, all_see_BHK.device
    none, head = batch * groups * length, torch.arange(batch * heads, device=device)
    first_key = head // (heads // groups) * length
    all_see = all_see_BHK.flatten(0, 1)

    def part(pair_TR, block_T, keys_XC, there_XC):
        keys_XC = torch.where(there_XC, keys_XC, none).to(torch.int32 if none < 2**31 else torch.int64)
        # Of its own: Dynamo takes no tensor twice.
        last_N = torch.nn.functional.pad(torch.zeros(batch * heads * length, device=device), (0, 1), value=-1)
        return batched.PairTiles(pair_TR, block_T, keys_XC, 1, batched.not_visible, ((~there_XC).byte(), last_N))

    parts = []
    if vertical_size:
        held, keys = all_see.float().topk(min(vertical_size, length), dim=1, sorted=False)
        size = min(BATCHED_ROWS, length)
        i = torch.arange(-(-length // size) * size, device=device)
        rows = torch.where(i < length, i + length * head[:, None], batch * heads * length).view(-1, size)
        tiles = head.repeat_interleave(len(rows) // len(head), output_size=len(rows))
        parts.append(part(rows, tiles, first_key[:, None] + keys, held > 0))
    distance = distance_BHS.flatten(0, 1)[:, None]
    keys = torch.arange(length, device=device)[:, None] + distance
    inside = keys.clamp(0, length - 1)
    there = all_see
    if mask.padding_BK is not None:
        padding = ~mask.padding_BK.expand(batch, -1).repeat_interleave(heads, dim=0, output_size=batch * heads)
        there = there | padding
    there = (keys == inside) & ~there.gather(1, inside.flatten(1)).view(keys.shape)
    there[..., 1:] &= distance[..., 1:] != 0
    rows = torch.arange(batch * heads * length, device=device)
    keys = (first_key[:, None, None] + inside).flatten(0, 1)
    return [*parts, part(rows.unsqueeze(1), rows, keys, there.flatten(0, 1))]


def batched_vertical_slash_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
    **sizes: int,
) -> torch.Tensor:
    """As :func:`vertical_slash_attention`, in operations of a fixed number without a sync; may be traced."""
    chosen = choose(q_BHQD, k_BGKD, mask, scale=scale, **sizes)
    parts = batched_parts_of(*chosen, mask, k_BGKD.shape[1], sizes["vertical_size"])
    return batched.batched_gathered_attention(q_BHQD, k_BGKD, v_BGKV, parts, scale=scale, dropout=dropout)[0]
