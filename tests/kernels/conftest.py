"""For tests of kernels on a machine without a GPU: all in this folder are marked ``kernels``."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interpreted():
    import interpreter

    interpreter.prepare()
