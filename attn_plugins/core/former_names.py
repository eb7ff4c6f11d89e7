"""Modules under the names that they had before, for third parties' files. To be deleted with the release after next."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

FORMER = {
    "attn_plugins.attention": "attn_plugins.core.attention",
    "attn_plugins.mask": "attn_plugins.core.mask",
    "attn_plugins.ops.dense": "attn_plugins.ops.reference",
}


class FormerNames:
    """Finder and loader of modules that were renamed: what they hold is in the new ones."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, cls) if name in FORMER else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        new = FORMER[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}; the old name goes with the next release", DeprecationWarning, 2)
        held = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in held.items() if not name.startswith("__")})


def install() -> None:
    if FormerNames not in sys.meta_path:
        sys.meta_path.append(FormerNames)
