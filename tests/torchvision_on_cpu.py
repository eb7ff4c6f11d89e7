"""torchvision beside a torch for CPUs.

Package indexes have the build for CUDA, whose operators do not load there, and its import then fails where it describes
two of them. Nothing that is tested calls these: the import of this file declares them, without a body.
"""

import importlib.util
import sys

import torch

OPERATORS = ("nms", "qnms")


def make_importable() -> torch.library.Library | None:
    """Declare the operators that the import of torchvision asks for, where it is installed and does not bring them.

    Returns:
        what they are declared in, and last as long as.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


LIBRARY = make_importable()
