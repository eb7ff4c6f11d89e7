"""Softmax attention over the pairs that a structure shows, at the cost of these: as index tables, for every device.

What stands together in a structure becomes tiles: a group of tokens is a dense tile of its queries and its keys, a list
of neighbours a tile of one query. Tiles of about the same size are a table, and all tiles of a table are gathered and
multiplied at once. A query that sees keys by several relations gets its parts merged by their log-sum-exp.

How large tables are follows from the structure, which is data on the host; so no device is asked for a value.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.relations import Edges, Groups, Relation
from attn_plugins.core.structure import Structure
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, in_query_chunks, visible_pairs
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.batched import attend_tables
from attn_plugins.ops.softmax.tables import ALIGNMENT, Tables, tables_of

ROWS = 64
"""Queries of a tile at most."""

COST_OF_A_TABLE = 4
"""Scores a token that merging one more table costs about as much as: less than these are hidden rather."""

ON_CPU = 1 << 19
"""Elements that are worked on at a time on a CPU, so that they stay in its cache."""


class _Chunks(NamedTuple):
    """Runs of a row's queries that see the same keys, and where both stand in lists of tokens."""

    queries: torch.Tensor
    q_begin: torch.Tensor
    q_end: torch.Tensor
    keys: torch.Tensor
    k_begin: torch.Tensor
    k_end: torch.Tensor


def structured_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    label_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """out_BHQV of the pairs that ``mask`` shows, whose structure says where they are.

    Args:
        label_bias: (H, labels) added to the scores of pairs by their label in the structure, or None.
        options: scale, dropout, position_bias, softcap and sinks, as in
            :meth:`attn_plugins.core.attention.Attention.forward`.
    """
    labelled = label_bias is not None
    tables = mask.cached(("structure", labelled), lambda: tuple(structure_tables(mask, labelled=labelled)))
    at_once = ON_CPU if q_BHQD.device.type == "cpu" else 0
    return attend_tables(q_BHQD, k_BGKD, v_BGKV, tables, label_bias=label_bias, at_once=at_once, **options)


