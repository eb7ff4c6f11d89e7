"""Packages that only some commands need: imported where they are used, with one clear error where they are missing."""

import importlib
from typing import Any


def need(module: str, extra: str) -> Any:
    """Import ``module``.

    Raises:
        ValueError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ValueError(f"this needs the package {module!r}: pip install 'attn-plugins[{extra}]'") from None
