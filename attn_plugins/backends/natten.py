"""NATTEN: fused kernels for neighbourhoods on a grid of patches."""

import importlib.util
from importlib import metadata

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.backend import Backend, register_backend
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.neighborhood import Neighborhood

OLDEST = (0, 21, 7)
"""Version of NATTEN from which gradients go through the keys that all patches see: 0.21.0 leaves some of them out."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MULTIPLE = 8
"""Of the size of a head."""


@register_backend("natten")
class Natten(Backend):
    """NATTEN's kernels for attentions whose pattern is a neighbourhood of patches.

    Tokens before the patches are keys that every patch sees beside its neighbourhood, merged by NATTEN itself; what
    these tokens see, which is all, PyTorch's own attention computes.

    On CPU tensors, by its reference kernels, it equals the dense form; it has not yet run on a GPU.
    """

    what = "NATTEN's kernels, for neighbourhoods of patches"

    def missing(self):
        if importlib.util.find_spec("natten") is None:
            return "it needs NATTEN, built for this torch and GPU: see https://natten.org/install"
        version = metadata.version("natten")
        if tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()) < OLDEST:
            return (
                f"it needs NATTEN {'.'.join(map(str, OLDEST))} or newer, got {version}: see https://natten.org/install"
            )
        return None

    def refuses(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout=0.0, grid_size=None, **options):
        if not isinstance(attention, PatternAttention):
            return "it serves attentions whose visible pairs are neighbourhoods on a grid"
        if mask.causal or mask.cross or not mask.plain or mask.segments_BK is not None:
            return f"it serves whole images, in which nothing is hidden, got {mask!r}"
        for extra in ("position_bias", "softcap", "sinks"):
            if options.get(extra) is not None:
                return f"{extra} is not served"
        if dropout:
            return "attention dropout is not served"
        if not isinstance(scale, (int, float)):
            return "the scale must be a number"
        dtypes = {x.dtype for x in (q_BHQD, k_BGKD, v_BGKV)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            allowed, got = (", ".join(sorted(map(str, found))) for found in (DTYPES, dtypes))
            return f"queries, keys and values must all be of one of {allowed}, got {got}"
        sizes = q_BHQD.shape[3], v_BGKV.shape[3]
        if sizes[0] != sizes[1] or sizes[0] % MULTIPLE:
            return f"queries and values must be of one size, a multiple of {MULTIPLE}, got {sizes[0]} and {sizes[1]}"
        (_, pattern), *more = attention.patterns(q_BHQD.shape[1], mask, grid_size)
        if more or not isinstance(pattern, Neighborhood):
            return f"the pattern {type(pattern).__name__} is not served"
        sides, spans, steps = pattern.grid.sides, pattern.kernel_size, pattern.dilation
        if pattern.grid.blocks:
            return f"patches must come row by row, got them in blocks of {' and '.join(map(str, pattern.grid.blocks))}"
        if min(spans) < 2 or any(size * step > side for side, size, step in zip(sides, spans, steps, strict=True)):
            return (
                f"kernel_size must be from 2 on and, times dilation, at most the grid's sides {sides}, got "
                f"{spans} and {steps}"
            )
        return None

    def attend(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, rotary=None, grid_size=None, **options):
        import natten

        q_BHQD, k_BGKD = attention.place(q_BHQD, k_BGKD, mask, rotary)
        ((_, pattern),) = attention.patterns(q_BHQD.shape[1], mask, grid_size)
        prefix = pattern.num_prefix_tokens
        tensors = [x.transpose(1, 2) for x in (q_BHQD, k_BGKD, v_BGKV)]
        sides = pattern.grid.sides
        grids = (x[:, prefix:].unflatten(1, sides).contiguous() for x in tensors)
        seen_by_all = {}
        if prefix:
            seen_by_all["additional_keys"], seen_by_all["additional_values"] = (
                x[:, :prefix].contiguous() for x in tensors[1:]
            )
        sizes = {"kernel_size": pattern.kernel_size, "dilation": pattern.dilation, "is_causal": pattern.causal}
        kernel = natten.na2d if len(sides) == 2 else natten.na3d
        out_BHQV = kernel(*grids, **sizes, scale=scale, **seen_by_all).flatten(1, len(sides)).transpose(1, 2)
        if not prefix:
            return out_BHQV
        first = scaled_dot_product_attention(
            q_BHQD[:, :, :prefix], k_BGKD, v_BGKV, scale=scale, enable_gqa=q_BHQD.shape[1] != k_BGKD.shape[1]
        )
        return torch.cat([first, out_BHQV], dim=2)
