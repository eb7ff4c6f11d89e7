"""Fixtures for tests of the compiled kernels."""

import os

import pytest

from attn_plugins.backends import cpp, cpp_build


@pytest.fixture(scope="module")
def built():
    library = cpp_build.built()
    if os.environ["ATTN_PLUGINS_CPP"] == "0":
        pytest.skip("compiled kernels are left alone: make test-cpp")
    assert library is not None, "the kernels are not built"
    cpp.load(str(library))
    return cpp.instruction_sets()


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request, built):
    if request.param not in built:
        pytest.skip(f"this machine has no {request.param}")
    cpp.use_instruction_set(request.param)
    yield request.param
    cpp.use_instruction_set(built[0])
