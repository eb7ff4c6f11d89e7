"""What the chunks of a delta rule write, one after another: the parts for which autograd's own way is too long.

Letters: N chunks of C tokens.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def inverse_of_unit_lower(below: torch.Tensor) -> torch.Tensor:
    """(I + L)^-1, (..., C, C), with L what is below the diagonal of ``below``; C is a power of two.

    By halves: of blocks twice as large, each inverse is that of both halves, and a product of three below them. A
    solver goes through a chunk token by token. The series I - L + L^2 - ..., summed up by squaring, would be as short,
    but its terms grow beyond the digits of floats where keys are alike.
    """
    return _Inverse.apply(below)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below):
        inverse = below.new_ones(*below.shape[:-1], 1, 1)
        while (half := inverse.shape[-1]) < below.shape[-1]:
            first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
            blocks = below.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))
            between = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., half:, :half]
            square = second @ (between @ first)
            inverse = torch.cat([pad(first, (0, half)), torch.cat([-square, second], dim=-1)], dim=-2)
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


def write(
    u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, gate: torch.Tensor | None, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each chunk writes U - W S under its keys, and leaves gate S + K^T (U - W S), with S the memory before it.

    Args:
        u, w, k: (B, G, N, C, V), (B, G, N, C, F), (B, G, N, C, F).
        gate: (B or 1, G or 1, N or 1, F or 1, 1), or None where nothing is forgotten.
        memory: (B, G, F, V), before the first chunk.

    Returns:
        (what is written (B, G, N, C, V), the memory before each chunk (B, G, N, F, V), that after the last).
    """
    return _Write.apply(u, w, k, gate, memory)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, w, k, gate, memory):
        memories, written = memory.new_empty(*u.shape[:3], *memory.shape[2:]), torch.empty_like(u)
        memories[:, :, 0] = memory
        after = torch.empty_like(memories[:, :, 0])
        into = [*memories.flatten(0, 1).unbind(1)[1:], after.flatten(0, 1)]
        for u_n, w_n, k_n, before, new, gate_n in _by_chunk(gate, u, w, k, memories, written):
            torch.baddbmm(u_n, w_n, before, alpha=-1, out=new)
            after_n = into.pop(0)
            if gate_n is None:
                torch.baddbmm(before, k_n.mT, new, out=after_n)
            else:
                torch.mul(before, gate_n, out=after_n).baddbmm_(k_n.mT, new)
        ctx.save_for_backward(w, k, gate, memories, written)
        return written, memories, after

    @staticmethod
    @once_differentiable
    def backward(ctx, d_written, d_memories, d_after):
        w, k, gate, memories, written = ctx.saved_tensors
        d_u, d_afters = torch.empty_like(written), torch.empty_like(memories)
        d_afters[:, :, -1] = d_after
        d_memory = torch.empty_like(d_after)
        into = [d_memory.flatten(0, 1), *d_afters.flatten(0, 1).unbind(1)[:-1]]
        for w_n, k_n, d_new, d_read, d_after_n, d_u_n, gate_n in reversed(
            list(_by_chunk(gate, w, k, d_written, d_memories, d_afters, d_u))
        ):
            torch.baddbmm(d_new, k_n, d_after_n, out=d_u_n)
            d_before = into.pop()
            if gate_n is None:
                torch.baddbmm(d_after_n, w_n.mT, d_u_n, alpha=-1, out=d_before).add_(d_read)
            else:
                torch.addcmul(d_read, d_after_n, gate_n, out=d_before).baddbmm_(w_n.mT, d_u_n, alpha=-1)
        d_gate = None
        if gate is not None:
            d_gate = (d_afters * memories).sum_to_size(gate.shape)
        return d_u, (d_u @ memories.mT).neg_(), written @ d_afters.mT, d_gate, d_memory


def _by_chunk(gate, *tensors):
    """Of each chunk, the tensors with batch and heads as one dimension, and its gate or None."""
    batch, heads, number = tensors[0].shape[:3]
    parts = [x.flatten(0, 1).unbind(1) for x in tensors]
    if gate is None:
        parts.append([None] * number)
    else:
        parts.append(gate.expand(batch, heads, number, *gate.shape[3:]).flatten(0, 1).unbind(1))
    return zip(*parts, strict=False)
