"""Linear attention: out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps) over the visible keys j.

Sums, states and denominators are float32 whatever the dtype of the inputs (float64 stays), and autocast is kept out.
"""

import abc
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Part
from attn_plugins.core.tracing import readable
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.chunked import causal_linear
from attn_plugins.ops.linear.features import FEATURE_MAPS, FeatureMap, Prepared, moved
from attn_plugins.ops.linear.running_max import add_sums, exp_minus_max, max_exponent
from attn_plugins.ops.parts.states import carried, of_last_text, of_text_before
from attn_plugins.ops.reference import accumulation_dtype, expand_heads

Projection = torch.Tensor | None
"""(heads, E, D), applied to queries or keys before the feature map: x -> W x; None is the identity."""

LinearStep = Callable[[Prepared, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""(queries and keys of one token, not :func:`attn_plugins.ops.linear.features.moved` yet; v_BG1V; sums_BGFV without it;
which rows' token is no padding, (B, 1), or None for all) -> (out_BH1V in the dtype of v, new sums with it)."""


def project(x_BHTD: torch.Tensor, projection: Projection) -> torch.Tensor:
    """W x for each head, in at least float32."""
    x_BHTD = x_BHTD.to(accumulation_dtype(x_BHTD))
    return x_BHTD if projection is None else x_BHTD @ projection.to(x_BHTD.dtype).mT


class FeatureAttention(Attention, abc.ABC):
    """Linear attention: a subclass says what is made of queries and keys, and which map to features comes after it.

    Its ``Config`` has a ``chunk_size``.
    """

    @property
    @abc.abstractmethod
    def phi(self) -> FeatureMap:
        """The map to features."""

    @abc.abstractmethod
    def prepare(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, scale: float, since: int | None = None
    ) -> Prepared:
        """What :attr:`phi` is applied to; arguments as those of :func:`attn_plugins.ops.linear.features.prepare`."""

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        q_BHQD, k_BGKD, options = self.prepare(q_BHQD, k_BGKD, mask, scale)
        return dense_linear_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, batched=False):
        q_BHQD, k_BGKD, options = self.prepare(q_BHQD, k_BGKD, mask, scale)
        options |= {"chunk_size": self.config.chunk_size, "batched": batched}
        return linear_attention(q_BHQD, k_BGKD, v_BGKV, mask, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return self.attend(q_BHQD, k_BGKD, v_BGKV, **options, batched=True)

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, scale, dropout):
        prepared = self.prepare(q_BHTD, k_BGTD, mask, scale)
        options = {"chunk_size": self.config.chunk_size, "batched": self.prefers_batched(q_BHTD)}
        return linear_attention_of_part(prepared, v_BGTV, part, **options)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout, step=None):
        options = {"scale": scale, "chunk_size": self.config.chunk_size, "step": step}
        return linear_attention_from(q_BHQD, k_BGKD, v_BGKV, mask, state, self.prepare, **options)


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
        visible: bool, broadcastable to (B, H, Q, K), the same for all heads.

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32; a row adds up to 1 up to ``eps``).
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        phi, heads = FEATURE_MAPS[feature_map], q_BHQD.shape[1]
        fq_BHQF, fk_BGKF = project(q_BHQD, query_projection), project(k_BGKD, key_projection)
        if phi.exponential:
            seen = visible.any(dim=2).unsqueeze(3)
            running_max = max_exponent(fk_BGKF, seen)
            fk_BGKF = torch.exp(fk_BGKF.masked_fill(~seen, -torch.inf) - running_max)
            fq_BHQF, _ = exp_minus_max(fq_BHQF, expand_heads(running_max, heads))
        else:
            fq_BHQF, fk_BGKF = phi.features(fq_BHQF), phi.features(fk_BGKF)
        a_BHQK = fq_BHQF @ expand_heads(fk_BGKF, heads).mT
        a_BHQK = a_BHQK.masked_fill(~visible, 0.0)
        weights_BHQK = a_BHQK / (a_BHQK.sum(dim=-1, keepdim=True) + eps)
        out_BHQV = weights_BHQK @ expand_heads(v_BGKV, heads).to(weights_BHQK.dtype)
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
    batched: bool = False,
) -> torch.Tensor:
    """The same in O((Q + K) F (chunk_size + V)) time and linear memory.

    Causal: chunks of ``chunk_size`` with a state carried between them; keys before the first query are summed into the
    state that the first chunk starts from. Otherwise: one sum over all keys. Few queries, as in decoding, read the keys
    one by one where that is less work than a state.

    Args:
        mask: plain. Segments must be contiguous.
        batched: in blocks as large as on devices that are not a CPU.

    Returns:
        out_BHQV in the dtype of v.

    Raises:
        ValueError: a segment goes on after another one began, or queries lie outside the keys.
    """
    queries = q_BHQD.shape[2]
    projections = {"query_projection": query_projection, "key_projection": key_projection}
    if dense_is_cheaper(q_BHQD, v_BGKV, feature_map, query_projection):
        return dense_linear_attention(
            q_BHQD, k_BGKD, v_BGKV, mask.dense(), feature_map=feature_map, eps=eps, **projections
        )[0]
    padding_BK, segments_BK = padding_of(mask), contiguous_segments(mask)
    with torch.autocast(q_BHQD.device.type, enabled=False):
        dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        w_q, w_k = (None if w is None else w.to(dtype) for w in (query_projection, key_projection))
        if not mask.causal and segments_BK is None:
            state = sum_keys(k_BGKD, v_BGKV, w_k, feature_map, padding_BK)
            return _read(q_BHQD, w_q, feature_map, *state, eps).to(v_BGKV.dtype)
        options = (feature_map, chunk_size, eps)
        if not mask.causal:
            tokens = (q_BHQD, k_BGKD, v_BGKV, w_q, w_k, padding_BK, segments_BK)
            return _both_ways(*tokens, *options, batched).to(v_BGKV.dtype)
        before = mask.q_offset - mask.kv_offset
        if not 0 <= before <= k_BGKD.shape[2] - queries:
            raise ValueError(f"{queries} queries from key {before} on; allowed: queries within {k_BGKD.shape[2]} keys")
        # A cache of fixed length holds room for keys to come: nothing after the last query is visible.
        seen = slice(0, before + queries)
        padding_BK, segments_BK = (None if x is None else x[:, seen] for x in (padding_BK, segments_BK))
        k_BGKD, v_BGKV = k_BGKD[:, :, seen], v_BGKV[:, :, seen]
        tokens = (q_BHQD, k_BGKD, v_BGKV, w_q, w_k, padding_BK, segments_BK)
        return last_queries(*tokens, *options, batched=batched)[0]


