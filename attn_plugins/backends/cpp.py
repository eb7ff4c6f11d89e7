"""Kernels in C++ for CPUs, of this package's own: built where a compiler is, by ``attn-plugins build``."""

import functools
import os
from typing import Any

import torch

from attn_plugins.backends import cpp_build
from attn_plugins.backends.cpp_tiles import MULTIPLE
from attn_plugins.core.backend import Backend, register_backend
from attn_plugins.ops.blocks.gather import SoftmaxForms
from attn_plugins.ops.linear.attention import FeatureAttention
from attn_plugins.ops.linear.window import Forms
from attn_plugins.ops.linear.window_attention import WindowAndSumsAttention
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.softmax.attention import PatternAttention, by_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load(library: str) -> None:
    """Load a library that was built, once a process, and say what its operators' shapes and gradients are."""
    from attn_plugins.backends import cpp_blocks, cpp_linear, cpp_step, cpp_tiles

    torch.ops.load_library(library)
    cpp_tiles.register()
    cpp_linear.register()
    cpp_blocks.register()
    cpp_step.register()
    asked = os.environ.get(cpp_build.SWITCH)
    if asked and asked != "1":
        use_instruction_set(asked)


def instruction_sets() -> list[str]:
    """Those that this machine has compiled kernels for, the one in use first. The library has to be loaded."""
    return torch.ops.attn_plugins_cpp.instruction_sets().split(",")


def use_instruction_set(name: str) -> None:
    """Use another of :func:`instruction_sets`, in all threads.

    Raises:
        ValueError: there are no kernels of that name for this machine.
    """
    if name not in instruction_sets():
        raise ValueError(f"instruction set {name!r} ({cpp_build.SWITCH}); allowed: {', '.join(instruction_sets())}")
    torch.ops.attn_plugins_cpp.use_instruction_set(name)


