"""FlexAttention: torch's kernels for softmax attention whose visible pairs come in blocks."""

import functools
import importlib.util
import itertools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attn_plugins.backends.flex_masks import flex_mask
from attn_plugins.core.backend import Backend, register_backend
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.attention import FollowsRules, by_heads
from attn_plugins.ops.softmax.tiles import Rule

SMALLEST_HEAD, LARGEST_HEAD = 16, 256
"""Sizes of heads between which its kernels exist and fit into a GPU's shared memory."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_numbers = itertools.count()


@register_backend("flex")
class Flex(Backend):
    """FlexAttention's Triton kernels, forward and backward, for every attention whose visible pairs follow a rule.

    What is visible follows from the attention's own rule: blocks of 128 queries and keys without a visible pair are
    left out, in blocks that are visible as a whole nothing is asked, elsewhere the rule is part of the kernel. A
    softcap and a position bias are in the kernel too, the bias with its gradient; learned sinks come in through the
    log-sum-exp that it returns. A rule that shows a pair in most blocks gains nothing from it.

    Kernels are compiled when they are first needed, for each pattern and kind of mask anew (with padding, packed), and
    then serve all masks of the kind. Inside torch.compile they are part of the graph.

    They have been run by Triton's interpreter and compiled for GPUs, and have not run on a GPU yet.
    """

    what = "torch's FlexAttention, for attentions whose visible pairs are known before the scores"
    traceable = True

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "it needs Triton, which torch for CUDA brings: pip install triton"
        return None

    def refuses(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout=0.0, **options):
        if not isinstance(attention, FollowsRules):
            return "it serves attentions whose visible pairs are known before the scores (FollowsRules)"
        if dropout:
            return f"it drops no weights, got an attention dropout of {dropout}"
        dtypes = {x.dtype for x in (q_BHQD, k_BGKD, v_BGKV)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return f"it takes one of {', '.join(map(str, DTYPES))}, got {', '.join(sorted(map(str, dtypes)))}"
        for size in (q_BHQD.shape[3], v_BGKV.shape[3]):
            if not SMALLEST_HEAD <= size <= LARGEST_HEAD:
                return f"its heads are of {SMALLEST_HEAD} to {LARGEST_HEAD} channels, got {size}"
        if mask.positions_BK is not None:
            return "it takes keys that follow one another, got positions of their own"
        there = [(device.type, device.index or 0) for device in (mask.rule_device, mask.device)]
        if mask.rule is not None and there[0] != there[1]:
            return f"it takes rules of the model's own on the device of the mask, {mask.device}, got {mask.rule_device}"
        return None

    def attend(
        self,
        attention,
        q_BHQD,
        k_BGKD,
        v_BGKV,
        *,
        mask,
        dropout=0.0,
        rotary=None,
        grid_size=None,
        sinks=None,
        **options,
    ):
        given = {"rotary": rotary, "grid_size": grid_size, "sinks": sinks}
        q_BHQD, k_BGKD, parts, sinks = attention.by_rules(q_BHQD, k_BGKD, mask, **given)
        return by_heads(_attend, q_BHQD, k_BGKD, v_BGKV, mask, parts, sinks=sinks, **options)


def _attend(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    pattern: Rule,
    *,
    scale: float,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    if position_bias is not None:
        position_bias = position_bias.float()[(None,) * (4 - position_bias.ndim)]
    inputs = (q_BHQD, k_BGKD, v_BGKV, flex_mask(mask, pattern), scale, softcap, position_bias, sinks)
    if torch.compiler.is_compiling():
        return attend_blocks(*inputs)
    tables = (mask.padding_BK, mask.segments_BK, mask.dense_BQK)
    kind = (
        mask.causal,
        mask.row_starts,
        _code(mask.rule),
        None if mask.structure is None else mask.structure.kind,
        *(None if table is None else len(table) > 1 for table in tables),
    )
    extras = (scale, softcap, None if position_bias is None else _varies(position_bias), sinks is None)
    shapes = (q_BHQD.shape[1], q_BHQD.shape[3], *v_BGKV.shape[1::2], q_BHQD.dtype, q_BHQD.device)
    learns = (torch.is_grad_enabled(), *(x is not None and x.requires_grad for x in (q_BHQD, position_bias, sinks)))
    return compiled((pattern, kind, extras, shapes, learns))(*inputs)


@functools.cache
def compiled(key: Hashable) -> Callable[..., torch.Tensor]:
    """:func:`attend_blocks` for one kind of call, made once a process.

    torch.compile counts how often it has compiled the code of a function, and gives up after a few. So each kind of
    call, which makes for kernels of its own, has code of its own, and is compiled for a first length and then for all.
    """
    code = attend_blocks.__code__.replace(co_name=f"attend_blocks_{next(_numbers)}")
    own = types.FunctionType(code, attend_blocks.__globals__, code.co_name)
    return torch.compile(own, fullgraph=True)


def attend_blocks(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    block_mask: BlockMask,
    scale: float,
    softcap: float | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """out_BHQV of the pairs that the mask shows.

    Args:
        bias: float32, of four dimensions that broadcast to (B, H, Q, K).
    """
    rows, heads, queries, keys = (1, 1, 1, 1) if bias is None else _varies(bias)

    def score_mod(
        score: torch.Tensor, row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[row * rows, head * heads, q * queries, k * keys]

    options: Any = {
        "score_mod": None if softcap is None and bias is None else score_mod,
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": q_BHQD.shape[1] != k_BGKD.shape[1],
    }
    if sinks is None:
        return flex_attention(q_BHQD, k_BGKD, v_BGKV, **options)
    out_BHQV, aux = flex_attention(q_BHQD, k_BGKD, v_BGKV, return_aux=AuxRequest(lse=True), **options)
    # The weights of keys shrink by the share of the sink, 1 - 1 / (1 + exp(lse - sink)).
    share_BHQ = torch.sigmoid(aux.lse - sinks.view(1, -1, 1).to(aux.lse.dtype))
    return (out_BHQV * share_BHQ.unsqueeze(-1)).to(out_BHQV.dtype)


def _varies(bias: torch.Tensor) -> Any:
    """1 for each dimension that a bias has, 0 for those in which it is the same everywhere."""
    return tuple(int(size > 1) for size in bias.shape)


def _code(rule: Any) -> Hashable:
    """What tells a model's own rule from others, whatever tensors it holds: its code, and that of rules inside it."""
    if not isinstance(rule, types.FunctionType):
        return id(type(rule))
    held = [cell.cell_contents for cell in rule.__closure__ or ()]
    inside = [_code(one) for part in held for one in (part if isinstance(part, tuple) else (part,)) if callable(one)]
    return (rule.__code__, *inside)
