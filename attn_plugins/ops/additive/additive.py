"""Additive attention: scores from tanh(query projection + key projection), with memory for one tile of queries only.

Letters beside the legend's: E hidden units.
"""

import torch
from torch.library import CustomOpDef

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, in_query_chunks, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax, with_dropout
from attn_plugins.ops.sizes import scores_at_once

SATURATED = 20.0
"""Projections are limited to this: tanh is 1 to the last digit of float64 long before."""


def project(x_BHTD: torch.Tensor, weight_HED: torch.Tensor) -> torch.Tensor:
    """Hidden units of queries or keys, (B, H, E, T), within ±SATURATED."""
    dtype = accumulation_dtype(x_BHTD, weight_HED)
    return (weight_HED.to(dtype) @ x_BHTD.to(dtype).mT).clamp(-SATURATED, SATURATED)


@torch.library.custom_op("attn_plugins::additive_scores", mutates_args=())
def additive_scores(a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor, w_HE: torch.Tensor) -> torch.Tensor:
    """sum_e w_e tanh(a_ie + b_je), (B, H, Q, K), for projections within ±SATURATED.

    tanh(a + b) = 1 - 2 p / (p + r) with p = exp(-2 a) and r = exp(2 b): one exponential a token instead of one a pair,
    and one unit after the other, so that nothing larger than the scores is held.
    """
    group = a_BHEQ.shape[1] // b_BGEK.shape[1]
    p_BGREQ, r_BG1EK, w_GRE = _grouped(a_BHEQ, b_BGEK, w_HE, group)
    # Twin units of opposite sign lie side by side: summed as pairs their weights leave exactly nothing.
    s_BGRQK = w_HE.view(*w_GRE.shape[:2], -1, 2).sum(3).sum(2).view(1, *w_GRE.shape[:2], 1, 1)
    s_BGRQK = s_BGRQK.expand(*p_BGREQ.shape[:3], p_BGREQ.shape[4], r_BG1EK.shape[4]).clone()
    below = torch.empty_like(s_BGRQK)
    for e in range(w_HE.shape[1]):
        p, r = p_BGREQ[:, :, :, e, :, None], r_BG1EK[:, :, :, e, None, :]
        s_BGRQK.addcdiv_(p * w_GRE[:, :, e, None, None], torch.add(p, r, out=below), value=-2)
    return s_BGRQK.flatten(1, 2)


