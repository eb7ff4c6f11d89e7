"""Compiled kernels of linear attention, as operators with a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from attn_plugins.backends.cpp_tiles import MULTIPLE, SIZE, dense
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import Projection, contiguous_segments, padding_of, project
from attn_plugins.ops.linear.features import FEATURE_MAPS, FeatureMap, Prepared
from attn_plugins.ops.reference import outside_autocast

MAPS = {"elu": 0, "relu": 1, "relu2": 2, "hedgehog": 3, "identity": 4}
"""Feature maps that kernels compute, by name; the number is theirs."""


def runs_of(batch: int, tokens: int, segments_BT: torch.Tensor | None) -> torch.Tensor:
    """(number, 4) int32: of each text its row, its first token, how many, its first chunk."""
    if segments_BT is None:
        row = torch.arange(batch)
        start, length = torch.zeros_like(row), torch.full_like(row, tokens)
    else:
        new = pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
        row, start = new.nonzero(as_tuple=True)
        end = pad(row[1:] * tokens + start[1:], (0, 1), value=batch * tokens)
        length = end - (row * tokens + start)
    chunks = -(-length // SIZE)
    return torch.stack([row, start, length, chunks.cumsum(0) - chunks], dim=1).to(torch.int32)


def why_not(phi: FeatureMap, size: int, mask: AttentionMask) -> str | None:
    """Why the kernels cannot compute linear attention over these features with heads of this size, or None."""
    name = next((name for name, one in FEATURE_MAPS.items() if one is phi), None)
    if name not in MAPS:
        return f"feature maps that come down to {', '.join(MAPS)} are served, got {name}"
    if not mask.plain or mask.cross or mask.q_length != mask.kv_length or mask.q_offset != mask.kv_offset:
        return f"it serves whole sequences, as many queries as keys, got {mask!r}"
    if (
        name not in ("relu", "relu2", "identity") and size % MULTIPLE
    ):  # which leave zeros that are filled in as they are
        return f"with {name} it serves heads whose size is a multiple of {MULTIPLE}, got {size}"
    return None


def compiled_linear(prepared: Prepared, v_BGKV: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """As :func:`attn_plugins.ops.linear.attention.linear_attention`, compiled: out_BHQV in the dtype of v."""
    q_BHQD, k_BGKD, options = prepared
    q, k = (dense(project(x, options.get(w))) for x, w in ((q_BHQD, "query_projection"), (k_BGKD, "key_projection")))
    padding = padding_of(mask)
    padding = None if padding is None else padding.contiguous()
    sizes = (mask.batch_size, mask.kv_length)
    runs = mask.cached("compiled runs", lambda: runs_of(*sizes, contiguous_segments(mask)))
    how = (MAPS[options["feature_map"]], mask.causal, True, float(options["eps"]))
    out, _, _ = torch.ops.attn_plugins_cpp.linear_forward(q, k, dense(v_BGKV), runs, padding, *how)
    return out[..., : v_BGKV.shape[3]].to(v_BGKV.dtype)


def compiled_sums(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTV: torch.Tensor,
    w_q: Projection,
    w_k: Projection,
    seen_BT: torch.Tensor | None,
    segments_BT: torch.Tensor | None,
    *,
    feature_map: str,
    cached: Callable[..., Any],
    **sizes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`attn_plugins.ops.linear.window.causal_sums`, compiled, where there is no state before."""
    q, k = dense(project(q_BHTD, w_q)), dense(project(k_BGTD, w_k))
    runs = cached("compiled runs", lambda: runs_of(q.shape[0], q.shape[2], segments_BT))
    padding = None if seen_BT is None else seen_BT.contiguous()
    how = (MAPS[feature_map], True, False, 0.0)
    num, den, _ = torch.ops.attn_plugins_cpp.linear_forward(q, k, dense(v_BGTV), runs, padding, *how)
    return num[..., : v_BGTV.shape[3]], den


def register() -> None:
    """As :func:`attn_plugins.backends.cpp_tiles.register`."""

    @torch.library.register_fake("attn_plugins_cpp::linear_forward")
    def _(q, k, v, runs, padding, feature_map, causal, divided, eps):
        batch, heads, tokens, size = q.shape
        features = 2 * size if feature_map == MAPS["hedgehog"] else size
        number = torch.library.get_ctx().new_dynamic_size() if causal else len(runs)
        states = q.new_empty(number, k.shape[1], features * (v.shape[3] + 1))
        return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2), q.new_empty(batch, heads, tokens), states

    @torch.library.register_fake("attn_plugins_cpp::linear_backward")
    def _(grad, grad_den, q, k, v, *others):
        return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))

    torch.library.register_autograd("attn_plugins_cpp::linear_forward", _linear_backward, setup_context=_keep_linear)


def _keep_linear(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, runs, padding, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, runs, padding)
    ctx.divided = ctx.how[2]
    ctx.set_materialize_grads(False)  # zeros for the states, which only the backward reads, would be as many as these


@outside_autocast
def _linear_backward(ctx: Any, grad: torch.Tensor | None, grad_den: torch.Tensor | None, *_: Any) -> tuple:
    out, den = ctx.saved_tensors[3:5]
    grad = torch.zeros_like(out) if grad is None else grad
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    of_den = None  # what divides has no other use
    if not ctx.divided:
        of_den = torch.zeros_like(den) if grad_den is None else grad_den
    return *torch.ops.attn_plugins_cpp.linear_backward(grad, of_den, *ctx.saved_tensors, *ctx.how), *[None] * 6
