import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _compile_from_scratch():
    """What one test compiled, and for which shapes, is nothing to the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
