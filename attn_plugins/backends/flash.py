"""Flash attention with windows and sequences of varying lengths, as torch itself brings it."""

from typing import ClassVar

import torch

from attn_plugins.core.backend import Backend, register_backend
from attn_plugins.ops.softmax.attention import PatternAttention, by_heads
from attn_plugins.ops.softmax.fused_calls import Call, Kernel, fused_attention, not_in_calls

LARGEST_HEAD = 256
OLDEST = (8, 0)
"""Compute capability from which torch's kernels run."""


def forward(q_THD, k_TGD, v_TGD, call: Call, scale: float):
    """:attr:`Kernel.forward` by torch's kernel."""
    before, after = call.window
    out_THD, lse_HT, *known, _ = torch.ops.aten._flash_attention_forward(
        q_THD, k_TGD, v_TGD,
        call.queries.bounds_L, call.keys.bounds_L, call.queries.longest, call.keys.longest,
        0.0, False, False,
        scale=scale, window_size_left=before, window_size_right=after,
    )  # fmt: skip
    return out_THD, lse_HT, known


def backward(dout_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, known, call: Call, scale: float):
    """:attr:`Kernel.backward` by torch's kernel."""
    before, after = call.window
    return torch.ops.aten._flash_attention_backward(
        dout_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT,
        call.queries.bounds_L, call.keys.bounds_L, call.queries.longest, call.keys.longest,
        0.0, False, *known,
        scale=scale, window_size_left=before, window_size_right=after,
    )  # fmt: skip


@register_backend("flash")
class Flash(Backend):
    """Attentions of a pattern: a window (with sink tokens, global tokens or dilation), or separate blocks (with sinks).

    A window with tokens that are seen from everywhere takes three calls, blocks with them two, merged by their
    logarithms of sums; learned sinks are merged in the same way. Texts of a packed row and rows without their padding
    are sequences of the kernel, phases of a dilated window and blocks too.

    Seen right with other kernels in the place of torch's, the fused one for CPUs among them; not yet run on a GPU.
    """

    what = "torch's own flash attention: windows, with sinks and dilation, separate blocks, with sinks; half precision"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    kernel: ClassVar[Kernel] = Kernel(forward, backward)

    def missing(self):
        if torch.version.hip is None and torch.backends.cuda.is_flash_attention_available():
            return None
        return "this torch has no flash attention for CUDA: install a build of torch for CUDA from pytorch.org"

    def refuses(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout=0.0, **options):
        if not isinstance(attention, PatternAttention):
            return "it serves softmax attention over a pattern that is known before the scores"
        if q_BHQD.is_cuda and torch.cuda.get_device_capability(q_BHQD.device) < OLDEST:
            return "it needs a GPU of compute capability 8.0 or newer"
        dtypes = {x.dtype for x in (q_BHQD, k_BGKD, v_BGKV)}
        if len(dtypes) > 1 or not dtypes <= set(self.dtypes):
            allowed, got = (", ".join(sorted(map(str, found))) for found in (self.dtypes, dtypes))
            return f"queries, keys and values must all be of one of {allowed}, got {got}"
        size = max(q_BHQD.shape[3], v_BGKV.shape[3])
        if size > LARGEST_HEAD:
            return f"head dimensions of at most {LARGEST_HEAD} are served, got {size}"
        if not isinstance(scale, (int, float)):
            return "the scale must be a number"
        if dropout:
            return "attention dropout is not served"
        for extra in ("position_bias", "softcap"):
            if options.get(extra) is not None:
                return f"{extra} is not served"
        parts = attention.patterns(q_BHQD.shape[1], mask, options.get("grid_size"))
        reasons = (not_in_calls(mask, pattern) for _, pattern in parts)
        return next((reason for reason in reasons if reason is not None), None)

    def attend(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, rotary=None, grid_size=None, sinks=None, **_):
        q_BHQD, k_BGKD = attention.place(q_BHQD, k_BGKD, mask, rotary)
        parts = attention.patterns(q_BHQD.shape[1], mask, grid_size)

        def attend(q, k, v, mask, pattern, *, position_bias, **options):
            return fused_attention(q, k, v, mask, pattern, kernel=self.kernel, **options)

        return by_heads(attend, q_BHQD, k_BGKD, v_BGKV, mask, parts, scale=scale, sinks=sinks)
