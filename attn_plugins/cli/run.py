"""The verb that runs another program: run."""

import sys
from typing import Annotated

import typer

from attn_plugins.cli.app import app


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, no_args_is_help=True)
def run(
    program: Annotated[list[str], typer.Argument(help="-m MODULE, a script, or an installed command; its arguments.")],
) -> None:
    """Run another program with the flag known to it, and to the processes that it starts: run -m lm_eval ...

    All that follows belongs to the program, and so does the exit status.
    """
    run_program(program)


def run_program(program: list[str]) -> None:
    from attn_plugins.launcher.run import prepare_program

    try:
        start = prepare_program(program)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    start()
