"""Compiled attention to blocks of keys that each query has chosen, as operators with a gradient."""

from typing import Any

import torch

from attn_plugins.backends.cpp_tiles import dense
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.gather import block_layout
from attn_plugins.ops.reference import outside_autocast


def compiled_blocks(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    chosen_BHQT: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.blocks.gather.block_attention`, by compiled kernels: out_BHQV in the dtype of v."""
    blocks = block_layout(mask, block_size)

    def find() -> tuple[torch.Tensor, torch.Tensor]:
        number = torch.zeros(blocks.start_BN.shape, dtype=torch.int32)
        number.scatter_add_(1, blocks.block_BK, torch.ones_like(blocks.block_BK, dtype=torch.int32))
        return blocks.keys_BNC[..., 0].to(torch.int32).contiguous(), number

    first_BN, number_BN = mask.cached(("compiled blocks", blocks.keys_BNC.shape[2]), find)
    q, k, v = (dense(x) for x in (q_BHQD, k_BGKD, v_BGKV))
    padding_BK = mask.padding_BK
    if padding_BK is not None:
        padding_BK = padding_BK.expand(mask.batch_size, -1).contiguous()
        # Padding may hold anything: a weight of 0 would not hide what is not a number.
        hidden = ~padding_BK[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    where = (chosen_BHQT.contiguous(), first_BN, number_BN, padding_BK, blocks.causal, blocks.before_queries)
    out, _ = torch.ops.attn_plugins_cpp.chosen_forward(q, k, v, *where, float(scale), dropout, seed)
    return out[..., : v_BGKV.shape[3]].to(v_BGKV.dtype)


def register() -> None:
    """As :func:`attn_plugins.backends.cpp_tiles.register`."""

    @torch.library.register_fake("attn_plugins_cpp::chosen_forward")
    def _(q, k, v, *others):
        batch, heads, queries, _ = q.shape
        return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2), q.new_empty(batch, heads, queries)

    @torch.library.register_fake("attn_plugins_cpp::chosen_backward")
    def _(grad, q, k, v, *others):
        return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))

    torch.library.register_autograd("attn_plugins_cpp::chosen_forward", _chosen_backward, setup_context=_keep_chosen)


def _keep_chosen(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, chosen, first, number, padding, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, chosen, first, number, padding)


@outside_autocast
def _chosen_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    return *torch.ops.attn_plugins_cpp.chosen_backward(grad, *ctx.saved_tensors, *ctx.how), *[None] * 9
