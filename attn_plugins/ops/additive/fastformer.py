"""Fastformer, and the additive pooling that it is made of: softmax averages over a sequence or over all its prefixes.

Letters beside the legend's: T tokens pooled, N chunks of C.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.attention import contiguous_segments
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, masked_softmax


class FastformerWeights(NamedTuple):
    """What Fastformer learns, a query head each."""

    query: torch.Tensor
    """w_q, (H, D)."""
    key: torch.Tensor
    """w_k, (H, D)."""
    transform: torch.Tensor
    """W, (H, V, V)."""
    residual: torch.Tensor
    """(H,)."""
    resize: torch.Tensor | None
    """From D to V where they differ, (H, V, D)."""


def dense_fastformer(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    weights: FastformerWeights,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with the pools' weights as whole matrices.

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK of the pool that makes the global key).
    """
    q, k, v, weights, mask = _prepare(q_BHQD, k_BGKD, v_BGKV, weights, mask)
    with torch.autocast(q.device.type, enabled=False):
        visible = _mask(mask, k.shape[2], k.shape[2]).dense()
        source = k if mask.causal else q
        g_BHKD = masked_softmax(_logits(source, weights.query, scale).unsqueeze(2), visible) @ source
        p_BHKD = g_BHKD * k
        w_BHKK = masked_softmax(_logits(p_BHKD, weights.key, scale).unsqueeze(2), visible)
        w_BHQK = w_BHKK[:, :, k.shape[2] - q.shape[2] :]
        seen = visible.any(dim=-1, keepdim=True)[:, :, k.shape[2] - q.shape[2] :]
        return _finish(q, w_BHQK @ p_BHKD, v, seen, weights).to(v_BGKV.dtype), w_BHQK


def fastformer(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    weights: FastformerWeights,
    scale: float,
    chunk_size: int,
) -> torch.Tensor:
    """The same in O(K D) time, causal in O(K chunk_size D), and linear memory: out_BHQV in the dtype of v."""
    q, k, v, weights, mask = _prepare(q_BHQD, k_BGKD, v_BGKV, weights, mask)
    segments_BK = contiguous_segments(mask) if mask.causal else _numbered_segments(mask)

    def average(logits_BHT, x_BHTD):
        if mask.padding_BK is not None:
            logits_BHT = torch.where(mask.padding_BK.unsqueeze(1), logits_BHT, MASKED_SCORE)
        if mask.causal:
            return pool_prefixes(logits_BHT, x_BHTD, segments_BK, chunk_size)
        return pool(logits_BHT, x_BHTD, segments_BK)

    with torch.autocast(q.device.type, enabled=False):
        source = k if mask.causal else q
        g_BHKD, _ = average(_logits(source, weights.query, scale), source)
        p_BHKD = g_BHKD * k
        global_key, lse = average(_logits(p_BHKD, weights.key, scale), p_BHKD)
        seen = ~(lse <= MASKED_SCORE / 2).unsqueeze(3)  # what is not a number was seen
        if mask.causal:
            global_key, seen = global_key[:, :, k.shape[2] - q.shape[2] :], seen[:, :, k.shape[2] - q.shape[2] :]
        return _finish(q, global_key, v, seen, weights).to(v_BGKV.dtype)


def fastformer_from(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    *,
    weights: FastformerWeights,
    scale: float,
    chunk_size: int,
) -> torch.Tensor:
    """The same, causal, for the last Q of K new tokens, which the state takes in: out_BHQV in the dtype of v.

    Args:
        mask: of all tokens, which may end with some that come later.
        state: what the tokens before add up to, ``query_pool`` and ``query_max``, ``key_pool`` and ``key_max``,
            (B, H, D + 1) and (B, H) each, see :class:`_Pool`.
    """
    weights, (heads, size) = _cast_weights(weights, accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)), weights.query.shape
    pools, maxima = ("query_pool", "key_pool"), ("query_max", "key_max")
    state.start(k_BGKD, v_BGKV, **dict.fromkeys(pools, (heads, size + 1)), **dict.fromkeys(maxima, (heads,)))

    def attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        number, dtype, held = k.shape[2], weights.query.dtype, state.tensors
        not_padding_BK, own = state.not_padding(mask, number), slice(number - q.shape[2], None)
        k_BHKD, v_BHQV = (expand_heads(x.to(dtype), heads) for x in (k, v[:, :, own]))

        def logits(x_BHTD: torch.Tensor, w_HD: torch.Tensor) -> torch.Tensor:
            found = _logits(x_BHTD, w_HD, scale)
            return found if not_padding_BK is None else torch.where(not_padding_BK.unsqueeze(1), found, MASKED_SCORE)

        before = _Pool(held["query_pool"], held["query_max"])
        g_BHKD, _, query = _continue(before, logits(k_BHKD, weights.query), k_BHKD, chunk_size)
        p_BHKD = g_BHKD * k_BHKD
        before = _Pool(held["key_pool"], held["key_max"])
        c_BHKD, lse, key = _continue(before, logits(p_BHKD, weights.key), p_BHKD, chunk_size)
        state.commit(
            number, query_pool=query.sums, query_max=query.running_max, key_pool=key.sums, key_max=key.running_max
        )
        seen = ~(lse[:, :, own] <= MASKED_SCORE / 2).unsqueeze(3)
        return _finish(q.to(dtype), c_BHKD[:, :, own], v_BHQV, seen, weights).to(v.dtype)

    return chunked_prefill(attend_chunk, q_BHQD, k_BGKD, v_BGKV)


