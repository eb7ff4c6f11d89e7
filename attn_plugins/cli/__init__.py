"""The command line: attn-plugins VERB, or python -m attn_plugins VERB, or accelerate launch -m attn_plugins VERB.

A file a kind of verb; ``--help`` lists them in the order in which they are imported here.
"""

import sys
import warnings

from attn_plugins.cli import run, look, choose, transfer, train, search, recipe, export, serve, measure  # isort: skip
from attn_plugins.cli import results, report  # isort: skip
from attn_plugins.cli import inspect  # isort: skip
from attn_plugins.cli.app import app

# Nothing here brings torch or transformers: `list` and --help must be quick. Each verb imports what it needs.

__all__ = [
    "app",
    "choose",
    "export",
    "inspect",
    "look",
    "main",
    "measure",
    "recipe",
    "report",
    "results",
    "run",
    "search",
    "serve",
    "train",
    "transfer",
]


def main() -> None:
    """Run the command line. What a user got wrong ends as one line and exit status 2."""
    if sys.argv[1:2] == ["run"] and sys.argv[2:] not in ([], ["--help"]):
        run.run_program(sys.argv[2:])  # not by way of click, which would take what the program raises for its own
        return
    # Until transformers drops the old name, peft asks for it on every load; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    app()
