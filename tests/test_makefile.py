"""`make setup` on machines that are not this one: pip's choice of torch is taken, and said where it is a large one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON = r"""#!/bin/sh
# A Python that notes what it is asked for, makes environments of itself, and lets pip find the torch in $TORCH.
echo "$*" >> "$LOG"
case "$*" in
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *--report*) while [ "$1" != --report ]; do shift; done; cp "$TORCH" "$2" ;;
esac
"""


def made(folder, *words):
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_try_runs_what_is_asked_of_one_attention(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / ".installed").touch()  # older than pyproject.toml: nothing is installed anew
    os.utime(tmp_path / ".installed", (0, 0))
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    said = made(ROOT, "--silent", "try", "NAME=local", f"VENV={tmp_path}")
    assert said.returncode == 0, said.stderr
    assert "-k local or of_the_registry tests/attentions/test_local.py " in said.stdout
    folders = {"attentions": ("contract", "capabilities", "states", "cost", "every_weight"), "config": ("configs",)}
    folders |= {"hf": ("generation", "swap"), "hf/caches": ("static_caches",), "hf/masks": ("packing",)}
    folders |= {"benchmark": ("attention_page", "kernels")}
    files = {f"tests/{folder}/test_{name}.py" for folder, names in folders.items() for name in names}
    assert {*files, "tests/test_readme.py"} <= {*said.stdout.split()}
    for name, message in (
        ("", "which attention?"),
        ("locale", "no file in attn_plugins/attentions says @register_att"),
    ):
        said = made(ROOT, "try", f"NAME={name}", f"VENV={tmp_path}")
        assert said.returncode != 0
        assert message in said.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("requires", ["filelock", "nvidia-cublas==1", "triton==3", "cuda-toolkit==13"])
@pytest.mark.parametrize("index", ["", "https://example.invalid/cpu"])
def test_setup_asks_nothing_and_takes_what_pip_gives(tmp_path, requires, index):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python, log, torch = (tmp_path / name for name in ("python", "log", "torch"))
    python.write_text(PYTHON)
    python.chmod(0o755)
    torch.write_text(json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": [requires]}}]}))
    kept = {name: os.environ[name] for name in ("PATH",)}
    made = subprocess.run(
        ["make", "setup", f"PYTHON={python}", f"TORCH_INDEX={index}"],
        cwd=tmp_path,
        env={**kept, "LOG": str(log), "TORCH": str(torch)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert made.returncode == 0, made.stderr
    large = requires != "filelock"
    notes = [line for line in made.stdout.splitlines() if line.startswith("note: ")]
    assert len(notes) == large
    assert all("make setup TORCH_INDEX=<address of PyTorch's index of CPU wheels>" in line for line in notes)
    (installed,) = (line for line in log.read_text().splitlines() if "-e .[dev]" in line)
    assert "-c constraints.txt" in installed
    assert ("--extra-index-url" in installed) == bool(index)