class _Pool(NamedTuple):
    """Tokens pooled so far: sums of e^(logit - running_max) [x, 1], (B, H, D + 1), and the largest logit, (B, H)."""

    sums: torch.Tensor
    running_max: torch.Tensor

    def add(self, logits_BHT: torch.Tensor, x_BHTD: torch.Tensor) -> "_Pool":
        """With these tokens too; those MASKED_SCORE are nothing beside any other."""
        new_max = torch.maximum(self.running_max, logits_BHT.detach().amax(dim=2))
        e_BHT = torch.exp(logits_BHT - new_max.unsqueeze(2))
        more = (e_BHT.unsqueeze(2) @ pad(x_BHTD, (0, 1), value=1.0)).squeeze(2)
        return _Pool(self.sums * torch.exp(self.running_max - new_max).unsqueeze(2) + more, new_max)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The average, as that of one token, (B, H, 1, D), and the log-sum-exp of its logits, (B, H, 1)."""
        total = self.sums[..., -1:].clamp_min(torch.finfo(self.sums.dtype).tiny)
        return (self.sums[..., :-1] / total).unsqueeze(2), self.running_max.unsqueeze(2) + total.log()


def _continue(
    before: _Pool, logits_BHT: torch.Tensor, x_BHTD: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, _Pool]:
    """(pooled_BHTD, log-sum-exp (B, H, T), the pool with all of these tokens)."""
    after = before.add(logits_BHT, x_BHTD)
    if x_BHTD.shape[2] == 1:
        return *after.read(), after
    # What was pooled before stands for one token that comes first.
    first, lse = before.read()
    longer = (torch.cat([lse, logits_BHT], dim=2), torch.cat([first, x_BHTD], dim=2))
    pooled, lse = pool_prefixes(*longer, None, chunk_size)
    return pooled[:, :, 1:], lse[:, :, 1:], after


def _prepare(q_BHQD, k_BGKD, v_BGKV, weights, mask):
    """Everything in at least float32, keys repeated to the query heads, and no keys after the last query if causal."""
    dtype, heads, (queries, keys) = (
        accumulation_dtype(q_BHQD, k_BGKD, v_BGKV),
        q_BHQD.shape[1],
        (q_BHQD.shape[2], k_BGKD.shape[2]),
    )
    if not mask.causal and queries != keys:
        raise ValueError(
            f"bidirectional fastformer pools the queries of all tokens, got {queries} queries and {keys} keys; "
            "allowed: as many queries as keys"
        )
    seen = keys
    if mask.causal and mask.q_offset - mask.kv_offset + queries < keys:
        # A cache of fixed length holds room for keys to come.
        seen = mask.q_offset - mask.kv_offset + queries
        mask = _mask(mask, queries, seen)
    k_BHKD, v_BHKV = (expand_heads(x[:, :, :seen].to(dtype), heads) for x in (k_BGKD, v_BGKV))
    return q_BHQD.to(dtype), k_BHKD, v_BHKV[:, :, seen - queries :], _cast_weights(weights, dtype), mask


def _cast_weights(weights: FastformerWeights, dtype: torch.dtype) -> FastformerWeights:
    return weights._replace(**{name: w.to(dtype) for name, w in weights._asdict().items() if w is not None})


def _mask(mask: AttentionMask, queries: int, keys: int) -> AttentionMask:
    """The plain mask of the last ``queries`` of the first ``keys`` tokens."""
    padding_BK = None if mask.padding_BK is None else mask.padding_BK[:, :keys]
    segments_BK = None if mask.segments_BK is None else mask.segments_BK[:, :keys]
    return AttentionMask(
        mask.batch_size,
        queries,
        keys,
        causal=mask.causal,
        padding_BK=padding_BK,
        segments_BK=segments_BK,
        device=mask.device,
    )


def _logits(x_BHTD: torch.Tensor, w_HD: torch.Tensor, scale: float) -> torch.Tensor:
    return (x_BHTD @ w_HD.unsqueeze(2)).squeeze(3) * scale


def _finish(q_BHQD, global_key, v_BHQV, seen, weights: FastformerWeights) -> torch.Tensor:
    """W (global key * v) + residual * q, and zeros where nothing was seen."""
    if weights.resize is not None:
        q_BHQD, global_key = q_BHQD @ weights.resize.mT, global_key @ weights.resize.mT
    out_BHQV = (global_key * v_BHQV) @ weights.transform.mT + weights.residual[:, None, None] * q_BHQD
    return torch.where(seen, out_BHQV, 0.0)


def _numbered_segments(mask: AttentionMask) -> torch.Tensor | None:
    """The mask's segments as numbers from 0 on in each row, by no more than sorting them."""
    segments_BK = mask.segments_BK
    if segments_BK is None:
        return None

    def number() -> torch.Tensor:
        ordered_BK, order_BK = segments_BK.sort(dim=1)
        number_BK = pad((ordered_BK[:, 1:] != ordered_BK[:, :-1]).long().cumsum(1), (1, 0))
        return torch.zeros_like(number_BK).scatter(1, order_BK, number_BK)

    return mask.cached("numbered segments", number)


