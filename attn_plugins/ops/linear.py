"""Linear attention: out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps) over the visible keys j.

Sums, states and denominators are float32 whatever the dtype of the inputs (float64 stays), and autocast is kept out.
"""

import torch
from torch.nn.functional import pad

from attn_plugins.mask import AttentionMask
from attn_plugins.ops.causal_linear import causal_linear
from attn_plugins.ops.dense import expand_heads, wide
from attn_plugins.ops.feature_maps import FEATURE_MAPS

Projection = torch.Tensor | None
"""(heads, D, D), applied to queries or keys before the feature map: x -> W x; None is the identity."""


def project(x_BHTD: torch.Tensor, projection: Projection) -> torch.Tensor:
    """W x for each head, in at least float32."""
    x_BHTD = x_BHTD.to(wide(x_BHTD))
    return x_BHTD if projection is None else x_BHTD @ projection.to(x_BHTD.dtype).mT


def dense_linear_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor,
    *,
    feature_map: str,
    eps: float,
    query_projection: Projection = None,
    key_projection: Projection = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention through its whole matrix of weights: the definition.

    Args:
        visible: bool, broadcastable to (B, H, Q, K).

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32; a row adds up to 1 up to ``eps``).
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        features = FEATURE_MAPS[feature_map].features
        fq_BHQF, fk_BGKF = features(project(q_BHQD, query_projection)), features(project(k_BGKD, key_projection))
        a_BHQK = fq_BHQF @ expand_heads(fk_BGKF, q_BHQD.shape[1]).mT
        a_BHQK = a_BHQK.masked_fill(~visible, 0.0)
        weights_BHQK = a_BHQK / (a_BHQK.sum(dim=-1, keepdim=True) + eps)
        out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


def linear_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    feature_map: str,
    chunk_size: int,
    eps: float,
    query_projection: Projection = None,
    key_projection: Projection = None,
) -> torch.Tensor:
    """The same in O((Q + K) F (chunk_size + V)) time and linear memory.

    Causal: chunks of ``chunk_size`` with a state carried between them; keys before the first query are summed into the
    state that the first chunk starts from. Otherwise: one sum over all keys. Few queries, as in decoding, read the keys
    one by one where that is less work than a state.

    Args:
        mask: plain. Segments must be contiguous.

    Returns:
        out_BHQV in the dtype of v.

    Raises:
        ValueError: a segment goes on after another one began, or queries lie outside the keys.
    """
    queries, features, value_dim = q_BHQD.shape[2], q_BHQD.shape[3] * FEATURE_MAPS[feature_map].factor, v_BGKV.shape[3]
    if queries * (features + value_dim) <= features * value_dim:
        projections = {"query_projection": query_projection, "key_projection": key_projection}
        return dense_linear_attention(
            q_BHQD, k_BGKD, v_BGKV, mask.dense(), feature_map=feature_map, eps=eps, **projections
        )[0]
    padding_BK, segments_BK = mask.padding_BK, contiguous_segments(mask)
    with torch.autocast(q_BHQD.device.type, enabled=False):
        dtype = wide(q_BHQD, k_BGKD, v_BGKV)
        w_q, w_k = (None if w is None else w.to(dtype) for w in (query_projection, key_projection))
        if not mask.causal and segments_BK is None:
            sums_BGFV = _sum_keys(k_BGKD, v_BGKV, w_k, feature_map, padding_BK)
            return _read(q_BHQD, w_q, feature_map, sums_BGFV, eps).to(v_BGKV.dtype)
        options = (feature_map, chunk_size, eps)
        if not mask.causal:
            return _both_ways(q_BHQD, k_BGKD, v_BGKV, w_q, w_k, padding_BK, segments_BK, *options).to(v_BGKV.dtype)

        before = mask.q_offset - mask.kv_offset
        if not 0 <= before <= k_BGKD.shape[2] - queries:
            raise ValueError(f"{queries} queries from key {before} on; allowed: queries within {k_BGKD.shape[2]} keys")
        # A cache of fixed length holds room for keys to come: nothing after the last query is visible.
        old, new = slice(0, before), slice(before, before + queries)
        state_BGFV: torch.Tensor | None = None
        if before:
            seen_BK = None if padding_BK is None else padding_BK[:, old]
            if segments_BK is not None:
                goes_on = segments_BK[:, old] == segments_BK[:, before : before + 1]
                seen_BK = goes_on if seen_BK is None else seen_BK & goes_on
            state_BGFV = _sum_keys(k_BGKD[:, :, old], v_BGKV[:, :, old], w_k, feature_map, seen_BK)
        padding_BT, segments_BT = (None if x is None else x[:, new] for x in (padding_BK, segments_BK))
        k_BGTD, v_BGTV = k_BGKD[:, :, new], v_BGKV[:, :, new]
        return causal_linear(
            q_BHQD, k_BGTD, v_BGTV, w_q, w_k, padding_BT, segments_BT, state_BGFV, *options, diagonal=0
        )[0]


