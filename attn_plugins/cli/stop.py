"""How a run that was told to end says how it goes on."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import typer

from attn_plugins.config.extras import need


@contextlib.contextmanager
def stoppable(output_dir: str, *, again: tuple[str, ...] = ("--resume",), kept: str | None = None) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is run here with one line, and exit status 130 or 143.

    Args:
        output_dir: where its checkpoints are, unless the run that was stopped says another.
        again: what the command that goes on has beside what this one has.
        kept: what there is where no run has left a checkpoint.
    """
    from attn_plugins.training.resume import last_whole_checkpoint
    from attn_plugins.training.stop import SIGNALS, Stopped

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {one: signal.signal(one, stop) for one in SIGNALS}
    try:
        yield
    except Stopped as stopped:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)  # it ends already
        if os.environ.get("RANK", "0") == "0":
            how = "Ctrl-C" if stopped.number == signal.SIGINT else "SIGTERM"
            where = stopped.output_dir or output_dir
            checkpoint = last_whole_checkpoint(where)
            left = f"{checkpoint} is whole" if checkpoint else kept or f"there is no checkpoint in {where} yet"
            print(f"stopped by {how}; {left}. Go on with: {command_again(again)}", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def command_again(again: tuple[str, ...] = ("--resume",)) -> str:
    """The command line that goes on with this run, with what started it: `accelerate launch`, torchrun, nice."""
    arguments = sys.argv[1:]
    words = ["attn-plugins" if Path(sys.argv[0]).name == "attn-plugins" else "python -m attn_plugins", *arguments]
    words[:1] = words[0].split()
    for parent in need("psutil", "train").Process().parents():
        line = parent.cmdline()
        if not arguments or line[-len(arguments) :] != arguments:
            break
        # A script is started as: python, path of the script, arguments.
        words = [Path(line[1]).name, *line[2:]] if _is_python(line) else line
    words = [word for word in words if word != "--fresh"]  # which would begin anew
    return shlex.join([*words, *(word for word in again if word not in words)])


def _is_python(line: list[str]) -> bool:
    return Path(line[0]).name.startswith("python") and os.access(line[1], os.X_OK)
