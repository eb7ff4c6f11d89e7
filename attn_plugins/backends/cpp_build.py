"""Where the compiled kernels of ``attn_plugins/csrc`` are, and how they are made: by a C++ compiler, when asked."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from attn_plugins.core.checked import cache_folder

SOURCES = Path(__file__).parent.parent / "csrc"
NAME = "attn_plugins_cpp.so"
COMPILERS = ("g++", "clang++", "c++")
COMMAND = "attn-plugins build"
INSTRUCTION_SETS = {
    "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
    "generic": "",
}
"""Flags by name. What has vectors of 128 bits, as NEON, is generic."""
KERNEL_FLAGS = "-std=c++17 -O3 -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -Wfatal-errors"
OPERATOR_FLAGS = "-std=c++20 -O2 -fPIC -fopenmp"


def instruction_sets() -> list[str]:
    """Those that kernels are compiled for on this kind of machine."""
    return list(INSTRUCTION_SETS) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


@functools.cache
def key() -> str:
    """What a compiled library is good for: these sources, this torch, this kind of machine."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.system()} {platform.machine()}".encode())
    for source in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def places() -> list[Path]:
    """Where a library of this :func:`key` is looked for: beside the sources, as in a wheel, then in the cache."""
    return [folder / key() / NAME for folder in (SOURCES / "built", cache_folder() / "cpp")]


SWITCH = "ATTN_PLUGINS_CPP"
"""Environment variable: 0 leaves compiled kernels alone; the name of an instruction set has those used."""


@functools.cache
def built() -> Path | None:
    """The library; None where it has not been built, or is not to be used. Looked for once a process."""
    if os.environ.get(SWITCH) == "0":
        return None
    return next((place for place in places() if place.is_file()), None)


def compiler() -> str:
    """The C++ compiler: ``$CXX``, else the first of :data:`COMPILERS` that there is.

    Raises:
        ValueError: there is none.
    """
    asked = os.environ.get("CXX")
    found = next((name for name in ([asked] if asked else COMPILERS) if shutil.which(shlex.split(name)[0])), None)
    if found is None:
        looked = f"CXX={asked!r}, which is not there" if asked else f"none of {', '.join(COMPILERS)}"
        raise ValueError(f"no C++ compiler: got {looked}; install one, such as Debian's package g++, or set CXX")
    return found


def build(folder: Path | None = None, flags: str = "") -> Path:
    """Compile the kernels, unless they are there already; about ten seconds of one processor, more where it is busy.

    Args:
        folder: where to; None is the cache, where they are found. A wheel may have brought them.
        flags: more of the compiler's, such as sanitizers; what is there was made with others, and is made again.

    Raises:
        ValueError: there is no compiler, or it fails; the message ends with what it said.
    """
    targets = places() if folder is None else [folder / key() / NAME]
    there = next((place for place in targets if place.is_file()), None)
    if there is not None and not flags:
        built.cache_clear()  # another process may have made it since it was looked for
        return there
    target = targets[-1]
    cxx, root = shlex.split(compiler()), Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        more = shlex.split(flags)
        operators = [*cxx, *shlex.split(OPERATOR_FLAGS), *more, abi, *include, "-c", str(SOURCES / "operators.cpp")]
        commands = {f"{work}/operators.o": operators}
        for name in instruction_sets():
            options = shlex.split(f"{KERNEL_FLAGS} -DISA={name} {INSTRUCTION_SETS[name]}")
            commands[f"{work}/{name}.o"] = [*cxx, *options, *more, "-c", str(SOURCES / "kernels.cpp")]
        _run([[*command, "-o", made] for made, command in commands.items()])
        library = f"{work}/{NAME}"
        linked = ["-shared", "-fopenmp", *more, *commands, f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-o", library]
        _run([[*cxx, *linked]])
        Path(library).replace(target)
    built.cache_clear()
    return target


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side; all have ended when it returns or raises."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, **pipes) for command in commands]  # type: ignore[call-overload]
    said = [process.communicate()[0] for process in started]
    for process, command, lines in zip(started, commands, said, strict=True):
        if process.returncode:
            last = "\n".join(lines.strip().splitlines()[-20:])
            raise ValueError(f"compiling failed: {shlex.join(command)}\n{last}")
