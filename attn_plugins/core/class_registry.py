"""A registry: name -> class, for what lies one a file in a folder and third parties may add to."""

import importlib
import pkgutil
import threading
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, Generic, TypeVar

from attn_plugins.core.options import did_you_mean, shown

C = TypeVar("C", bound=type)
Registered = TypeVar("Registered")


class Registry(Generic[Registered]):
    """Classes of one kind by name: those of a folder, one a file, imported when first asked for, and third parties'.

    Args:
        kind: what messages call them.
        package: dotted name of the folder.
        lacks: (class) -> what it has to have and does not.
        entry_points: group through which installed packages bring theirs, if they may.
        dashes: whether names may have dashes, beside what identifiers have.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        lacks: Callable[[Any], list[str]],
        entry_points: str | None = None,
        *,
        dashes: bool = False,
    ) -> None:
        self.kind, self.package, self.lacks, self.entry_points = kind, package, lacks, entry_points
        self.dashes = dashes
        self.classes: dict[str, type[Registered]] = {}
        self._loading, self._loaded = threading.RLock(), False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that puts a class under ``name``; ValueError where the name is taken or the class lacks."""

        def register(cls: C) -> C:
            taken = self.classes.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}"
                )
            if not isinstance(name, str) or not (name.replace("-", "_") if self.dashes else name).isidentifier():
                raise ValueError(f"{self.kind} name {name!r} is not an identifier such as 'local' or 'my_{self.kind}'")
            lacking = self.lacks(cls)
            if lacking:
                raise ValueError(f"{self.kind} {name!r} ({cls.__qualname__}) lacks: {', '.join(lacking)}")
            cls.name = name  # type: ignore[attr-defined]
            self.classes[name] = cls
            return cls

        return register

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self.classes)

    def get(self, name: str) -> type[Registered]:
        """The class under ``name``; ValueError with the known names and the nearest one where there is none."""
        known = self.names()
        if not isinstance(name, str) or name not in self.classes:
            raise ValueError(f"unknown {self.kind} {shown(name)}{did_you_mean(name, known)}; known: {', '.join(known)}")
        return self.classes[name]

    def _load(self) -> None:
        if self._loaded:
            return
        with self._loading:
            if self._loaded:
                return
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for entry in metadata.entry_points(group=self.entry_points) if self.entry_points else ():
                try:
                    entry.load()
                except Exception as error:  # one broken plug-in must not take others down; it is named, with its reason
                    warnings.warn(
                        f"plug-in {entry.name!r} ({entry.value}) could not be loaded: {error!r}", stacklevel=4
                    )
            self._loaded = True
