"""Nystrom attention: three small softmax matrices through landmarks in place of one large matrix.

Letter beside the legend's: M landmarks.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax


class Landmarks(NamedTuple):
    """Which landmark each token of a mask belongs to."""

    at_BK: torch.Tensor
    """(B or 1, K): number of the landmark, M for padding."""
    count_BM: torch.Tensor
    """(B or 1, M): tokens that a landmark is the mean of; 0 where a row has fewer real tokens than landmarks."""
    not_padding_BK: torch.Tensor
    """(B or 1, K): whether a token is no padding."""


def landmarks_of(mask: AttentionMask, number: int) -> Landmarks:
    """Runs of a row's real tokens whose lengths differ by at most one, no more than the longest row could fill.

    Made once a forward pass.
    """
    number = min(number, mask.kv_length)

    def build() -> Landmarks:
        not_padding_BK = mask.padding_BK
        if not_padding_BK is None:
            not_padding_BK = torch.ones(1, mask.kv_length, dtype=torch.bool, device=mask.device)
        rank_BK = not_padding_BK.long().cumsum(dim=1) - 1
        at_BK = rank_BK * number // not_padding_BK.sum(dim=1, keepdim=True).clamp(min=1)
        at_BK = at_BK.masked_fill(~not_padding_BK, number)
        count_BM = not_padding_BK.new_zeros(not_padding_BK.shape[0], number + 1, dtype=torch.long)
        count_BM = count_BM.scatter_add(1, at_BK, not_padding_BK.long())[:, :-1]
        return Landmarks(at_BK, count_BM, not_padding_BK)

    return mask.cached(("landmarks", number), build)


def run_means(x_BHKD: torch.Tensor, landmarks: Landmarks) -> torch.Tensor:
    """(B, H, M, D): mean of each landmark's tokens, 0 where it has none."""
    batch, heads, length, size = x_BHKD.shape
    number = landmarks.count_BM.shape[1]
    row = torch.arange(batch, device=x_BHKD.device).unsqueeze(1) * (number + 1)
    sums = x_BHKD.new_zeros(batch * (number + 1), heads * size)
    # Padding may hold anything, infinities too, but has a sum of its own, which is thrown away.
    sums = sums.index_add(0, (row + landmarks.at_BK).flatten(), x_BHKD.transpose(1, 2).reshape(batch * length, -1))
    sums_BMHD = sums.view(batch, number + 1, heads, size)[:, :-1]
    return (sums_BMHD / landmarks.count_BM.clamp(min=1).view(-1, number, 1, 1)).transpose(1, 2)