def linear_attention_from(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    prepare: Callable[[torch.Tensor, torch.Tensor, AttentionMask, float, int], Prepared],
    *,
    scale: float,
    chunk_size: int,
    step: LinearStep | None = None,
) -> torch.Tensor:
    """The same, causal, for the last Q of K new tokens, which the state takes in: out_BHQV in the dtype of v.

    Args:
        mask: of all tokens, which may end with some that come later.
        state: ``sums`` over the tokens before, (B, G, F, V + 1), and of exponents their ``running_max``, (B, G, F).
        prepare: (queries, keys, mask, scale, which token the keys begin with) -> what linear attention takes of them.
        step: what takes in one token, in place of PyTorch's operations.
    """

    def attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        prepared, not_padding_BK = prepare(q, k, mask, scale, state.position), state.not_padding(mask, k.shape[2])
        held = state.tensors or state.start(k, v, **sums_shapes(prepared, v))
        if step is not None and k.shape[2] == 1:
            out, sums = step(prepared, v, held["sums"], not_padding_BK)
            state.commit(1, sums=sums)
            return out
        prepared = moved(prepared)
        (q, k, options), (w_q, w_k), before = prepared, projections(prepared), (held["sums"], held.get("running_max"))
        feature_map, eps = options["feature_map"], options["eps"]
        sums, running_max = absorb(*before, k, v, w_k, feature_map, not_padding_BK)
        if q.shape[2] == 1:  # sees all that is in the sums by now
            out = _read(q, w_q, feature_map, sums, running_max, eps).to(v.dtype)
        else:
            out, _ = last_queries(q, k, v, w_q, w_k, not_padding_BK, None, feature_map, chunk_size, eps, *before)
        state.commit(k.shape[2], sums=sums, running_max=running_max)
        return out

    return chunked_prefill(attend_chunk, q_BHQD, k_BGKD, v_BGKV)


