"""Other programs, with the flag known to them: this process has imported the package, and those that it starts will.

These read children/sitecustomize.py, as Python reads a file of that name in PYTHONPATH when it starts.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

CHILDREN = Path(__file__).parent / "children"
"""Folder of the sitecustomize.py."""


def prepare_program(arguments: list[str]) -> Callable[[], None]:
    """What runs a program as Python would, as ``__main__``; what it raises and its exit status are its own.

    Args:
        arguments: ``["-m", module, ...]``, or a script or the name of a command, and the program's own arguments.

    Raises:
        ValueError: there is no such program.
    """
    as_module = arguments[:1] == ["-m"]
    name, *others = arguments[as_module:] or [""]
    script = Path(name)
    if as_module:
        place, start = os.getcwd(), lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif script.is_file() or (script / "__main__.py").is_file():
        place, start = str(script.resolve().parent), lambda: runpy.run_path(name, run_name="__main__")
    elif commands := entry_points(group="console_scripts", name=name):
        place, start = sys.path[0], lambda: sys.exit(next(iter(commands)).load()())
    elif command := shutil.which(name):
        place, start = sys.path[0], lambda: sys.exit(subprocess.call([command, *others]))
    else:
        raise ValueError(f"no such program: {name!r}; allowed: -m MODULE, a script, or the name of a command")

    def run() -> None:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(CHILDREN) if not before else f"{CHILDREN}{os.pathsep}{before}"
        os.environ["ATTN_PLUGINS_RUN"] = sys.prefix
        sys.argv = [name, *others]
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = place
        start()

    if as_module and not (name and _is_module(name, place)):
        raise ValueError(f"no such module: {name!r}")
    return run


def _is_module(name: str, place: str) -> bool:
    before = list(sys.path)
    sys.path.insert(0, place)
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package
        return False
    finally:
        sys.path[:] = before
