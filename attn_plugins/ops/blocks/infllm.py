"""Blocks chosen by means of keys over short kernels, without weights: the choice of InfLLM-V2, in all forms.

It is that of native sparse attention's compressed branch, with means in the place of weighted sums and the largest
weight in the place of the sum; here the branch has no output.
"""

import dataclasses
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.batched import batched_block_attention
from attn_plugins.ops.blocks.batched_native_sparse import Seen, choose_at_once, compress_at_once
from attn_plugins.ops.blocks.gather import PLAIN, SoftmaxForms, chosen_keys
from attn_plugins.ops.blocks.native_sparse import (
    Compression,
    NativeSparseSizes,
    choose_by_weights,
    compress,
    compressed_attention,
    compression_of,
    gather_choose,
    gather_compressed_attention,
    visible_blocks,
)
from attn_plugins.ops.decode.block_cache import KeyBlocks, chosen_attention
from attn_plugins.ops.reference import dense_attention, expand_heads, masked_softmax, scores


def _means(mask: AttentionMask, sizes: NativeSparseSizes) -> tuple[NativeSparseSizes, Compression]:
    """Where means are taken; of a kernel that is longer than the text there is none, however long it is."""
    sizes = dataclasses.replace(sizes, kernel_size=min(sizes.kernel_size, mask.kv_length + 1))
    return sizes, compression_of(mask, sizes)


def mean_kernel(k_BGKD: torch.Tensor, sizes: NativeSparseSizes) -> torch.Tensor:
    """(G, kernel_size): the weight of each key in a mean."""
    return k_BGKD.new_full((k_BGKD.shape[1], sizes.kernel_size), 1 / sizes.kernel_size, dtype=torch.float32)


def dense_infllm_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    sizes: NativeSparseSizes,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV, weights_BHQK)."""
    (heads, groups), everywhere = (q_BHQD.shape[1], k_BGKD.shape[1]), slice(None)
    with torch.no_grad():
        sizes, compression = _means(mask, sizes)
        k_BGMD = compress(k_BGKD, mean_kernel(k_BGKD, sizes), compression.keys_BMC)
        visible = visible_blocks(everywhere, k_BGMD.shape[2], compression).unsqueeze(1)
        p_BHQM = masked_softmax(scores(q_BHQD, k_BGMD, scale=scale), visible)
        chosen_BGQT = choose_by_weights(p_BHQM, groups, everywhere, compression, sizes)
        seen = mask.dense() & chosen_keys(expand_heads(chosen_BGQT, heads), compression.blocks)
    return dense_attention(q_BHQD, k_BGKD, v_BGKV, seen, scale=scale, dropout=dropout)


def infllm_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    forms: SoftmaxForms = PLAIN,
    sizes: NativeSparseSizes,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """out_BHQV in the dtype of v, in tiles, for CPUs."""
    with torch.no_grad():
        sizes, compression = _means(mask, sizes)
        k_BGMD = compress(k_BGKD, mean_kernel(k_BGKD, sizes), compression.keys_BMC)
        options: dict[str, Any] = {"scale": scale, "dropout": 0.0}
        chosen_BGQT = compressed_attention(q_BHQD, k_BGMD, k_BGMD[..., :1], compression, sizes, **options)[1]
    options = {"block_size": sizes.block_size, "scale": scale, "dropout": dropout}
    return forms.over_blocks(q_BHQD, k_BGKD, v_BGKV, mask, chosen_BGQT, **options)


def batched_infllm_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    sizes: NativeSparseSizes,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The same in a fixed number of operations."""
    with torch.no_grad():
        sizes, compression = _means(mask, sizes)
        k_BGMD = compress_at_once(k_BGKD, mean_kernel(k_BGKD, sizes), compression)
        seen = Seen(mask, compression, k_BGMD.shape[2])
        chosen_BGQT = choose_at_once(q_BHQD, k_BGMD, seen, sizes, scale)
    options: dict[str, Any] = {"block_size": sizes.block_size, "scale": scale, "dropout": dropout}
    return batched_block_attention(q_BHQD, k_BGKD, v_BGKV, mask, chosen_BGQT, **options)


def gather_infllm_attention(
    q_BHQD: torch.Tensor, position_Q: torch.Tensor, state: KeyBlocks, *, sizes: NativeSparseSizes, **options: Any
) -> torch.Tensor:
    """The same for a few queries, the last tokens of a state: out_BHQV in at least float32."""
    seen = state.length if state.fixed_length is None else state.fixed_length
    sizes = dataclasses.replace(sizes, kernel_size=min(sizes.kernel_size, seen + 1))  # as in :func:`_means`
    with torch.no_grad():
        p_BHQM = gather_compressed_attention(q_BHQD, position_Q, state, sizes, scale=options["scale"])[1]
        chosen_BGQT = gather_choose(p_BHQM, position_Q, state, sizes)
    return chosen_attention(q_BHQD, position_Q, state, chosen_BGQT, **options)
