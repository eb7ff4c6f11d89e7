"""flash-linear-attention's chunked kernels, for recurrences and for causal linear attention."""

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.backend import Backend, register_backend
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import FeatureAttention, contiguous_segments, project, projections
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens, hide
from attn_plugins.ops.reference import accumulation_dtype, expand_heads

LARGEST_HEAD = 256
"""Size of a query or value that all of the kernels take."""
MULTIPLE = 16
"""Of channels, which are filled up with zeros: what matrix units take, and rows that can be read at once."""
COUNT_SPAN = 256
"""Tokens whose decayed number is counted one after another, beside all other spans."""


class Kernels(NamedTuple):
    """What is taken of the library. Tensors are (B, T, H, ...), of one row B = 1 where there are ``cu_seqlens``."""

    simple_gla: Callable[..., Any]
    gla: Callable[..., Any]
    delta_rule: Callable[..., Any]
    gated_delta_rule: Callable[..., Any]
    kda: Callable[..., Any]
    hgrn: Callable[..., Any]


@functools.cache
def kernels() -> Kernels:
    """The kernels, which are compiled when they first run."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.hgrn import fused_recurrent_hgrn
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    return Kernels(
        simple_gla=chunk_simple_gla,
        gla=chunk_gla,
        delta_rule=chunk_delta_rule,
        gated_delta_rule=chunk_gated_delta_rule,
        kda=chunk_kda,
        hgrn=fused_recurrent_hgrn,
    )


@register_backend("fla")
class Fla(Backend):
    """Kernels of flash-linear-attention, with what they leave out in PyTorch beside them.

    They serve every :class:`RecurrentAttention` and, where it is causal, every :class:`FeatureAttention` but those
    whose features are exponentials. Packed rows become one row of segments (``cu_seqlens``), for which the library
    reads a number on the host in each call; padding neither enters nor decays. Keys are repeated to the query heads
    that share them.

    bfloat16 runs in bfloat16, with gates and rates in float32. float32 is multiplied in TF32 on a GPU, with errors of
    about 1e-3; so are features that may be negative, and float16, whose range sums over thousands of keys leave. The
    kernels have no second derivatives.

    Seen right in Triton's interpreter, forward and backward; compiled for GPUs, but for delta rules with a gate a
    channel; not yet run on one.
    """

    what = "flash-linear-attention's kernels, for recurrences and causal linear attention"

    def missing(self):
        packages = {"fla": "fla-core", "triton": "triton", "einops": "einops"}
        absent = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
        return f"it needs {', '.join(absent)}: pip install {' '.join(absent)}" if absent else None

    def refuses(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        if isinstance(attention, FeatureAttention):
            if mask.cross or not mask.causal:
                return "of linear attention it serves the causal one, got one that is not"
            if attention.phi.exponential:
                return "features that are exponentials go by a running maximum, which its kernels have not"
        elif not isinstance(attention, RecurrentAttention):
            return "it serves recurrences and linear attention"
        if torch.float64 in (q_BHQD.dtype, k_BGKD.dtype, v_BGKV.dtype):
            return "it computes in float32 at most, got float64"
        largest = max(q_BHQD.shape[3], v_BGKV.shape[3])
        if largest > LARGEST_HEAD:
            return f"heads may have {LARGEST_HEAD} channels, got {largest}"
        if torch.is_grad_enabled() and _wrong_with_gates(q_BHQD.device) and isinstance(attention, RecurrentAttention):
            none = _no_tokens(attention, q_BHQD, k_BGKD, v_BGKV)
            exact_delta = none.log_gate is None and q_BHQD.dtype != torch.bfloat16
            one_gate = none.log_gate is not None and (none.log_gate.shape[3] == 1 or none.beta is not None)
            if exact_delta or one_gate:  # that of the average beside a delta rule is one too
                return (
                    "on Hopper GPUs Triton 3.4 to 3.7.0 compiles wrong gradients of kernels with one gate a token, "
                    f"got Triton {metadata.version('triton')}: pip install 'triton>=3.7.1', or tilelang"
                )
        return None

    @torch.compiler.disable(reason="the kernels are not part of a graph")
    def attend(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None):
        before = mask.q_offset - mask.kv_offset
        end = before + q_BHQD.shape[2]
        if not 0 <= before <= k_BGKD.shape[2] - q_BHQD.shape[2]:
            raise ValueError(
                f"{q_BHQD.shape[2]} queries from key {before} on; allowed: queries within {k_BGKD.shape[2]} keys"
            )
        of_keys = [k_BGKD, v_BGKV] if hidden_BQE is None else [k_BGKD, v_BGKV, hidden_BQE.unsqueeze(1)]
        exact = isinstance(attention, FeatureAttention) and attention.phi.signed
        lower = q_BHQD.dtype == k_BGKD.dtype == v_BGKV.dtype == torch.bfloat16 and not exact
        rows = _Rows.of(mask, end, torch.bfloat16 if lower else torch.float32)
        if isinstance(attention, RecurrentAttention):
            dtype = accumulation_dtype(q_BHQD, *of_keys)
            new = [x[:, :, :end] for x in of_keys]
            weights = [w.to(dtype) for w in attention.weights()]
            tokens = attention.prepare(scale)(pad(q_BHQD, (0, 0, before, 0)), *new, *weights)
            tokens, counts = hide(tokens, rows.not_padding, None)
            out_BHTV = (_average if tokens.beta is None else _delta)(tokens, counts, rows)
        else:
            q, k, more = prepared = attention.prepare(q_BHQD, k_BGKD, mask, scale)
            w_q, w_k = projections(prepared)
            fq, fk = attention.phi.features(project(q, w_q)), attention.phi.features(project(k, w_k))[:, :, :end]
            fk = fk if rows.not_padding is None else fk * rows.not_padding
            out_BHTV = _linear(pad(fq, (0, 0, before, 0)), fk, v_BGKV[:, :, :end], more["eps"], rows)
        return out_BHTV[:, :, before:].to(v_BGKV.dtype)


@functools.cache
def _wrong_with_gates(device: torch.device) -> bool:
    """Whether the library refuses the backward pass of gates that all channels share (its issue 640)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    version = tuple(int(part) for part in metadata.version("triton").split("+")[0].split(".")[:3])
    return (3, 4) <= version < (3, 7, 1) and importlib.util.find_spec("tilelang") is None


