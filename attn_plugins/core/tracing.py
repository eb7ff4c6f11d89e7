"""Whether values of tensors may be looked at, and whether what is done to tensors is recorded for others.

What is left out because the values of one call allow it (a mask that hides nothing) would be left out of every call of
a graph that was recorded meanwhile. So whoever decides something by values asks here first.
"""

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def recorded(*tensors: torch.Tensor) -> bool:
    """Whether operations on these tensors go into a graph for other calls, which leaves nothing to Python.

    torch.export, torch.jit.trace (and torch.onnx.export, by either), make_fx, functorch's transforms. Not
    torch.compile: it guards what it takes for constant, and leaves to Python what it cannot record.
    """
    if torch.compiler.is_compiling():
        # Not is_exporting(): Dynamo up to torch 2.12 takes that for True in torch.compile too.
        return not torch.compiler.is_dynamo_compiling() or torch.compiler._is_exporting_flag
    if torch._C._is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    # Modes before dispatch are kept in Python: one key tells at a look whether there are any.
    if torch._C._dispatch_tls_is_dispatch_key_included(PRE_DISPATCH) and get_proxy_mode() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def exporting() -> bool:
    """Whether torch.export runs this Python, where a forward that fails calls no hooks: what these undo stays.

    Not where Dynamo traces: it drops what a failed forward has noted, and up to torch 2.12 takes
    ``torch.compiler.is_exporting()`` for True in torch.compile too.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def readable(*tensors: torch.Tensor) -> bool:
    """Whether the values of these tensors may decide what is computed: they have some, and stand for themselves."""
    if torch.compiler.is_compiling() or recorded(*tensors):
        return False
    if any(tensor.is_meta or isinstance(tensor, (FakeTensor, FunctionalTensor)) for tensor in tensors):
        return False
    return not (any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing())
