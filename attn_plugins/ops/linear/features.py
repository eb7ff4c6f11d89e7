"""Feature maps of linear attention, and what comes before them: learned and random projections, biases, positions.

A map is a function of one token with values that are never negative in sum, applied in float32 (float64 stays). Each
has a second form for the fused kernel, which keeps no activations: the map again, made of cheaper operations, and its
gradient from its value alone. :func:`prepare` turns queries and keys, and an attention's weights, into what the
operators on features take: tokens, a projection for each head, and a map of :data:`FEATURE_MAPS` after it. Tokens get
one more entry where something is to be added to what is projected: a 1 for a bias.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import elu, pad, relu

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable, recorded
from attn_plugins.ops.reference import accumulation_dtype

LEARNED = ("hedgehog", "t2r", "taylor")
"""Maps with weights of their own."""
AS_THEY_ARE = ("elu", "relu", "relu2")
"""Maps of queries and keys, with nothing before them."""
MAP_OF = {"t2r": "relu", "favor": "exp", "cosformer": "identity"}
"""The map after the projection, where it has another name."""
WEIGHTS = {
    "hedgehog": ("query_weight", "key_weight"),
    "taylor": ("query_weight", "key_weight"),
    "t2r": ("query_weight", "key_weight", "query_bias", "key_bias"),
    "favor": ("projection",),
}
"""Names of a map's weights, and of favor's directions."""
LOG2_E = 1.4426950408889634
SMALLEST_FEATURE = 1e-12


class FeatureMap(NamedTuple):
    """phi, and what the fused kernel needs of it. Shapes are (..., E) -> (..., F)."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """The definition."""
    fast_features: Callable[[torch.Tensor], torch.Tensor]
    """The same numbers, where autograd doesn't follow; may overwrite its argument."""
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(features, gradient of the features) -> gradient of the input; may overwrite both."""
    size: Callable[[int], int]
    """F of E."""
    exponential: bool = False
    """phi is exp, taken of differences from a running maximum, which keeps it finite: see :func:`exp_minus_max`."""
    signed: bool = False
    """Features may be negative: what is left of their products may be little, and wants features in float32."""


def _same(size: int) -> int:
    return size


def _elu(x: torch.Tensor) -> torch.Tensor:
    return elu(x) + 1


def _elu_fast(x: torch.Tensor) -> torch.Tensor:
    # exp2 is vectorised to a third of exp's time on CPU, and elu goes through expm1, which is slower still.
    above = x.relu()
    return x.clamp_max_(0).mul_(LOG2_E).exp2_().add_(above)


def _elu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.clamp_(max=1))


def _relu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.sign_())


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return relu(x).square()


def _relu2_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.sqrt_()).mul_(2)


def _hedgehog(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1).clamp(min=SMALLEST_FEATURE)


def _hedgehog_fast(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, -x], dim=-2).softmax(dim=-1).flatten(-2).clamp_(min=SMALLEST_FEATURE)


def _hedgehog_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    # What is clamped would have no gradient; here it has one of 1e-12, which spares a pass over the features.
    flow = gradient.mul_(features)
    (plus, minus), (flow_plus, flow_minus) = features.chunk(2, dim=-1), flow.chunk(2, dim=-1)
    flow_plus.addcmul_(plus, flow_plus.sum(dim=-1, keepdim=True), value=-1)
    flow_minus.addcmul_(minus, flow_minus.sum(dim=-1, keepdim=True), value=-1)
    return flow_plus - flow_minus


def _taylor_size(size: int) -> int:
    return (size + 1) * (size + 2) // 2


def _taylor(x: torch.Tensor) -> torch.Tensor:
    row, column, share = _pairs(x, x.shape[-1])
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * share], dim=-1)


def _pairs(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """i, j and factor of each product x_i x_j, i <= j: sqrt(1/2) for squares, 1 where it stands for two."""
    row, column = torch.triu_indices(size, size, device=x.device)
    return row, column, torch.ones_like(row, dtype=x.dtype).masked_fill_(row == column, math.sqrt(0.5))


def _taylor_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    size = (math.isqrt(8 * features.shape[-1] + 1) - 3) // 2
    x, straight, pairs = features[..., 1 : size + 1], gradient[..., 1 : size + 1], gradient[..., size + 1 :]
    row, column, share = _pairs(x, size)
    square = pairs.new_zeros(*pairs.shape[:-1], size * size)
    square[..., row * size + column] = pairs * share
    square = square.unflatten(-1, (size, size))
    return straight + ((square + square.mT) @ x.unsqueeze(-1)).squeeze(-1)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _identity_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


FEATURE_MAPS = {
    "elu": FeatureMap(_elu, _elu_fast, _elu_gradient, _same),
    "relu": FeatureMap(relu, relu, _relu_gradient, _same),
    "relu2": FeatureMap(_relu2, _relu2, _relu2_gradient, _same),
    "hedgehog": FeatureMap(_hedgehog, _hedgehog_fast, _hedgehog_gradient, lambda size: 2 * size),
    "taylor": FeatureMap(_taylor, _taylor, _taylor_gradient, _taylor_size, signed=True),
    "exp": FeatureMap(torch.exp, torch.exp, torch.mul, _same, exponential=True),
    "identity": FeatureMap(_identity, _identity, _identity_gradient, _same),
}
"""elu: elu(x) + 1 (Katharopoulos 2020). relu: max(x, 0). relu2: its square. hedgehog: [softmax(x); softmax(-x)] (Zhang
2024), F = 2 E. taylor: [1, x, products x_i x_j], phi(x).phi(y) = 1 + x.y + (x.y)^2 / 2 (Arora 2024). exp: of exponents,
as FAVOR+ has them. identity: of features that were made before."""


class Prepared(NamedTuple):
    """Arguments of the operators in :mod:`attn_plugins.ops.linear.attention`."""

    q_BHQD: torch.Tensor
    k_BGKD: torch.Tensor
    options: dict


def weight_shapes(
    feature_map: str, num_heads: int, num_key_value_heads: int, head_dim: int, feature_dim: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a map's weights: W a query head for queries, and one a key/value head for keys."""
    if feature_map not in LEARNED:
        return {}
    rows = feature_dim if feature_map == "taylor" else head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query_weight": (num_heads, rows, head_dim),
        "key_weight": (num_key_value_heads, rows, head_dim),
    }
    if feature_map == "t2r":
        shapes |= {"query_bias": (num_heads, head_dim), "key_bias": (num_key_value_heads, head_dim)}
    return shapes


