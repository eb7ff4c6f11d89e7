"""FlexAttention's Triton templates on a machine without a GPU: inductor writes them for CPU tensors, as for CUDA.

What inductor writes is run by Triton's interpreter, or only kept, to be compiled for GPUs that need not be there.
"""

import contextlib
import functools
import inspect
import pathlib
import re
import tempfile
import textwrap
import types
from unittest import mock

import torch

GPUS = {80: 166912, 90: 232448, 100: 232448}
"""Compute capabilities, and the bytes of shared memory that a block of threads has there."""


@contextlib.contextmanager
def inductor_for(capability, *, run, blocks=None):
    """Inductor takes its path for CUDA, and yields the list of (name, source, metadata) that it writes meanwhile.

    Args:
        capability: of the GPU that it takes for there, as in ``GPUS``.
        run: whether kernels are interpreted; else nothing is computed.
        blocks: queries and keys that the backward takes at a time, where not what inductor chooses.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.kernel.flex.flex_attention as lowering
    import torch.nn.attention.flex_attention as flex
    import torch.utils._triton as triton_of_torch
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen import triton as codegen
    from torch._inductor.lowering import lowerings
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic, FlexBwDConfig
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver as triton_driver

    driver = mock.MagicMock()
    driver.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    properties = types.SimpleNamespace(
        name="", major=capability // 10, minor=0, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=GPUS[capability], shared_memory_per_block=49152, total_memory=80 << 30,
        max_threads_per_multi_processor=2048, gcnArchName="", L2_cache_size=50 << 20,
    )  # fmt: skip
    written = []

    def written_for(self, name, source, device_str="cpu"):
        kernel = InterpretedKernel(name, source, run)
        written.append((name, source, kernel.metadata))
        return kernel

    with contextlib.ExitStack() as stack:

        def replaced(where, name, value):
            stack.enter_context(mock.patch.object(where, name, value))

        stack.enter_context(inductor_config.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(mock.patch.dict(lowerings))
        for where, name in ((lowering, "flex_attention"), (flex, "_apply_kernel_options")):
            replaced(where, name, getattr(where, name))
            _define_without_cpu_branches(where, name)
        for name in ("get_flex_attention_fwd_configs", "get_flex_attention_bwd_configs"):
            replaced(InductorChoices, name, _for_cuda(getattr(InductorChoices, name)))
        replaced(flex, "_validate_device", lambda *tensors: None)
        replaced(torch.cuda, "get_device_capability", lambda *device: (capability // 10, capability % 10))
        replaced(torch.cuda, "get_device_properties", lambda *device: properties)
        for where in (triton_of_torch, codegen):
            for name in ("triton_hash_with_backend", "triton_backend_hash"):
                if hasattr(where, name):
                    replaced(where, name, lambda: "none")
        replaced(triton_driver, "_active", driver)
        replaced(AsyncCompile, "triton", written_for)
        if blocks is not None:
            own = [FlexBwDConfig(blocks, blocks, blocks, blocks, 1, 4)]
            replaced(CUDAConfigHeuristic, "get_flex_attn_bwd_configs", lambda *sizes: own)
        torch._dynamo.reset()
        yield written
        torch._dynamo.reset()


def _define_without_cpu_branches(module, name):
    """Define a function of a module anew, where what asks whether a tensor is on a CPU gets no for an answer."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    changed = re.sub(r"\w+\.(get_device\(\)|device)\.type == \"cpu\"", "False", source)
    assert changed != source
    exec(compile(changed, module.__file__, "exec"), module.__dict__)


def _for_cuda(configs):
    return functools.wraps(configs)(lambda self, head_dim, dtype, device: configs(self, head_dim, dtype, "cuda"))


class InterpretedKernel:
    """What inductor gets for a kernel's source."""

    def __init__(self, name, source, run):
        self.metadata = {}
        self.function = defined(name, source, self.metadata, interpreted=True) if run else None

    def run(self, *values, stream=None, **options):
        if self.function is None:
            return
        names = self.function.arg_names
        if len(values) == len(names) + 3:  # a template: the grid comes last
            self.function[tuple(int(size) for size in values[-3:])](*values[:-3])
            return
        grid, sizes = [], {"R0_BLOCK": 64} if "R0_BLOCK" in names else {}
        for axis in "xyz":
            if f"{axis.upper()}BLOCK" in names:
                number = max(1, int(values[names.index(f"{axis}numel")]))
                size = 16 if sizes else min(1024, 1 << (number - 1).bit_length())
                grid.append(-(-number // size))
                sizes[f"{axis.upper()}BLOCK"] = size
        self.function[(*grid, 1, 1)[:3]](*values, **sizes)


def defined(name, source, metadata, interpreted):
    """The function of a kernel's source, as ``triton.jit`` makes it; ``metadata`` gets what inductor says of it."""
    import torch._inductor.runtime.triton_heuristics as heuristics

    def noted(*args, **options):
        metadata.update(options)
        return lambda function: function

    kinds = ("template", "pointwise", "reduction", "persistent_reduction", "foreach", "user_autotune", "split_scan")
    if interpreted:  # which has no libdevice
        own = "@triton.jit\ndef _tanh(x):\n    return 2 * tl.sigmoid(2 * x) - 1\n\n@triton_heuristics"
        source = source.replace("libdevice.tanh(", "_tanh(").replace("@triton_heuristics", own, 1)
        source = re.sub(r"libdevice\.(exp2|log2|exp|log|sqrt)\(", r"tl.\1(", source)
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # triton.jit reads the source there
        file.write(source)
    space = {"__name__": name, "__file__": file.name}
    with contextlib.ExitStack() as stack:
        stack.callback(pathlib.Path(file.name).unlink)
        for kind in kinds:
            if hasattr(heuristics, kind):
                stack.enter_context(mock.patch.object(heuristics, kind, noted))
        exec(compile(source, file.name, "exec"), space)
    return next(value for key, value in space.items() if key.startswith("triton_") and hasattr(value, "arg_names"))