@torch.library.custom_op("attn_plugins::additive_scores_backward", mutates_args=())
def additive_scores_backward(
    ds_BHQK: torch.Tensor, a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor, w_HE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a, b and w: with u = ds / (p + r), dw = sum ds - 2 p u and d tanh = 4 p r u / (p + r)."""
    groups, group = b_BGEK.shape[1], ds_BHQK.shape[1] // b_BGEK.shape[1]
    p_BGREQ, r_BG1EK, w_GRE = _grouped(a_BHEQ, b_BGEK, w_HE, group)
    ds = ds_BHQK.unflatten(1, (groups, group)).contiguous()
    da, db, dw = torch.empty_like(p_BGREQ), torch.zeros_like(r_BG1EK), torch.empty_like(w_GRE)
    total_GR = ds.sum((0, 3, 4))
    below, u = torch.empty_like(ds), torch.empty_like(ds)
    ones_K1 = ds.new_ones(ds.shape[-1], 1)
    for e in range(w_HE.shape[1]):
        p, r = p_BGREQ[:, :, :, e, :, None], r_BG1EK[:, :, :, e, None, :]
        w = w_GRE[:, :, e, None]
        torch.add(p, r, out=below)
        torch.div(ds, below, out=u)
        dw[:, :, e] = total_GR - 2 * (p * (u @ ones_K1)).sum((0, 3, 4))
        u.div_(below)
        da[:, :, :, e] = (u @ r.mT).squeeze(4) * p.squeeze(4) * (4 * w)
        db[:, :, 0, e] = ((p.mT @ u).squeeze(3) * (4 * w)).sum(2) * r.squeeze(3).squeeze(2)
    return da.flatten(1, 2), db.squeeze(2), dw.flatten(0, 1)


def _grouped(a_BHEQ, b_BGEK, w_HE, group):
    p_BGREQ = a_BHEQ.mul(-2).exp_().unflatten(1, (-1, group))
    return p_BGREQ, b_BGEK.mul(2).exp_().unsqueeze(2), w_HE.unflatten(0, (-1, group))


@torch.library.custom_op("attn_plugins::additive_scores_at_once", mutates_args=())
def additive_scores_at_once(a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor, w_HE: torch.Tensor) -> torch.Tensor:
    """:func:`additive_scores` by tanh itself, of as many units at a time as are a piece on this device."""
    scores = []
    for units in _units_at_once(a_BHEQ, b_BGEK):
        t_BHEQK = _tanh(a_BHEQ, b_BGEK, units).mul_(w_HE[:, units, None, None])
        # Twins of opposite sign are summed first: what they leave is exactly nothing.
        scores.append((t_BHEQK[:, :, ::2] + t_BHEQK[:, :, 1::2]).sum(dim=2))
        if len(scores) > 1:
            scores = [scores[0].add_(scores[1])]
    return scores[0]


@torch.library.custom_op("attn_plugins::additive_scores_at_once_backward", mutates_args=())
def additive_scores_at_once_backward(
    ds_BHQK: torch.Tensor, a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor, w_HE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a, b and w."""
    das, dbs, dws = [], [], []
    for units in _units_at_once(a_BHEQ, b_BGEK):
        t_BHEQK = _tanh(a_BHEQ, b_BGEK, units)
        dws.append((t_BHEQK * ds_BHQK.unsqueeze(2)).sum(dim=(0, 3, 4)))
        dt_BHEQK = t_BHEQK.square_().neg_().add_(1).mul_(ds_BHQK.unsqueeze(2)).mul_(w_HE[:, units, None, None])
        das.append(dt_BHEQK.sum(dim=4))
        dbs.append(dt_BHEQK.sum(dim=3))
    db_BGREK = torch.cat(dbs, dim=2).unflatten(1, (b_BGEK.shape[1], -1))
    return torch.cat(das, dim=2), db_BGREK.sum(dim=2), torch.cat(dws, dim=1)


def _units_at_once(a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor) -> list[slice]:
    (batch, heads, units, queries), keys = a_BHEQ.shape, b_BGEK.shape[3]
    size = scores_at_once(a_BHEQ.device) // max(1, batch * heads * queries * keys)
    size = max(2, size - size % 2)
    return [slice(start, min(start + size, units)) for start in range(0, units, size)]


def _tanh(a_BHEQ: torch.Tensor, b_BGEK: torch.Tensor, units: slice) -> torch.Tensor:
    b_BHEK = expand_heads(b_BGEK[:, :, units], a_BHEQ.shape[1])
    return (a_BHEQ[:, :, units, :, None] + b_BHEK.unsqueeze(3)).tanh_()


def _differentiable(forward: CustomOpDef, backward: CustomOpDef) -> None:
    def fake(a_BHEQ, b_BGEK, w_HE):
        return a_BHEQ.new_empty(*a_BHEQ.shape[:2], a_BHEQ.shape[3], b_BGEK.shape[3])

    def fake_backward(ds_BHQK, a_BHEQ, b_BGEK, w_HE):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a_BHEQ, b_BGEK, w_HE))

    forward.register_fake(fake)
    backward.register_fake(fake_backward)
    forward.register_autograd(
        lambda ctx, ds: backward(ds, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


_differentiable(additive_scores, additive_scores_backward)
_differentiable(additive_scores_at_once, additive_scores_at_once_backward)


def dense_additive_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor,
    *,
    w_q_HED: torch.Tensor,
    w_k_GED: torch.Tensor,
    w_HE: torch.Tensor,
    gate_H: torch.Tensor,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    with torch.autocast(q_BHQD.device.type, enabled=False):
        a_BHEQ, b_BHEK = project(q_BHQD, w_q_HED), expand_heads(project(k_BGKD, w_k_GED), q_BHQD.shape[1])
        units = (
            w_HE[:, e, None, None].to(a_BHEQ.dtype) * torch.tanh(a_BHEQ[:, :, e, :, None] + b_BHEK[:, :, e, None, :])
            for e in range(w_HE.shape[1])
        )
        return _attend(q_BHQD, k_BGKD, v_BGKV, sum(units), visible, gate_H=gate_H, **options)


def additive_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    w_q_HED: torch.Tensor,
    w_k_GED: torch.Tensor,
    w_HE: torch.Tensor,
    gate_H: torch.Tensor,
    tile_size: int | None,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """The same, ``tile_size`` queries at a time: O(Q K (E + D)) time, and memory for (tile_size, K) scores.

    Each tile is computed again in backward. Where the mask is causal, keys after a tile are left out.

    Args:
        tile_size: None for few large tiles, and scores of several units at a time, for devices that are not a CPU.

    Returns:
        out_BHQV in the dtype of v.
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        a_BHEQ, b_BGEK = project(q_BHQD, w_q_HED), project(k_BGKD, w_k_GED)
        w_HE, of_units = w_HE.to(a_BHEQ.dtype), additive_scores if tile_size is not None else additive_scores_at_once

        def attend(queries: slice, keys: slice) -> torch.Tensor:
            visible, bias = visible_pairs(mask, queries, keys), bias_of(position_bias, queries, keys)
            s_BHQK = of_units(a_BHEQ[:, :, :, queries], b_BGEK[:, :, :, keys], w_HE)
            q, k, v = q_BHQD[:, :, queries], k_BGKD[:, :, keys], v_BGKV[:, :, keys]
            extras = {"gate_H": gate_H, "dropout": dropout, "position_bias": bias, **options}
            return _attend(q, k, v, s_BHQK, visible, **extras)[0]

        if tile_size is None:
            return in_large_chunks(attend, mask, q_BHQD.shape[1], dropout=dropout, copies=2)
        return in_query_chunks(attend, mask, tile_size, dropout=dropout)


def _attend(
    q_BHQD,
    k_BGKD,
    v_BGKV,
    additive_BHQK,
    visible,
    *,
    gate_H,
    scale,
    dropout,
    position_bias=None,
    softcap=None,
    sinks=None,
):
    """Softmax attention with scores (1 - gate) scale q.k + additive, then softcapped, then biased."""
    dtype, heads = additive_BHQK.dtype, q_BHQD.shape[1]
    dot_BHQK = q_BHQD.to(dtype) @ expand_heads(k_BGKD, heads).to(dtype).mT * scale
    s_BHQK = (1 - gate_H.to(dtype))[:, None, None] * dot_BHQK + additive_BHQK
    if softcap is not None:
        s_BHQK = softcap * torch.tanh(s_BHQK / softcap)
    if position_bias is not None:
        s_BHQK = s_BHQK + position_bias.to(dtype)
    weights_BHQK = masked_softmax(s_BHQK, visible, sinks)
    weights_BHQK = with_dropout(weights_BHQK, dropout)
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, heads).to(dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK
