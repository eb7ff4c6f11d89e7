"""Triton's interpreter, so that it runs the kernels of libraries on CPU tensors on a machine without a GPU.

It computes what a kernel says, one program after another: numbers, indices and masks are those of a GPU, while speed,
rounding of its matrix units, and programs that get in each other's way are not seen.
"""

import ast
import os


def prepare():
    """Make up for what Triton's interpreter (3.6) lacks, once a process, before any kernel is defined.

    - An autotuner would measure on a GPU: each takes the first of its configurations.
    - The index of a loop over ``range`` is an int there, a tensor where it is compiled: kernels call its methods.

    Raises:
        RuntimeError: kernels would not be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 has to be set before Triton is imported, as make test-kernels does")
    from triton.runtime import autotuner, interpreter

    if getattr(autotuner.Autotuner, "takes_the_first", False):
        return
    init = autotuner.Autotuner.__init__

    def first_only(self, fn, arg_names, configs, *args, **options):
        init(self, fn, arg_names, configs[:1], *args, **options)

    autotuner.Autotuner.__init__, autotuner.Autotuner.takes_the_first = first_only, True
    interpreter.ASTTransformer.visit_For = _visit_for


def _visit_for(self, node):
    self.generic_visit(node)
    called = node.iter.func if isinstance(node.iter, ast.Call) else None
    name = getattr(called, "id", None) or getattr(called, "attr", None)
    if isinstance(node.target, ast.Name) and name == "range":
        index = node.target.id
        node.body[:0] = ast.parse(f"{index} = interpreter_semantic.to_tensor({index}, False)").body
    return node