def weights(module: Any) -> dict[str, torch.Tensor]:
    """The weights of a module with that ``config.feature_map``, read as attributes: they may be parametrised."""
    return {name: getattr(module, name) for name in WEIGHTS.get(module.config.feature_map, ())}


def reset_weights(feature_map: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Start from the identity; Taylor's from a projection that keeps q.k, on average where it has fewer dimensions."""
    if feature_map != "taylor":
        for weight in weights.values():
            nn.init.zeros_(weight)  # kept as the difference from the identity
        return
    query, key = weights["query_weight"], weights["key_weight"]
    rows, head_dim = key.shape[1:]
    for weight in key:
        nn.init.orthogonal_(weight, gain=math.sqrt(max(1.0, head_dim / rows)))
    with torch.no_grad():
        query.copy_(key.repeat_interleave(len(query) // len(key), dim=0))


def orthogonal_features(num_features: int, head_dim: int, seed: int) -> torch.Tensor:
    """FAVOR+'s directions, (num_features, head_dim): orthogonal within each block of head_dim, long as Gaussian ones.

    The same for a seed everywhere: drawn on CPU in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-num_features // head_dim)
    gaussian = torch.randn(2, blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(gaussian[0]).Q.mT.reshape(-1, head_dim)
    lengths = gaussian[1].reshape(-1, head_dim).norm(dim=1, keepdim=True)
    return (directions * lengths)[:num_features]


def prepare(
    feature_map: str,
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    mask: AttentionMask,
    weights: Mapping[str, torch.Tensor],
    *,
    scale: float,
    eps: float,
    max_length: int = 0,
    since: int | None = None,
) -> Prepared:
    """Tokens, projections and map for ``feature_map``.

    Args:
        mask: of these queries and keys, or of all tokens where ``since`` says which of them these keys begin with; the
            queries are the last of the keys then. Of one such token, what is learned may be left to :func:`moved`.
        weights: those of :func:`weight_shapes`, and FAVOR+'s ``projection``.
        scale: factor on the scores that taylor and favor approximate.
        eps: of the denominator; exponents have no size of their own for it to be compared with, so that favor's is
            only what keeps a denominator of 0 from being divided by.
        max_length: cosformer's.

    Raises:
        ValueError: cosformer got more than ``max_length`` tokens, or queries and keys of different sequences.
    """
    if feature_map in AS_THEY_ARE:
        return Prepared(q_BHQD, k_BGKD, {"feature_map": feature_map, "eps": eps})
    dtype = accumulation_dtype(q_BHQD, k_BGKD, *weights.values())
    options: dict[str, Any] = {
        "feature_map": MAP_OF.get(feature_map, feature_map),
        "eps": 1e-30 if feature_map == "favor" else eps,
    }
    projections = []
    if feature_map == "cosformer":
        if since is None:
            cos, sin = mask.cached(("cosformer", max_length, dtype), lambda: _cos_sin(mask, max_length, dtype))
            before = mask.q_offset - mask.kv_offset
        else:
            cos, sin = _angles(row_positions(mask, since, k_BGKD.shape[2]), max_length, dtype)
            before = k_BGKD.shape[2] - q_BHQD.shape[2]
        own = slice(before, before + q_BHQD.shape[2])
        q_BHQD, k_BGKD = (torch.relu(x.to(dtype)) for x in (q_BHQD, k_BGKD))
        q_BHQD = torch.cat([q_BHQD * cos[:, :, own], q_BHQD * sin[:, :, own]], dim=-1)
        k_BGKD = torch.cat([k_BGKD * cos, k_BGKD * sin], dim=-1)
    elif feature_map == "favor":
        w_FD = weights["projection"].to(dtype) * math.sqrt(scale)
        k_BGKD = k_BGKD.to(dtype)
        half = k_BGKD.square().sum(dim=-1, keepdim=True) * (-scale / 2)
        k_BGKD = torch.cat([k_BGKD, half], dim=-1)
        # A query's own half norm scales all that it reads alike, and is left out.
        projections = [
            w_FD.expand(q_BHQD.shape[1], -1, -1),
            pad(w_FD, (0, 1), value=1.0).expand(k_BGKD.shape[1], -1, -1),
        ]
    elif feature_map == "taylor":
        projections = [weights[name].to(dtype) * math.sqrt(scale) for name in ("query_weight", "key_weight")]
    elif feature_map in LEARNED and since is not None and k_BGKD.shape[2] == 1:
        # The same as below for one token: what it is multiplied by would take longer to make than to use.
        w_q, w_k = weights["query_weight"].to(dtype), weights["key_weight"].to(dtype)
        b_q, b_k = weights.get("query_bias"), weights.get("key_bias")
        options["moves"] = w_q, w_k, b_q if b_q is None else b_q.to(dtype), b_k if b_k is None else b_k.to(dtype)
    elif feature_map in LEARNED:
        # Added in float32: steps of bfloat16 near 1 are 1/128, which would swallow what is learned.
        identity = torch.eye(q_BHQD.shape[3], dtype=dtype, device=q_BHQD.device)
        projections = [identity + weights[name] for name in ("query_weight", "key_weight")]
        if feature_map == "t2r":
            biases = [weights[name].to(dtype).unsqueeze(2) for name in ("query_bias", "key_bias")]
            projections = [torch.cat(both, dim=2) for both in zip(projections, biases, strict=True)]
            q_BHQD, k_BGKD = (pad(x.to(dtype), (0, 1), value=1.0) for x in (q_BHQD, k_BGKD))
    if projections:
        options |= {"query_projection": projections[0], "key_projection": projections[1]}
    return Prepared(q_BHQD, k_BGKD, options)


def moved(prepared: Prepared) -> Prepared:
    """The same with what its option ``moves`` says done: x + W x + b, of queries and of keys.

    ``moves``, of one token from a state, are W (H, D, D) and (G, D, D), and b (H, D) and (G, D) or None.
    """
    q, k, options = prepared
    if "moves" not in options:
        return prepared
    w_q, w_k, b_q, b_k = options["moves"]
    q, k = q.to(w_q.dtype), k.to(w_k.dtype)
    q, k = q + q @ w_q.mT, k + k @ w_k.mT
    if b_q is not None:
        q, k = q + b_q.unsqueeze(1), k + b_k.unsqueeze(1)
    return Prepared(q, k, options)


def check_length(longest: int, max_length: int) -> None:
    """Raise a ValueError unless a sequence is within cosformer's ``max_length``."""
    if longest > max_length:
        raise ValueError(
            f"feature_map='cosformer' got a sequence of {longest} tokens; allowed: at most max_length={max_length}"
        )


def row_positions(mask: AttentionMask, since: Any, number: int) -> torch.Tensor:
    """How far ``number`` tokens, from the one at ``since`` on, are from their row's first real one, (B or 1, number).

    For rows without segments, whose mask may tell of tokens to come.
    """
    position = torch.arange(number, device=mask.device).unsqueeze(0) + since
    padding_BK = mask.padding_BK
    if padding_BK is None:
        return position
    return position - mask.cached("first real", lambda: padding_BK.long().argmax(dim=1, keepdim=True))


def _cos_sin(mask: AttentionMask, max_length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a quarter turn times position / max_length for each key, (B or 1, 1, K, 1)."""
    if mask.cross:
        raise ValueError(
            "feature_map='cosformer' weighs by distance, which tokens of different sequences do not have; "
            "allowed in cross-attention: the other feature maps"
        )
    position_BK = torch.arange(mask.kv_length, device=mask.device) - mask.starts_BK()
    if mask.kv_offset + mask.kv_length > max_length:
        before = mask.q_offset - mask.kv_offset
        position_BQ, whole = position_BK[:, before : before + mask.q_length], mask.kv_offset + mask.kv_length
        if recorded(position_BQ):
            check_length(whole, max_length)
        elif position_BQ.is_cuda or not readable(position_BQ):
            torch._assert_async((position_BQ < max_length).all(), "feature_map='cosformer' got more than max_length")
        else:
            check_length(int(position_BQ.max()) + 1, max_length)
    return _angles(position_BK, max_length, dtype)


def _angles(position_BK: torch.Tensor, max_length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # What is before a row's first token or after its last query is seen by nobody.
    angle = position_BK.clamp(0, max_length - 1).to(dtype)[:, None, :, None] * (math.pi / 2 / max_length)
    return angle.cos(), angle.sin()
