"""What Python reads first in processes that a program starts under ``attn-plugins run``: it brings the package along.

This folder stands in PYTHONPATH there, and is not a package.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:] = [place for place in sys.path if place != str(here)]

if (own := importlib.machinery.PathFinder.find_spec("sitecustomize")) is not None and own.loader is not None:
    own.loader.exec_module(importlib.util.module_from_spec(own))  # the environment's, which this one stands before


def bring() -> None:
    if importlib.util.find_spec("attn_plugins") is None:  # a checkout, found by the first process in its folder
        sys.path.append(str(here.parents[2]))
    importlib.import_module("attn_plugins")


if os.environ.get("ATTN_PLUGINS_RUN") == sys.prefix:  # another environment may have other packages, or none of them
    # Not as a part of attn_plugins: a process that never imports transformers is left without it.
    place = here.parents[1] / "config" / "after_import.py"
    spec = importlib.util.spec_from_file_location("attn_plugins_after_import", place)
    assert spec is not None
    assert spec.loader is not None
    after_import = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(after_import)
    after_import.once_imported("transformers", bring)