def contiguous_segments(mask: AttentionMask) -> torch.Tensor | None:
    """The mask's segments, checked once a forward pass: a state can only be carried along segments in one piece."""

    def check() -> None:
        segments_BK, padding_BK = mask.segments_BK, mask.padding_BK
        assert segments_BK is not None
        runs_BK = pad((segments_BK[:, 1:] != segments_BK[:, :-1]).long().cumsum(1), (1, 0))
        for row in range(segments_BK.shape[0]):
            real = slice(None) if padding_BK is None else padding_BK[row % padding_BK.shape[0]]
            segments, runs = segments_BK[row][real].unique(), runs_BK[row][real].unique()
            if len(segments) != len(runs):
                raise ValueError(
                    f"row {row} has {len(segments)} packed sequences in {len(runs)} pieces; "
                    "allowed: each packed sequence in one piece"
                )

    if mask.segments_BK is not None:
        mask.once("contiguous segments", check)
    return mask.segments_BK


def _sum_keys(
    k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, w_k: Projection, feature_map: str, seen_BK: torch.Tensor | None
) -> torch.Tensor:
    """State of all keys that are seen: sums of phi(k) [v, 1]^T, (B, G, F, V + 1)."""
    fk_BGKF = FEATURE_MAPS[feature_map].fast_features(project(k_BGKD, w_k))
    if seen_BK is not None:
        fk_BGKF = fk_BGKF * seen_BK[:, None, :, None]
    v_one = pad(v_BGKV.to(fk_BGKF.dtype), (0, 1), value=1.0)
    return fk_BGKF.mT @ v_one


def _read(
    q_BHQD: torch.Tensor, w_q: Projection, feature_map: str, state_BGFV: torch.Tensor, eps: float
) -> torch.Tensor:
    """What queries read from one state, (B, H, Q, V)."""
    fq_BHQF = FEATURE_MAPS[feature_map].fast_features(project(q_BHQD, w_q))
    batch, heads, queries, features = fq_BHQF.shape
    totals = fq_BHQF.reshape(batch, state_BGFV.shape[1], -1, features) @ state_BGFV
    return (totals[..., :-1] / (totals[..., -1:] + eps)).view(batch, heads, queries, -1)


def _both_ways(q_BHQD, k_BGKD, v_BGKV, w_q, w_k, padding_BK, segments_BK, feature_map, chunk_size, eps):
    """Bidirectional attention within segments: what is seen reading forwards, and, without the own key, backwards."""
    before = k_BGKD.shape[2] - q_BHQD.shape[2]
    totals = []
    for turned, diagonal in ((False, 0), (True, -1)):
        q, k, v = pad(q_BHQD, (0, 0, before, 0)), k_BGKD, v_BGKV.to(wide(v_BGKV))
        rows = [padding_BK, segments_BK]
        if turned:
            q, k, v = (x.flip(2) for x in (q, k, v))
            rows = [None if x is None else x.flip(1) for x in rows]
        out, den, _ = causal_linear(q, k, v, w_q, w_k, *rows, None, feature_map, chunk_size, eps, diagonal=diagonal)
        total = torch.cat([out * (den + eps).unsqueeze(3), den.unsqueeze(3)], dim=3)
        totals.append(total.flip(2) if turned else total)
    total = totals[0] + totals[1]
    return (total[..., :-1] / (total[..., -1:] + eps))[:, :, before:]