@register_backend("cpp")
class Cpp(Backend):
    """Softmax attention over a pattern, or over blocks that queries choose, and linear attention.

    Softmax: one operator goes through all tiles of a pattern. Scores stay in registers and cache, keys that are slices
    are read where they are, and of a block of 64 queries and 64 keys only what is visible is computed. Blocks that
    queries choose: tiles of queries that share one, head by head; what else such an attention has, as the choice and
    native sparse attention's compressed branch, is plain PyTorch. Linear attention, over features of a token: chunks of
    64 tokens and a state between them, a text of a packed row at a time; or one state for all of a text. What is
    softmax over a window and sums over all else has both of them from here, and joins them in plain PyTorch.

    AVX-512, AVX2 or vectors of 128 bits, as the machine has them. Sums are float32; half precision is converted on the
    way in and out. Long rows are shared among threads where there are fewer heads than these.
    """

    what = "kernels in C++ for CPUs: softmax over patterns and over blocks that queries choose, linear attention"
    devices = ("cpu",)
    own = True

    def build(self, into=None, flags=""):
        """Compile the kernels unless they are there: arguments of :func:`attn_plugins.backends.cpp_build.build`."""
        lines = [str(cpp_build.build(into, flags))]
        if into is not None:
            return lines
        if cpp_build.built() is None:
            return [*lines, f"left alone: {cpp_build.SWITCH}=0"]
        if "sanitize" not in flags:  # whose library has to come before all others
            load(str(cpp_build.built()))
            lines.append(f"auto takes it on CPUs; instruction sets: {', '.join(instruction_sets())}")
        return lines

    def product(self):
        """Of matrices of 64, which are all in the cache."""
        if self.missing() is not None:
            return None
        load(str(cpp_build.built()))
        a, times = torch.randn(64, 64), 256
        return functools.partial(torch.ops.attn_plugins_cpp.tile_product, a, a, times), times * 2 * 64**3

    def serves(self, kind):
        """Whether it is one of these as they are: what attends in a way of its own knows more than its tiles say."""
        known = (PatternAttention.attend, FeatureAttention.attend, WindowAndSumsAttention.attend)
        return kind.attend in known or _chooses_blocks(kind)

    def missing(self):
        if cpp_build.built() is None:
            return f"its kernels are not built for this torch: {cpp_build.COMMAND}"
        return None

    def refuses(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout=0.0, **options):
        dtypes = {x.dtype for x in (q_BHQD, k_BGKD, v_BGKV)}
        if not dtypes <= set(DTYPES):
            allowed, got = (", ".join(sorted(map(str, found))) for found in (DTYPES, dtypes))
            return f"queries, keys and values must be of {allowed}, got {got}"
        if not isinstance(scale, (int, float)):
            return "the scale must be a number"
        if not self.serves(type(attention)):
            return (
                "it serves softmax attention over a pattern or over blocks that queries choose, linear attention, and "
                "a window with sums over all else"
            )
        if isinstance(attention, FeatureAttention | WindowAndSumsAttention):
            from attn_plugins.backends.cpp_linear import why_not

            return why_not(attention.phi, q_BHQD.shape[3], mask)
        return None

    def attend(self, attention, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, rotary=None, grid_size=None, **options):
        from attn_plugins.backends.cpp_blocks import compiled_blocks
        from attn_plugins.backends.cpp_linear import compiled_linear, compiled_sums
        from attn_plugins.backends.cpp_tiles import compiled_attention

        load(str(cpp_build.built()))
        if isinstance(attention, FeatureAttention):
            return compiled_linear(attention.prepare(q_BHQD, k_BGKD, mask, scale), v_BGKV, mask)
        if isinstance(attention, WindowAndSumsAttention):
            both = Forms(compiled_attention, compiled_sums, few_queries=True)
            return attention.attend(q_BHQD, k_BGKD, v_BGKV, mask=mask, scale=scale, forms=both, **options)
        if _chooses_blocks(type(attention)):
            forms = SoftmaxForms(compiled_blocks, compiled_attention)
            return attention.attend(q_BHQD, k_BGKD, v_BGKV, mask=mask, scale=scale, forms=forms, **options)
        q_BHQD, k_BGKD = attention.place(q_BHQD, k_BGKD, mask, rotary)
        parts = attention.patterns(q_BHQD.shape[1], mask, grid_size)
        return by_heads(compiled_attention, q_BHQD, k_BGKD, v_BGKV, mask, parts, scale=scale, **options)

    def steps(self, cls):
        """Whether it goes on from its state as linear attention does, beside a window or not, or as recurrences."""
        known = (FeatureAttention.attend_from, WindowAndSumsAttention.attend_from, RecurrentAttention.attend_from)
        return cls.attend_from in known

    def attend_from(self, attention, q_BH1D, k_BG1D, v_BG1V, *, state, **options):
        from attn_plugins.backends import cpp_step

        tensors = (q_BH1D, k_BG1D, v_BG1V, *state.tensors.values())
        if any(x.dtype not in DTYPES for x in tensors) or with_gradients(attention, *tensors, *options.values()):
            return None
        step: Any = cpp_step.recurrent_step
        if isinstance(attention, FeatureAttention):
            step = cpp_step.linear_step if cpp_step.serves(attention.phi, q_BH1D.shape[3]) else None
        elif isinstance(attention, WindowAndSumsAttention):
            served = v_BG1V.shape[3] % MULTIPLE == 0 and cpp_step.serves(attention.phi, q_BH1D.shape[3])
            step = cpp_step.window_step if served else None
        if step is None:
            return None
        load(str(cpp_build.built()))
        return attention.attend_from(q_BH1D, k_BG1D, v_BG1V, state=state, step=step, **options)


def with_gradients(attention: Any, *given: Any) -> bool:
    """Whether gradients are wanted, of what is given or of the attention's own weights."""
    if not torch.is_grad_enabled():
        return False
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    return any(x.requires_grad for x in (*tensors, *attention.parameters()))


def _chooses_blocks(kind: type) -> bool:
    """Whether it is :class:`attn_plugins.ops.blocks.gather.ChoosesBlocks`; modules are slow to say what they lack."""
    return hasattr(kind, "chooses_blocks")
