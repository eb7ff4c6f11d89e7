"""Python programs that tests start: forked from a process that has imported torch and transformers, and nothing more.

A new interpreter takes seconds to import these two, a fork takes milliseconds. What a program sees is otherwise what it
sees in a new one: ``attn_plugins`` is imported by the program or not at all, from the PYTHONPATH of its environment.
Where there is no safe fork, and for programs about the start of an interpreter, it is a new one.

    done = programs.run("-c", "import attn_plugins; ...", "argument")
    done = programs.run("-m", "attn_plugins", "list", env={"PYTHONPATH": folder})
"""

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

IMPORTED = ("transformers.modeling_utils", "transformers.generation", "transformers.integrations", "torch._dynamo")


@dataclass
class Program:
    """A program that runs, and where its output goes."""

    command: tuple[str, ...]
    folder: tempfile.TemporaryDirectory
    process: subprocess.Popen | None
    pid: int

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit status (-9 if signal 9 has killed it) and what it has said, once it has ended."""
        status = _ask(wait=self.pid) if self.process is None else self.process.wait()
        said = [Path(self.folder.name, name).read_text() for name in ("stdout", "stderr")]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.command, status, *said)


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """What :func:`start` starts, when it has ended."""
    return start(*command, **options).wait()


def start(*command: object, env: dict[str, str] | None = None, cwd: object = None, stdin: str = "") -> Program:
    """Python with ``-c`` and code, ``-m`` and a module or the path of a script, and arguments.

    ``env`` is changed beside what the tests have themselves, and ``stdin`` is the text that the program reads.
    """
    words, folder = tuple(map(str, command)), tempfile.TemporaryDirectory()
    places = {name: str(Path(folder.name, name)) for name in ("stdin", "stdout", "stderr")}
    Path(places["stdin"]).write_text(stdin)
    how = {"env": {**os.environ, **(env or {})}, "cwd": str(cwd or Path.cwd())}
    if sys.platform == "linux":
        return Program(words, folder, None, _ask(command=words, **places, **how))
    with open(places["stdin"]) as read, open(places["stdout"], "w") as out, open(places["stderr"], "w") as err:
        process = subprocess.Popen([sys.executable, *words], stdin=read, stdout=out, stderr=err, **how)
    return Program(words, folder, process, process.pid)


_SERVER: list[subprocess.Popen] = []


def _ask(**request) -> int:
    if not _SERVER:
        told = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _SERVER.append(subprocess.Popen([sys.executable, __file__], env=told, **pipes))
        atexit.register(_SERVER[0].communicate)
    _SERVER[0].stdin.write(json.dumps(request) + "\n")
    _SERVER[0].stdin.flush()
    return int(_SERVER[0].stdout.readline())


def _serve() -> None:
    """Starts and awaits programs, one request a line, until there are no more."""
    for name in IMPORTED:
        importlib.import_module(name)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            number = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            number = os.fork()
            if number == 0:
                replies.close()
                os._exit(_become(request))
        print(number, file=replies, flush=True)


def _become(request: dict) -> int:
    """In the fork: the program and its exit status."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(request[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin = os.fdopen(0, closefd=False)  # what the server has read ahead of its own is none of the program's
    inherited = {str(Path(__file__).parent), *_folders(os.environ)}
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    how, *arguments = request["command"]
    beside = {"-c": "", "-m": request["cwd"]}.get(how, str(Path(how).parent))
    sys.path[:] = [beside, *_folders(os.environ), *(place for place in sys.path if place not in inherited)]
    importlib.invalidate_caches()
    try:
        status = _run(how, arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def _folders(environment: Mapping[str, str]) -> list[str]:
    return [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]


def _run(how: str, arguments: list[str]) -> None:
    if how == "-c":
        code, *rest = arguments
        sys.argv = ["-c", *rest]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(module))
    elif how == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *arguments]
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    _serve()
