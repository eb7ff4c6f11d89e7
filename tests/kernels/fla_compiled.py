"""Compiles the kernels that a call would launch on a GPU that is not there, and says what shared memory they take.

    python tests/kernels/fla_compiled.py ARCHITECTURE compile|count ATTENTION ...

Runs the backend fla on CPU tensors, forward and backward, with a driver that answers as such a GPU would; each kernel
is noted instead of launched. ``compile`` compiles it, in the first of its configurations that fits; ``count`` says how
many a layer needs beside operations of PyTorch. Prints JSON.
"""

import contextlib
import importlib
import itertools
import json
import os
import sys
import warnings
from unittest import mock

import torch
from flex_in_triton import GPUS

HEADS, HEAD_DIM, LENGTH = 16, 64, 4096


def pretend(architecture):
    """Answer for a GPU of this compute capability, before a library asks."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    there = mock.MagicMock()
    there.get_current_target.return_value = GPUTarget("cuda", architecture, 32)
    there.utils.get_device_properties.return_value = {"max_shared_mem": GPUS[architecture]}
    driver.set_active(there)
    answers = {
        "get_device_name": {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200"}[architecture],
        "get_device_capability": (architecture // 10, architecture % 10),
        "device_count": 1,
        "current_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)


class Launches:
    """The kernels that are launched in its context, which do not run: their functions, arguments and configurations."""

    def __init__(self):
        self.seen, self.number = {}, 0

    def __enter__(self):
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        seen, choices = self.seen, [{}]

        def choose(tuner, *args, **options):
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            choices[:] = [one.all_kwargs() for one in tuner.prune_configs(options)]
            tuner.fn.run(*args, **options, **choices[0])
            choices[:] = [{}]

        def note(fn, *args, grid, warmup, **options):
            self.number += 1
            bound = {**dict(zip(fn.arg_names, args, strict=False)), **options}
            key = (fn.fn.__name__, tuple(_kind(bound.get(one.name), one) for one in fn.params))
            seen.setdefault(key, (fn, bound, list(choices)))

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(Autotuner, "run", choose))
        self.patches.enter_context(mock.patch.object(JITFunction, "run", note))
        return self

    def __exit__(self, *error):
        self.patches.close()


def _kind(value, parameter):
    """("constant", value), or (type, whether it is a multiple of 16), as the launcher specialises arguments."""
    if parameter.is_constexpr or value is None:
        return "constant", value
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        names |= {torch.int64: "i64", torch.int32: "i32"}
        return "*" + names[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constant", 1
    return "i32", value % 16 == 0 and not parameter.do_not_specialize


def compiled(fn, bound, choices, architecture):
    """(binary, configuration, number of configurations before it) of the first that fits into shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for number, choice in enumerate(choices):
        given = {**bound, **choice}
        kinds = {one.name: _kind(given.get(one.name), one) for one in fn.params}
        constants = {name: value for name, (kind, value) in kinds.items() if kind == "constant"}
        signature = {name: "constexpr" if kind == "constant" else kind for name, (kind, _) in kinds.items()}
        divisible = {
            (at,): [["tt.divisibility", 16]]
            for at, (kind, multiple) in enumerate(kinds.values())
            if kind != "constant" and multiple
        }
        options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
        source = ASTSource(fn, signature=signature, constexprs=constants, attrs=divisible)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        if binary.metadata.shared <= GPUS[architecture]:
            return binary, choice, number
    raise ValueError(f"{fn.fn.__name__}: none of its {len(choices)} configurations fits into shared memory")


def layer(name, heads, length, packed):
    """A function that runs forward and backward of one attention in bfloat16, with one mask."""
    from attn_plugins.backends.fla import Fla
    from attn_plugins.core.attention import HeadShape
    from attn_plugins.core.mask import AttentionMask
    from attn_plugins.core.rules import parse_rules

    Fla.devices = ("cpu",)
    # On Hopper GPUs the library refuses gates below this version, whose code for one kernel is wrong there.
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True
    (rule,) = parse_rules(name)
    shape = HeadShape(num_heads=heads, num_key_value_heads=heads, head_dim=HEAD_DIM, value_dim=HEAD_DIM)
    module = rule.attention(rule.config, shape, backend="fla").to(torch.bfloat16)
    segments = (torch.arange(length) // 1000).unsqueeze(0) if packed else None
    mask = AttentionMask(1, length, length, causal=True, segments_BK=segments)
    given = [torch.zeros(1, length, heads, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]

    def run():
        leaves = [x.detach().requires_grad_() for x in given]
        out, _ = module(*leaves, mask=mask, scale=HEAD_DIM**-0.5)
        torch.autograd.grad(out, [*leaves, *module.parameters()], torch.zeros_like(out))

    return run


def launched(attentions):
    """What these attentions launch, for whole rows and packed ones: (names, function, arguments, configurations)."""
    found, names = {}, {}
    for name in attentions:
        with Launches() as launches:
            for packed in (False, True):
                layer(name, HEADS, LENGTH, packed)()
        found |= launches.seen
        for key in launches.seen:
            names.setdefault(key, []).append(name)
    return [(names[key], *launch) for key, launch in found.items()]


def counts(attentions):
    """A row for each attention, length and kind of rows: what a further layer with the same mask asks of a device."""
    from attn_plugins.benchmark.cost.operations import counted
    from attn_plugins.benchmark.cost.timing import Workload, peak_bytes

    rows = []
    for name, packed, length in itertools.product(attentions, (False, True), (4096, 16384)):
        run = layer(name, 8, length, packed)
        with Launches():
            run()
        with Launches() as launches, counted() as operations:
            run()
        with Launches():
            peak = peak_bytes([Workload(run=run, count=1)], torch.device("cpu"))
        rows.append(
            {
                "attention": name,
                "packed": packed,
                "length": length,
                "operations": len(operations.launches),
                "kernels": launches.number,
                "syncs": sum(operations.syncs.values()),
                "peak": peak / (4 * 8 * length * HEAD_DIM * 2),
            }
        )
    return rows


def table(architecture, attentions):
    """A row for each kernel and kind of arguments."""
    rows = []
    for names, fn, bound, choices in launched(attentions):
        binary, choice, skipped = compiled(fn, bound, choices, architecture)
        rows.append(
            {
                "kernel": fn.fn.__name__,
                "attentions": names,
                "packed": bound.get("cu_seqlens") is not None,
                "shared": binary.metadata.shared,
                "cubin": len(binary.asm["cubin"]),
                "configuration": {key: value for key, value in choice.items() if value is not None},
                "skipped": skipped,
                "of": len(choices),
            }
        )
    return rows


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.filterwarnings("ignore")
    architecture, what, *attentions = sys.argv[1:]
    pretend(int(architecture))
    print(json.dumps(table(int(architecture), attentions) if what == "compile" else counts(attentions)))
