"""Naive forms of flash-linear-attention, for tests that compare with them."""

import importlib.util
from pathlib import Path

import pytest


def flash_linear_attention(part):
    """A naive form of flash-linear-attention, from its file alone: the package needs triton to be imported."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed: pip install --no-deps fla-core")
    pytest.importorskip("einops", reason="flash-linear-attention's naive forms need einops")
    path = Path(next(iter(spec.submodule_search_locations))) / "ops" / part / "naive.py"
    if not path.is_file():
        pytest.skip(f"flash-linear-attention is installed without {path}")
    loaded = importlib.util.spec_from_file_location(f"fla_naive_{part}", path)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module