def attend_to_all(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    batched: bool,
    position_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """out_BHQV of all pairs that a mask without a structure shows, some queries at a time."""

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        seen, bias = visible_pairs(mask, queries, keys), bias_of(position_bias, queries, keys)
        inputs = (q_BHQD[:, :, queries], k_BGKD[:, :, keys], v_BGKV[:, :, keys], seen)
        return dense_attention(*inputs, position_bias=bias, dropout=dropout, **options)[0]

    if batched:
        return in_large_chunks(attend, mask, q_BHQD.shape[1], dropout=dropout)
    return in_query_chunks(attend, mask, 2 * ROWS, dropout=dropout)


def structure_tables(mask: AttentionMask, *, labelled: bool = False) -> Iterator[Tables]:
    """Tables in which every visible pair is visible just once: in that of the first relation that shows it."""
    structure = mask.structure
    assert structure is not None
    bare = mask.with_structure(None)
    places = structure.cached("places", lambda: [_moved(one, mask.device) for one in _places(structure.host)])
    for number, q_BTR, k_BTC in places:
        own, before = structure.relations[number], structure.relations[:number]

        def sees(mask, q, k, own=own, before=before):
            """Of a tile's queries and keys it is known that they are in the same group, or an edge."""
            shown = k >= 0
            if isinstance(own, Groups):
                shown = own.shows_within(q, k, shown)
            for one in before:
                shown = shown & ~one.shows(mask, q, k)
            return shown

        table = tables_of(bare, sees, q_BTR, k_BTC)
        if labelled:
            q, k = (index.clamp(min=0) for index in (table.q_BTR.unsqueeze(3), table.k_BTC.unsqueeze(2)))
            labels = own.labels_of(mask, q, k)
            labels = labels if isinstance(labels, torch.Tensor) else torch.full_like(q, labels)
            table = table._replace(label_BTRC=labels.expand(table.hidden_BTRC.shape))
        yield table


def _moved(
    place: tuple[int, torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[int, torch.Tensor, torch.Tensor]:
    number, q_BTR, k_BTC = place
    return number, q_BTR.to(device), k_BTC.to(device)


def _places(structure: Structure) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(Number of the relation, queries (B or 1, T, R), keys (B or 1, T, C)) of each table, -1 for none."""
    found = []
    for number, relation in enumerate(structure.relations):
        rows = list(_rows(relation, structure.num_tokens))
        widths = torch.cat([row.k_end - row.k_begin for row in rows])
        for low, high in _ranges(widths, structure.num_tokens * len(rows)):
            chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
            for row in rows:
                width = row.k_end - row.k_begin
                here = (width > low) & (width <= high)
                queries = _taken(row.queries, row.q_begin[here], row.q_end[here])
                chosen.append((queries, _taken(row.keys, row.k_begin[here], row.k_end[here])))
            q_TR, k_TC = zip(*chosen, strict=True)
            found.append((number, _together(q_TR), _together(k_TC)))
    nobody = torch.full((1, 1, 1), -1, device="cpu")
    return found or [(0, nobody, nobody)]


def _ranges(widths: torch.Tensor, tokens: int) -> list[tuple[int, int]]:
    """Ranges (low, high] of numbers of keys that go into one table each.

    Each ends a quarter to a half above the one before, or further where that costs less than another table.
    """
    if not len(widths):
        return []
    bounds = [ALIGNMENT]
    most = int(widths.max())
    while bounds[-1] < most:
        step = 1 << max(3, (bounds[-1]).bit_length() - 2)  # by a half to a quarter, in multiples of the alignment
        bounds.append(bounds[-1] + step)
    ranges: list[tuple[int, int]] = []
    for at, high in enumerate(bounds):
        low = ranges[-1][1] if ranges else 0
        number = int(((widths > low) & (widths <= high)).sum())
        wider = bounds[at + 1] if at + 1 < len(bounds) else None
        if number and (wider is None or number * (wider - high) > COST_OF_A_TABLE * tokens):
            ranges.append((low, high))
    return ranges


def _rows(relation: Relation, length: int) -> Iterator[_Chunks]:
    if isinstance(relation, Edges):
        for starts, columns in zip(relation.starts_BN, relation.columns_BE, strict=True):
            seeing = (starts[1:] > starts[:-1]).nonzero().flatten()
            at = torch.arange(len(seeing), device="cpu")
            yield _Chunks(seeing, at, at + 1, columns, starts[seeing], starts[seeing + 1])
        return
    for q_N, k_N in zip(relation.q_BN, relation.k_BN, strict=True):
        queries, q_group = _by_group(q_N)
        keys, k_group = _by_group(k_N)
        first = torch.searchsorted(q_group, q_group)  # of each group, among the sorted queries
        at = torch.arange(len(queries), device="cpu")
        begin = ((at - first) % ROWS == 0).nonzero().flatten()
        end = torch.searchsorted(q_group, q_group[begin], right=True).minimum(begin + ROWS)
        low, high = (torch.searchsorted(k_group, q_group[begin], right=right) for right in (False, True))
        if relation.window_size is not None:
            order, reach = k_group * length + keys, relation.window_size - 1
            group = q_group[begin] * length
            nearest = group + (queries[begin] - reach).clamp(min=0)
            farthest = group + (queries[end - 1] + reach).clamp(max=length - 1)
            low, high = torch.searchsorted(order, nearest), torch.searchsorted(order, farthest, right=True)
        some = high > low
        yield _Chunks(queries, begin[some], end[some], keys, low[some], high[some])


def _by_group(group_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Tokens in groups, group after group, each in ascending order; their groups)."""
    order = group_N.argsort(stable=True)
    order = order[group_N[order] >= 0]
    return order, group_N[order]


def _taken(tokens: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(T, most) parts of a list from each beginning to its end, -1 behind it."""
    most = int((end - begin).max()) if len(begin) else 0
    at = begin.unsqueeze(1) + torch.arange(most, device="cpu")
    return tokens[at.clamp(max=max(len(tokens) - 1, 0))].masked_fill(at >= end.unsqueeze(1), -1)


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, T, most) of tables of the rows of a batch, -1 where a row has less."""
    tiles, most = (max(part.shape[side] for part in parts) for side in (0, 1))
    joined = torch.full((len(parts), tiles, most), -1, device="cpu")
    for row, part in enumerate(parts):
        joined[row, : part.shape[0], : part.shape[1]] = part
    return joined


def dense_labels(mask: AttentionMask) -> torch.Tensor:
    """The label of every pair in the mask's structure, (B or 1, Q, K), -1 for none: for the reference form."""
    assert mask.structure is not None
    q_index = torch.arange(mask.q_length, device=mask.device).view(1, -1, 1) + mask.q_offset
    k_index = mask.key_positions(torch.arange(mask.kv_length, device=mask.device).view(1, 1, -1))
    return mask.structure.labels(mask, q_index, k_index)