def linear_attention_of_part(
    prepared: Prepared, v_BGTV: torch.Tensor, part: Part, *, chunk_size: int, batched: bool
) -> torch.Tensor:
    """The same for this process's part of longer rows, with the sums over the others': out_BHTV in the dtype of v.

    For feature maps of a token alone, whose features are no exponentials.

    Raises:
        ValueError: packed rows in which queries see what follows them.
    """
    (q, k, options), (w_q, w_k), mask = prepared, projections(prepared), part.mask
    feature_map, eps, padding_BT = options["feature_map"], options["eps"], part.own(padding_of(mask))
    if not mask.causal:
        if mask.segments_BK is not None:
            raise ValueError("packed rows in parts need causal linear attention; give each text a row of its own")
        own, _ = sum_keys(k, v_BGTV, w_k, feature_map, padding_BT)
        return _read(q, w_q, feature_map, part.exchange.summed(own), None, eps).to(v_BGTV.dtype)
    own, _ = sum_keys(k, v_BGTV, w_k, feature_map, of_last_text(part, padding_BT))
    state_BGFV = of_text_before(part, carried(part, own))
    tokens = (q, k, v_BGTV, w_q, w_k, padding_BT, part.own(contiguous_segments(mask)))
    return last_queries(*tokens, feature_map, chunk_size, eps, state_BGFV, batched=batched)[0]


def projections(prepared: Prepared) -> tuple[Projection, Projection]:
    """Of queries and of keys, in at least float32."""
    if "query_projection" not in prepared.options:
        return None, None
    dtype = accumulation_dtype(prepared.q_BHQD, prepared.k_BGKD)
    names = ("query_projection", "key_projection")
    w_q, w_k = (None if name not in prepared.options else prepared.options[name].to(dtype) for name in names)
    return w_q, w_k