def iterative_inverse(a: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Moore-Penrose inverse of (..., M, M) matrices that are not negative, to the precision of ``num_iterations``.

    ``Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4`` from ``Z = A^T / (|A|_1 |A|_inf)``, each matrix's own
    norms. Rows and columns of zeros stay zero.
    """
    norms = a.sum(dim=-2).amax(dim=-1) * a.sum(dim=-1).amax(dim=-1)
    z = a.mT / norms.masked_fill(norms == 0, 1.0)[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(num_iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def dense_nystrom_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    num_landmarks: int,
    num_iterations: int,
    scale: float,
    conv_HC: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, multiplied out: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    dtype, heads, length = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1], q_BHQD.shape[2]
    landmarks = landmarks_of(mask, num_landmarks)
    q, k = q_BHQD.to(dtype), expand_heads(k_BGKD, heads).to(dtype)
    q_BHMD, k_BHMD = run_means(q, landmarks), run_means(k, landmarks)
    held, not_padding = (landmarks.count_BM > 0)[:, None, None], landmarks.not_padding_BK[:, None, None]
    near = masked_softmax(q @ k_BHMD.mT * scale, held)
    far = masked_softmax(q_BHMD @ k.mT * scale, not_padding & held.mT)
    inverse = inverse_of_core(q_BHMD, k_BHMD, held, scale, num_iterations)
    weights_BHQK = ((near.to(inverse.dtype) @ inverse) @ far.to(inverse.dtype)).to(dtype)
    if conv_HC is not None:
        index = torch.arange(length, device=q.device)
        tap = index - index.unsqueeze(1) + conv_HC.shape[1] // 2
        inside = (tap >= 0) & (tap < conv_HC.shape[1])
        band_HQK = torch.where(inside, conv_HC.to(dtype)[:, tap.clamp(0, conv_HC.shape[1] - 1)], 0.0)
        weights_BHQK = weights_BHQK + band_HQK * not_padding
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, heads).to(dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


def nystrom_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    num_landmarks: int,
    num_iterations: int,
    scale: float,
    conv_HC: torch.Tensor | None,
) -> torch.Tensor:
    """The same from right to left, in O(N M D): out_BHQV in the dtype of v.

    Args:
        num_landmarks: means that stand for the queries and for the keys.
        num_iterations: of :func:`iterative_inverse`.
        conv_HC: weights of a convolution over the values of neighbouring tokens that is added, or None.
    """
    dtype, (batch, heads, _, _), groups = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape, k_BGKD.shape[1]
    landmarks = landmarks_of(mask, num_landmarks)
    q, k, v = q_BHQD.to(dtype), k_BGKD.to(dtype), v_BGKV.to(dtype)
    q_BHMD, k_BHMD = run_means(q, landmarks), expand_heads(run_means(k, landmarks), heads)
    held, not_padding = (landmarks.count_BM > 0)[:, None, None], landmarks.not_padding_BK[:, None, None]
    # Fused softmax attention twice: landmarks to all keys, and all queries to landmarks. A row without a real token
    # sees something in both, so that nothing is NaN, and its inverse is zero.
    nobody = ~held.any(dim=-1, keepdim=True)
    far_mask = None if mask.padding_BK is None else not_padding | nobody
    far = scaled_dot_product_attention(
        q_BHMD.reshape(batch, groups, -1, q.shape[3]), k, v, attn_mask=far_mask, scale=scale
    )
    far_BHMV = far.view(batch, heads, held.shape[-1], -1)
    # Products of all iterations are computed again in backward. They are in float64, which autocast leaves alone: they
    # follow from each other, so that products in bfloat16 would spoil the gradient.
    inputs = (q_BHMD, k_BHMD, far_BHMV, held, scale, num_iterations)
    value_BHMV = checkpoint(_landmark_values, *inputs, use_reentrant=False, preserve_rng_state=False)
    out_BHQV = scaled_dot_product_attention(q, k_BHMD, value_BHMV, attn_mask=held | nobody, scale=scale)
    if conv_HC is not None:
        if mask.padding_BK is not None:
            v = v.masked_fill(~not_padding.mT, 0.0)
        taps = conv_HC.to(dtype)[:, None, :, None]
        out_BHQV = out_BHQV + conv2d(v, taps, padding=(taps.shape[2] // 2, 0), groups=groups)
    return out_BHQV.to(v_BGKV.dtype)


def _landmark_values(q_BHMD, k_BHMD, far_BHMV, held, scale, num_iterations):
    """What queries collect at the landmarks: the inverse times what the landmarks collect from the keys."""
    inverse = inverse_of_core(q_BHMD, k_BHMD, held, scale, num_iterations)
    return (inverse @ far_BHMV.to(inverse.dtype)).to(far_BHMV.dtype)


def inverse_of_core(q_BHMD, k_BHMD, held, scale, num_iterations):
    """The inverse of the landmarks' own weights, in float64: each step can triple what rounding has left.

    Float32 would have nothing right after some 20 steps; this has what float32 can hold after 40.
    """
    precise = q_BHMD.dtype if q_BHMD.device.type == "mps" else torch.float64  # which MPS does not have
    scores = q_BHMD.to(precise) @ k_BHMD.to(precise).mT * scale
    return iterative_inverse(masked_softmax(scores, held & held.mT), num_iterations)
