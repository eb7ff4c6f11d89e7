"""The verb that serves a model to clients of OpenAI's interface: serve."""

import inspect
import signal
import sys
from typing import Annotated, Any

import typer

from attn_plugins.cli.app import Attn, app, attention_flag, one_line_errors

Held = Annotated[
    int,
    typer.Option(
        "--held-mib", help="Memory for the caches of conversations that may go on, in MiB, on the model's device."
    ),
]
Served = Annotated[str, typer.Argument(help="A folder, a name on the hub, or smollm2-135m-demo.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False)
def serve(
    arguments: Annotated[list[str] | None, typer.Argument(help="MODEL, and options, as --help lists them.")] = None,
) -> None:
    """Serve a model to OpenAI clients, by transformers' own server: serve MODEL --attn local --port 8000.

    Its options are that server's, and two more: --attn and --held-mib.
    """
    with one_line_errors():
        served = command()
    served(args=arguments or ["--help"], prog_name="attn-plugins serve")


def command() -> Any:
    """The command with all of its options: ours, and those of the transformers that is installed.

    Raises:
        ValueError: that has no server.
    """
    try:
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise ValueError(f"the transformers that is installed has no server of this kind: {error}") from None

    def serve(model: str, attn: str | None, held_mib: int, **options: Any) -> None:
        """Serve a model to OpenAI clients, by transformers' own server with this package imported.

        /v1/chat/completions, /v1/responses and /v1/completions, streaming and not: docs/serving.md.
        """
        _serve(model, attn, held_mib, options)

    theirs = inspect.signature(Serve.__init__, eval_str=True).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    ours = [
        inspect.Parameter("model", kind, annotation=Served),
        inspect.Parameter("attn", kind, default=None, annotation=Attn),
        inspect.Parameter("held_mib", kind, default=1024, annotation=Held),
    ]
    ours += [one.replace(kind=kind) for name, one in theirs.items() if name not in NOT_ASKED]
    serve.__signature__ = inspect.Signature(ours)  # type: ignore[attr-defined]
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    made.command(no_args_is_help=True)(serve)
    return typer.main.get_command(made)


NOT_ASKED = ("self", "force_model", "model_timeout", "non_blocking")
"""Parameters of transformers' server that are no options here: the model is an argument, and always the one served."""


def _serve(model: str, attn: str | None, held_mib: int, options: dict[str, Any]) -> None:
    with one_line_errors():
        if held_mib < 0:
            raise ValueError(f"--held-mib {held_mib}; allowed: 0, which holds none, and more")
        from attn_plugins.serving.server import Server
        from attn_plugins.training.models import AS_SAVED

        attention = AS_SAVED if attn is None else attention_flag(attn)
        server = Server(model, attention=attention, room=held_mib * 2**20, **options)
    for line in server.describe():
        print(line, flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        # As SIGTERM ends it: by the signal. At a second Ctrl-C a thread may still be in the middle of an answer.
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