def sums_shapes(prepared: Prepared, v_BGKV: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of a row's sums, and of the running maximum of exponents."""
    _, k_BGKD, options = prepared
    phi, groups, w_k = FEATURE_MAPS[options["feature_map"]], k_BGKD.shape[1], options.get("key_projection")
    features = phi.size(k_BGKD.shape[3] if w_k is None else w_k.shape[1])
    shapes: dict[str, tuple[int, ...]] = {"sums": (groups, features, v_BGKV.shape[3] + 1)}
    return {**shapes, "running_max": (groups, features)} if phi.exponential else shapes


def absorb(
    sums_BGFV: torch.Tensor,
    running_max_BGF: torch.Tensor | None,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    w_k: Projection,
    feature_map: str,
    seen_BK: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sums, running maximum) with these keys too, those that are seen."""
    phi = FEATURE_MAPS[feature_map]
    if k_BGKD.shape[2] == 1 and not phi.exponential:  # in decoding: a product of one column and one row
        fk_BG1F = phi.features(project(k_BGKD, w_k))
        fk_BG1F = fk_BG1F if seen_BK is None else fk_BG1F * seen_BK[:, None, :, None]
        return torch.addcmul(sums_BGFV, fk_BG1F.mT, pad(v_BGKV.to(fk_BG1F.dtype), (0, 1), value=1.0)), None
    return add_sums(sums_BGFV, running_max_BGF, *sum_keys(k_BGKD, v_BGKV, w_k, feature_map, seen_BK))


def dense_is_cheaper(q_BHQD: torch.Tensor, v_BGKV: torch.Tensor, feature_map: str, projection: Projection) -> bool:
    """Whether the dense form costs less than a state: for few queries, as in decoding."""
    features = FEATURE_MAPS[feature_map].size(q_BHQD.shape[3] if projection is None else projection.shape[1])
    return q_BHQD.shape[2] * (features + v_BGKV.shape[3]) <= features * v_BGKV.shape[3]


def last_queries(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    w_q: Projection,
    w_k: Projection,
    padding_BK: torch.Tensor | None,
    segments_BK: torch.Tensor | None,
    feature_map: str,
    chunk_size: int,
    eps: float | None,
    state_BGFV: torch.Tensor | None = None,
    running_max_BGF: torch.Tensor | None = None,
    *,
    batched: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention of the last Q of K tokens, which may follow those of a state.

    Returns:
        (out_BHQV, its denominators (B, H, Q)), see :func:`attn_plugins.ops.linear.chunked.causal_linear`.
    """
    before = k_BGKD.shape[2] - q_BHQD.shape[2]
    old, new = slice(0, before), slice(before, None)
    if before:
        seen_BK = None if padding_BK is None else padding_BK[:, old]
        if segments_BK is not None:
            goes_on = segments_BK[:, old] == segments_BK[:, before : before + 1]
            seen_BK = goes_on if seen_BK is None else seen_BK & goes_on
        earlier = (k_BGKD[:, :, old], v_BGKV[:, :, old], w_k, feature_map, seen_BK)
        if state_BGFV is None:
            state_BGFV, running_max_BGF = sum_keys(*earlier)
        else:
            state_BGFV, running_max_BGF = absorb(state_BGFV, running_max_BGF, *earlier)
    padding_BT, segments_BT = (None if x is None else x[:, new] for x in (padding_BK, segments_BK))
    k_BGTD, v_BGTV, options = k_BGKD[:, :, new], v_BGKV[:, :, new], (feature_map, chunk_size, eps)
    tokens = (q_BHQD, k_BGTD, v_BGTV, w_q, w_k, padding_BT, segments_BT)
    out_BHTV, den_BHT, _, _ = causal_linear(*tokens, state_BGFV, running_max_BGF, *options, diagonal=0, batched=batched)
    return out_BHTV, den_BHT


def padding_of(mask: AttentionMask) -> torch.Tensor | None:
    """The mask's padding, a row for each of the batch."""
    return None if mask.padding_BK is None else mask.padding_BK.expand(mask.batch_size, -1)


def contiguous_segments(mask: AttentionMask) -> torch.Tensor | None:
    """The mask's segments, checked once a forward pass: a state can only be carried along segments in one piece.

    On CUDA, which would have to be waited for, the check is left to the device: it stops there.
    """

    def check() -> None:
        segments_BK, padding_BK = mask.segments_BK, mask.padding_BK
        assert segments_BK is not None
        runs_BK = pad((segments_BK[:, 1:] != segments_BK[:, :-1]).long().cumsum(1), (1, 0))
        segments_B, runs_B = (distinct(x, padding_BK) for x in (segments_BK, runs_BK))
        whole_B = segments_B == runs_B
        allowed = "allowed: each packed sequence in one piece"
        if whole_B.is_cuda or not readable(whole_B):
            torch._assert_async(whole_B.all(), f"a row has packed sequences in several pieces; {allowed}")
        elif not bool(whole_B.all()):
            row = int(whole_B.long().argmin())
            raise ValueError(
                f"row {row} has {int(segments_B[row])} packed sequences in {int(runs_B[row])} pieces; {allowed}"
            )

    if mask.segments_BK is not None:
        mask.cached("contiguous segments", check)
    return None if mask.segments_BK is None else mask.segments_BK.expand(mask.batch_size, -1)


def distinct(number_BK: torch.Tensor, not_padding_BK: torch.Tensor | None) -> torch.Tensor:
    """How many different numbers each row has where it is real, (B,)."""
    none = 1 << 62  # which a double can hold: F.pad makes one of it
    number_BK = number_BK.long() if not_padding_BK is None else torch.where(not_padding_BK, number_BK.long(), none)
    ordered_BK = pad(number_BK.sort(dim=1).values, (0, 1), value=none)
    return (ordered_BK[:, 1:] != ordered_BK[:, :-1]).sum(dim=1)


def sum_keys(
    k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, w_k: Projection, feature_map: str, seen_BK: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sums of phi(k) [v, 1]^T over the keys seen, (B, G, F, V + 1); maximum of their exponents, (B, G, F))."""
    phi, running_max = FEATURE_MAPS[feature_map], None
    fk_BGKF = project(k_BGKD, w_k)
    seen = None if seen_BK is None else seen_BK[:, None, :, None]
    if phi.exponential:
        running_max = max_exponent(fk_BGKF, seen)
        fk_BGKF = fk_BGKF if seen is None else fk_BGKF.masked_fill(~seen, -torch.inf)
        fk_BGKF = torch.exp(fk_BGKF - running_max)
    else:
        fk_BGKF = phi.features(fk_BGKF)
        fk_BGKF = fk_BGKF if seen is None else fk_BGKF * seen
    v_one = pad(v_BGKV.to(fk_BGKF.dtype), (0, 1), value=1.0)
    return fk_BGKF.mT @ v_one, None if running_max is None else running_max.squeeze(2)


def _read(
    q_BHQD: torch.Tensor,
    w_q: Projection,
    feature_map: str,
    state_BGFV: torch.Tensor,
    running_max_BGF: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """What queries read from one state, (B, H, Q, V)."""
    totals = read_sums(q_BHQD, w_q, feature_map, state_BGFV, running_max_BGF)
    sums, denominators = totals.split([totals.shape[3] - 1, 1], dim=3)
    return (sums / (denominators + eps)).view(*q_BHQD.shape[:3], -1)


def read_sums(
    q_BHQD: torch.Tensor,
    w_q: Projection,
    feature_map: str,
    state_BGFV: torch.Tensor,
    running_max_BGF: torch.Tensor | None,
) -> torch.Tensor:
    """Sums of phi(q).phi(k) [v, 1] for queries, (B, G, query heads that share a key/value head x Q, V + 1)."""
    q_BHQE, heads = project(q_BHQD, w_q), q_BHQD.shape[1]
    if running_max_BGF is None:
        fq_BHQF = FEATURE_MAPS[feature_map].features(q_BHQE)
    else:
        fq_BHQF, _ = exp_minus_max(q_BHQE, expand_heads(running_max_BGF.unsqueeze(2), heads))
    return fq_BHQF.reshape(len(fq_BHQF), state_BGFV.shape[1], -1, fq_BHQF.shape[3]) @ state_BGFV


def _both_ways(q_BHQD, k_BGKD, v_BGKV, w_q, w_k, padding_BK, segments_BK, feature_map, chunk_size, eps, batched):
    """Bidirectional attention within segments: what is seen reading forwards, and, without the own key, backwards."""
    before = k_BGKD.shape[2] - q_BHQD.shape[2]
    outs, dens = [], []
    for backwards, diagonal in ((False, 0), (True, -1)):
        q, k, v = pad(q_BHQD, (0, 0, before, 0)), k_BGKD, v_BGKV.to(accumulation_dtype(v_BGKV))
        rows = [padding_BK, segments_BK]
        if backwards:
            q, k, v = (x.flip(2) for x in (q, k, v))
            rows = [None if x is None else x.flip(1) for x in rows]
        options = (None, None, feature_map, chunk_size, eps, diagonal, batched)
        out, den, _, _ = causal_linear(q, k, v, w_q, w_k, *rows, *options)
        outs.append(out.flip(2) if backwards else out)
        dens.append((den.flip(2) if backwards else den).unsqueeze(3))
    if FEATURE_MAPS[feature_map].exponential:
        return torch.lerp(outs[0], outs[1], torch.sigmoid(dens[1] - dens[0]))[:, :, before:]
    totals = sum(out * (den + eps) for out, den in zip(outs, dens, strict=True))
    return (totals / (dens[0] + dens[1] + eps))[:, :, before:]