def _no_tokens(
    attention: RecurrentAttention, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor
) -> Tokens:
    """What a recurrence takes in of no tokens, which shows its kind."""
    given = [x[:, :, :0] for x in (q_BHQD, k_BGKD, v_BGKV)]
    if attention.wants_hidden:
        assert attention.heads is not None
        given.append(q_BHQD.new_empty(len(q_BHQD), 1, 0, attention.heads.known_hidden_size(attention.name)))
    return attention.prepare(1.0)(*given, *attention.weights())


class _Rows(NamedTuple):
    """What is known of the rows that kernels go over, and the dtype in which they do."""

    not_padding: torch.Tensor | None
    """(B or 1, 1, T, 1)"""
    segment_start: torch.Tensor | None
    """(B or 1, 1, T, 1)"""
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None
    """(segments + 1,): where segments start if all rows are joined to one, on the device and on the host."""
    dtype: torch.dtype

    @classmethod
    def of(cls, mask: AttentionMask, end: int, dtype: torch.dtype) -> "_Rows":
        """The rows of a mask up to a key; segments are read on the host, once for all layers."""
        not_padding = None if mask.padding_BK is None else mask.padding_BK[:, None, :end, None]
        segments_BK = contiguous_segments(mask)
        if segments_BK is None:
            return cls(not_padding, None, None, dtype)

        def read() -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            segments_BT = segments_BK[:, :end]
            start_BT = pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
            starts = start_BT.flatten().cpu().nonzero().flatten()
            host = pad(starts, (0, 1), value=start_BT.numel())
            return start_BT[:, None, :, None], (host.to(start_BT.device), host)

        return cls(not_padding, *mask.cached(("cu_seqlens", end), read), dtype)

    def take(self, x_BHTF: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(B, T, H, F') as a kernel takes it; rows are joined if they are packed, channels filled up with zeros."""
        x = pad(x_BHTF, (0, -x_BHTF.shape[3] % MULTIPLE)).to(dtype or self.dtype)
        return self._joined(x.transpose(1, 2).contiguous())

    def take_scalar(self, x_BHT1: torch.Tensor) -> torch.Tensor:
        """(B, T, H) in float32."""
        return self._joined(x_BHT1.squeeze(3).transpose(1, 2).float().contiguous())

    def give(self, x_BTHF: torch.Tensor, batch: int, size: int) -> torch.Tensor:
        """(B, H, T, F) of what a kernel gave, in float32."""
        x = x_BTHF if self.cu_seqlens is None else x_BTHF.unflatten(1, (batch, -1)).squeeze(0)
        return x[..., :size].transpose(1, 2).float()

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.cu_seqlens is None else x.flatten(0, 1).unsqueeze(0)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of kernels: segments."""
        if self.cu_seqlens is None:
            return {}
        return {"cu_seqlens": self.cu_seqlens[0], "cu_seqlens_cpu": self.cu_seqlens[1]}


def _average(tokens: Tokens, counts: torch.Tensor | None, rows: _Rows) -> torch.Tensor:
    """``S_t = diag(e^g_t) S_{t-1} + k_t v_t^T``, ``out_t = S_t^T (q_t / n_t)``: (B, H, T, V)."""
    (batch, heads, length, _), size = tokens.q.shape, tokens.v.shape[3]
    assert tokens.log_gate is not None
    number = _decayed_number(tokens.log_gate, counts, length, rows)
    q = tokens.q / expand_heads(number, heads).clamp_min(1.0)
    k, v = (expand_heads(x, heads) for x in (tokens.k, tokens.v))
    gate = expand_heads(tokens.log_gate.expand(batch, -1, length, -1), heads)
    if gate.shape[3] == 1:
        rule, g = kernels().simple_gla, rows.take_scalar(gate)
    else:
        rule, g = kernels().gla, rows.take(gate, torch.float32)
    out, _ = rule(rows.take(q), rows.take(k), rows.take(v), g=g, scale=1.0, **rows.options)
    return rows.give(out, batch, size)


def _delta(tokens: Tokens, counts: torch.Tensor | None, rows: _Rows) -> torch.Tensor:
    """The delta rule's memory, and the decayed average of the values beside it: (B, H, T, V)."""
    (batch, heads, length, _), size = tokens.q.shape, tokens.v.shape[3]
    assert tokens.beta is not None
    assert tokens.average_weight is not None
    gate = tokens.log_gate
    gate = tokens.k.new_zeros(1, 1, 1, 1) if gate is None else gate
    of_sums = gate[..., -1:]
    gate_BGT1 = of_sums.expand(batch, tokens.k.shape[1], length, 1)

    k, v, beta = (expand_heads(x, heads) for x in (tokens.k, tokens.v, tokens.beta))
    given = {"q": rows.take(tokens.q), "k": rows.take(k), "v": rows.take(v), "beta": rows.take_scalar(beta)}
    if tokens.log_gate is None and rows.dtype != torch.float32:  # which the rule without gates refuses
        recalled, _ = kernels().delta_rule(**given, scale=1.0, **rows.options)
    elif gate.shape[3] > 1:
        g = rows.take(expand_heads(gate[..., :-1].expand(batch, -1, length, -1), heads), torch.float32)
        recalled, _ = kernels().kda(**given, g=g, scale=1.0, **rows.options)
    else:
        g = rows.take_scalar(expand_heads(gate_BGT1, heads))
        recalled, _ = kernels().gated_delta_rule(**given, g=g, scale=1.0, **rows.options)

    one = rows.take(pad(torch.ones_like(gate_BGT1), (0, MULTIPLE - 1)))
    counted = rows.take(tokens.v if counts is None else tokens.v * counts)
    decay = {} if tokens.log_gate is None else {"g": rows.take_scalar(gate_BGT1)}
    total, _ = kernels().simple_gla(one, one, counted, scale=1.0, **decay, **rows.options)
    number = _decayed_number(of_sums, counts, length, rows)
    average = rows.give(total, batch, size) / number.clamp_min(1.0)
    weight = tokens.average_weight.view(-1, 1, 1)
    return rows.give(recalled, batch, size) + weight * expand_heads(average, heads)


def _linear(
    fq_BHTF: torch.Tensor, fk_BGTF: torch.Tensor, v_BGTV: torch.Tensor, eps: float, rows: _Rows
) -> torch.Tensor:
    """Linear attention by features: (B, H, T, V).

    The denominator is one more channel of the values: what gradients have in common with it then cancels before it is
    rounded.
    """
    (batch, heads), size = fq_BHTF.shape[:2], v_BGTV.shape[3]
    k, v = (expand_heads(x, heads) for x in (fk_BGTF, pad(v_BGTV, (0, 1), value=1.0)))
    out, _ = kernels().simple_gla(rows.take(fq_BHTF), rows.take(k), rows.take(v), scale=1.0, **rows.options)
    totals = rows.give(out, batch, size + 1)
    return totals[..., :-1] / (totals[..., -1:] + eps)


def _decayed_number(log_gate: torch.Tensor, counts: torch.Tensor | None, length: int, rows: _Rows) -> torch.Tensor:
    """``n_t = e^g_t n_{t-1} + 1``, (B or 1, G or 1, T, F or 1) in float32.

    The kernel goes from token to token, so that spans run beside one another: each from nothing, then what was before.
    Nothing but decays is multiplied, and -inf is as good a gate as any.

    Args:
        log_gate: (B or 1, G or 1, T or 1, F or 1)
        counts: (B or 1, 1, T, 1), 1 for each token that counts and 0 for others; None where all do.
    """
    gate = log_gate.float().expand(-1, -1, length, -1)
    if rows.segment_start is not None:
        gate = gate.masked_fill(rows.segment_start, -torch.inf)
    if counts is not None:
        gate = gate.expand(max(len(gate), len(counts)), -1, -1, -1)
    batch, heads, _, size = gate.shape
    rest = -length % COUNT_SPAN if length > COUNT_SPAN else 0
    one = torch.ones_like(gate) if counts is None else counts.float().expand_as(gate)
    gate, one = (pad(x, (0, 0, 0, rest)).transpose(1, 2).flatten(2, 3) for x in (gate, one))
    spans, span = (gate.shape[1] // COUNT_SPAN, COUNT_SPAN) if rest or length > COUNT_SPAN else (1, length)
    gate, one = (x.reshape(batch * spans, span, -1) for x in (gate, one))
    hgrn = kernels().hgrn
    number, _ = hgrn(one, gate)
    if spans > 1:
        since = gate.cumsum(1)
        ends, whole = (x[:, -1].unflatten(0, (batch, spans)).contiguous() for x in (number, since))
        before, _ = hgrn(ends, whole)
        before = pad(before[:, :-1], (0, 0, 1, 0)).flatten(0, 1).unsqueeze(1)
        number = number + since.exp() * before
    return number.view(batch, spans * span, heads, size)[:, :length].transpose(1, 2)
