"""Figures of weights, by head: how spread they are, how far they reach, on what they lie, how near the model's own are.

Weights may be negative (linear attentions, delta rules) and need not sum to 1 (learned sinks, sigmoids). Figures of a
query are therefore of its *shares* ``p_k = |w_k| / sum_j |w_j|``, and ``mass`` and ``negative`` say how far weights are
from being shares. Each figure of a head is the mean over the chosen queries that are no padding and have any weight,
over all rows of the batch; None where there are none.
"""

import dataclasses
from dataclasses import dataclass

import torch

MASS = 0.9
"""Of a query's shares, for ``density``."""


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """Figures of the weights of one head."""

    mass: float | None
    """``sum_k w_k``: 1 for softmax attention, less with learned sinks, anything for what is no average."""
    negative: float | None
    """Sum of the shares of weights below 0."""
    entropy: float | None
    """``-sum_k p_k log p_k`` in nats: 0 where all lies on one key, log n where n keys have the same."""
    distance: float | None
    """``sum_k p_k |q - k|`` in tokens. None in cross-attention."""
    density: float | None
    """Share of the keys that a query may see which holds 90 % of its shares: the fewest keys, the largest first."""
    sinks: float | None
    """Sum of the shares of the first tokens of a row or packed text: 4, or those that an encoder begins with."""
    outside: float | None
    """Sum of the shares of keys outside a window: those with ``|q - k| >= window``. None in cross-attention."""


@dataclass(frozen=True, kw_only=True)
class HeadFigures:
    """Figures of one head of one module."""

    head: int
    attention: str
    """Name of the attention that serves it, "own" where that is the model's."""
    error: float | None
    """Squared error of its outputs over the squared length of what the model's own attention makes of the same queries,
    keys and values, both summed over all real queries: 0 is equality, 1 is as wrong as zeros."""
    overlap: float | None
    """Share of the keys with the most weight in the model's own attention that are among as many of its own, the mean
    over queries that see more keys than that."""
    unexplained: float | None
    """Squared error of rows of weights times values against its output, over the output's square: rounding, but where
    an attention's output is no sum of values by weights."""
    weights: WeightFigures
    own: WeightFigures
    """Of the model's own attention on the same queries and keys."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Which keys are where, for the chosen queries."""

    visible_BqK: torch.Tensor
    """Which keys a query may see by the model's mask."""
    sinks_BqK: torch.Tensor
    """Which keys are sinks."""
    distance_qK: torch.Tensor | None
    """``|q - k|``, None in cross-attention."""
    real_Bq: torch.Tensor
    """False for queries that are padding."""


def shares_of(weights_BhqK: torch.Tensor) -> torch.Tensor:
    """``|w| / sum |w|`` over keys; zeros where there are no weights."""
    size = weights_BhqK.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def weight_figures(weights_BhqK: torch.Tensor, places: Places, *, window: int) -> list[WeightFigures]:
    """Figures of each head."""
    p = shares_of(weights_BhqK)
    counts_Bhq = places.real_Bq.unsqueeze(1) & (p.sum(-1) > 0.5)
    largest_first = p.sort(dim=-1, descending=True).values.cumsum(-1)
    needed_Bhq = (largest_first < MASS).sum(-1) + 1
    seen_B1q = places.visible_BqK.sum(-1).clamp_min(1).unsqueeze(1)
    distance = places.distance_qK
    found = {
        "mass": weights_BhqK.sum(-1),
        "negative": p.where(weights_BhqK < 0, 0.0).sum(-1),
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "distance": None if distance is None else (p * distance).sum(-1),
        "density": torch.minimum(needed_Bhq, seen_B1q) / seen_B1q,
        "sinks": (p * places.sinks_BqK.unsqueeze(1)).sum(-1),
        "outside": None if distance is None else (p * (distance >= window)).sum(-1),
    }
    means = {name: None if x is None else mean_of_heads(x, counts_Bhq) for name, x in found.items()}
    return [
        WeightFigures(**{name: None if x is None else x[head] for name, x in means.items()})
        for head in range(weights_BhqK.shape[1])
    ]


def overlap(weights_BhqK: torch.Tensor, own_BhqK: torch.Tensor, places: Places, *, topk: int) -> list[float | None]:
    """Of each head, the share of the model's own ``topk`` keys with the most weight that are among its ``topk``."""
    topk = min(topk, weights_BhqK.shape[-1])
    chosen = [
        torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(topk, dim=-1).indices, True) & (p > 0)
        for p in (weights_BhqK.abs(), own_BhqK.abs())
    ]
    both_Bhq = (chosen[0] & chosen[1]).sum(-1) / chosen[1].sum(-1).clamp_min(1)
    counts_Bq = places.real_Bq & (places.visible_BqK.sum(-1) > topk)
    return mean_of_heads(both_Bhq, counts_Bq.unsqueeze(1).expand_as(both_Bhq) & chosen[1].any(-1))


def unexplained(
    weights_BhqK: torch.Tensor, value_BhKV: torch.Tensor, out_BhqV: torch.Tensor, real_Bq: torch.Tensor
) -> list[float | None]:
    """Of each head, the squared error of weights times values over the output's square, over queries that are real."""
    off_BhqV = (weights_BhqK @ value_BhKV - out_BhqV) * real_Bq[:, None, :, None]
    length_h = (out_BhqV * real_Bq[:, None, :, None]).square().sum((0, 2, 3))
    return [
        off / length if length > 0 else None
        for off, length in zip(off_BhqV.square().sum((0, 2, 3)).tolist(), length_h.tolist(), strict=True)
    ]


def mean_of_heads(x_Bhq: torch.Tensor, counts_Bhq: torch.Tensor) -> list[float | None]:
    """The mean of each head over what counts, None where nothing does."""
    number_h = counts_Bhq.sum((0, 2))
    sums_h = x_Bhq.double().where(counts_Bhq, 0.0).sum((0, 2))
    return [total / n if n else None for total, n in zip(sums_h.tolist(), number_h.tolist(), strict=True)]


FIGURES = [
    *(field.name for field in dataclasses.fields(WeightFigures)),
    *("error", "overlap", "unexplained"),
]
"""Names of all figures, as overviews show them."""
