"""Forked programs see and say what they see and say in a new interpreter."""

import os
import signal
import subprocess
import sys

import programs
import pytest

CODE = """
import json, os, sys
told = {"argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "CHANGED": os.environ.get("CHANGED"), "name": __name__}
print(json.dumps({**told, "main": sys.modules["__main__"].json is json, "read": sys.stdin.read()}))
print("heard", file=sys.stderr)
"""
ENDS = ["", "sys.exit(3)", "sys.exit('what is wrong')", "sys.exit()", "1 / 0"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_a_fork_is_as_a_new_interpreter(tmp_path, how, end):
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "their_module.py").write_text(CODE + end)
    command = {"-c": ["-c", CODE + end], "-m": ["-m", "their_module"], "script": [folder / "their_module.py"]}[how]
    changed = {"CHANGED": "yes", "PYTHONPATH": str(tmp_path)}
    cwd = folder if how == "-m" else tmp_path
    got = programs.run(*command, "one", 2, env=changed, cwd=cwd, stdin="some\nlines")
    want = subprocess.run(
        [sys.executable, *map(str, command), "one", "2"],
        env={**os.environ, **changed},
        cwd=cwd,
        input="some\nlines",
        capture_output=True,
        text=True,
    )
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout)
    assert got.stderr.splitlines()[0] == "heard"
    assert got.stderr.splitlines()[-1] == want.stderr.splitlines()[-1]


def test_programs_run_side_by_side_and_are_killed_alone():
    one, other = programs.start("-c", "import time; time.sleep(60)"), programs.start("-c", "print('other')")
    assert other.wait().stdout == "other\n"
    os.kill(one.pid, signal.SIGKILL)
    assert one.wait().returncode == -signal.SIGKILL


def test_nothing_of_ours_is_imported_before_a_program_does():
    ours = "name.startswith('attn_plugins') or '.modeling_' in name and '.models.' in name"
    assert programs.run("-c", f"import sys; print([name for name in sys.modules if {ours}])").stdout == "[]\n"
