"""A function that is called as soon as anything has imported a package. Knows nothing but Python's import system."""

import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any


class AfterImport:
    """Finds one package as the other finders do, and calls a function when it has been imported."""

    def __init__(self, name: str, then: Callable[[], object]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for s in (finder.find_spec(name, path, target) for finder in others) if s is not None), None)
        if spec is not None and spec.loader is not None:
            execute: Any = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def once_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function when a package is there: now, or as soon as anything has imported it."""
    if name in sys.modules:
        then()
    elif not any(isinstance(finder, AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(name, then))