def pool(
    logits_BHT: torch.Tensor, x_BHTD: torch.Tensor, segments_BT: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax average of all x, or for each token of those in its own segment; logits MASKED_SCORE are left out.

    Args:
        segments_BT: numbers from 0 to T - 1.

    Returns:
        (pooled (B, H, 1 or T, D), largest logit pooled (B, H, 1 or T), MASKED_SCORE where nothing is visible).
    """
    if segments_BT is None:
        return logits_BHT.softmax(dim=-1).unsqueeze(2) @ x_BHTD, logits_BHT.amax(dim=-1, keepdim=True)
    at_BHT = segments_BT.unsqueeze(1).expand_as(logits_BHT)
    top_BHT = (
        torch.full_like(logits_BHT, MASKED_SCORE)
        .scatter_reduce(2, at_BHT, logits_BHT.detach(), "amax")
        .gather(2, at_BHT)
    )
    e_BHT = torch.exp(logits_BHT - top_BHT)
    total_BHT = torch.zeros_like(e_BHT).scatter_add(2, at_BHT, e_BHT).gather(2, at_BHT)
    at_BHTD = at_BHT.unsqueeze(3).expand_as(x_BHTD)
    weighted = x_BHTD * (e_BHT / total_BHT).unsqueeze(3)
    return torch.zeros_like(x_BHTD).scatter_add(2, at_BHTD, weighted).gather(2, at_BHTD), top_BHT


def pool_prefixes(
    logits_BHT: torch.Tensor, x_BHTD: torch.Tensor, segments_BT: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax average, for each token, of x up to and including it, within its segment, in O(T chunk_size D).

    Chunks are pooled outright. What comes before a chunk is the prefix pool of the chunks' own pools, so this calls
    itself on a sequence shorter by ``chunk_size``; the two are joined by their log-sum-exp, which never overflows.

    Args:
        logits_BHT: MASKED_SCORE where a token is not visible.
        segments_BT: in one piece each.

    Returns:
        (pooled_BHTD, log-sum-exp of the logits pooled, (B, H, T), near MASKED_SCORE where nothing is visible).
    """
    batch, heads, length, size = x_BHTD.shape
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    rest = chunks * chunk_size - length
    logits = pad(logits_BHT, (0, rest), value=MASKED_SCORE).view(batch, heads, chunks, 1, chunk_size)
    x = pad(x_BHTD, (0, 0, 0, rest)).view(batch, heads, chunks, chunk_size, size)
    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    own_BNC = None
    if segments_BT is not None:
        own_BNC = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, rest)], dim=1).view(-1, chunks, chunk_size)
        visible = (visible & (own_BNC.unsqueeze(3) == own_BNC.unsqueeze(2))).unsqueeze(1)
    scores_BHNCC = torch.where(visible, logits, MASKED_SCORE)
    lse = scores_BHNCC.logsumexp(dim=-1, keepdim=True)
    pooled = torch.exp(scores_BHNCC - lse) @ x
    if chunks > 1:
        # The last row of a chunk is the pool of its last segment: that is what goes on into the next chunk.
        labels_BN = None if own_BNC is None else own_BNC[:, :, -1]
        before, before_lse = pool_prefixes(lse[:, :, :, -1, 0], pooled[:, :, :, -1], labels_BN, chunk_size)
        before, before_lse = before[:, :, :-1, None], before_lse[:, :, :-1, None, None]
        if own_BNC is not None and labels_BN is not None:
            goes_on = (own_BNC[:, 1:] == labels_BN[:, :-1, None])[:, None, :, :, None]
            before_lse = torch.where(goes_on, before_lse, MASKED_SCORE)
        share = torch.sigmoid(before_lse - lse[:, :, 1:])
        later = torch.lerp(pooled[:, :, 1:], before.expand_as(pooled[:, :, 1:]), share.expand_as(pooled[:, :, 1:]))
        pooled = torch.cat([pooled[:, :, :1], later], dim=2)
        lse = torch.cat([lse[:, :, :1], torch.logaddexp(before_lse, lse[:, :, 1:])], dim=2)
    return pooled.flatten(2, 3)[:, :, :length], lse.flatten(2)[:, :, :length]
