"""`attn-plugins run`: a program runs as Python would run it, and knows the flag, as do the processes that it starts."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.launcher.run import CHILDREN

PROGRAM = """
    import json, os, sys
    import transformers
    seen = {"argv": sys.argv, "name": __name__, "main": vars(sys.modules["__main__"]) is globals()}
    seen |= {"path": sys.path[0], "file": __file__, "spec": getattr(__spec__, "name", None)}
    seen["children"] = os.environ["PYTHONPATH"]
    seen["flag"] = hasattr(transformers.PreTrainedConfig, "attn_plugin")
    print("seen", json.dumps(seen))
"""
OPTIONS = ["--config", "x.yaml", "--help", "-m", "other", "--set", "a=b", "--", "run"]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """What running a program changes, put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/the/folder/of/the/command", *sys.path[1:]])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("ATTN_PLUGINS_RUN", "")


def run(*arguments):
    sys.argv = ["attn-plugins", "run", *arguments]
    cli.main()


def seen(capsys):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seen ")]
    return json.loads(line.removeprefix("seen "))


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("how", ["script", "module", "package", "folder"])
def test_a_program_runs_as_main_with_its_own_arguments(tmp_path, capsys, how):
    path = written(tmp_path / ("inside/__main__.py" if how in ("package", "folder") else "inside.py"), PROGRAM)
    run(*{"script": ["inside.py"], "folder": ["inside"]}.get(how, ["-m", "inside"]), *OPTIONS)
    told = seen(capsys)
    assert told["argv"][1:] == OPTIONS
    assert (told["name"], told["main"], told["flag"]) == ("__main__", True, True)
    assert Path(told["file"]).resolve() == path
    assert told["spec"] == {"module": "inside", "package": "inside.__main__"}.get(how, told["spec"])
    assert Path(told["path"]).resolve() == (path.parent if how == "folder" else tmp_path)
    assert told["children"] == f"{CHILDREN}{os.pathsep}/elsewhere"


def test_an_installed_command_is_found_by_its_name(monkeypatch, capsys):
    def command():
        print(sys.argv)
        return 7

    entry = importlib.metadata.EntryPoint("their-command", "theirs:main", "console_scripts")
    monkeypatch.setattr(type(entry), "load", lambda self: command)
    monkeypatch.setattr(
        "attn_plugins.launcher.run.entry_points", lambda group, name: [entry] if name == entry.name else []
    )
    with pytest.raises(SystemExit) as status:
        run("their-command", *OPTIONS)
    assert status.value.code == 7
    assert capsys.readouterr().out == f"{['their-command', *OPTIONS]}\n"


@pytest.mark.parametrize(
    ("text", "raised", "code"),
    [
        ("raise SystemExit(3)", SystemExit, 3),
        ("raise SystemExit('no')", SystemExit, "no"),
        ("raise KeyboardInterrupt", KeyboardInterrupt, None),
        ("raise ValueError('theirs')", ValueError, None),
        ("import click; raise click.Abort()", RuntimeError, None),
        ("raise EOFError", EOFError, None),
    ],
)
def test_what_a_program_raises_is_its_own(tmp_path, text, raised, code):
    with pytest.raises(raised) as error:
        run(str(written(tmp_path / "program.py", text)))
    assert getattr(error.value, "code", None) == code


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["nothing.py"],
            "error: no such program: 'nothing.py'; allowed: -m MODULE, a script, or the name of a command\n",
        ),
        (["-m", "no_such.module"], "error: no such module: 'no_such.module'\n"),
        (["-m", "attn_plugins.nothing"], "error: no such module: 'attn_plugins.nothing'\n"),
        (["-m"], "error: no such module: ''\n"),
    ],
)
def test_what_is_not_there_is_one_line(capsys, arguments, told):
    with pytest.raises(SystemExit) as status:
        run(*arguments)
    assert status.value.code == 2
    assert capsys.readouterr().err == told


def test_help_is_our_own_only_where_no_program_is_named():
    for arguments in (["run"], ["run", "--help"]):
        assert "Run another program" in CliRunner().invoke(cli.app, arguments).output
    assert "Run another program" in CliRunner().invoke(cli.app, ["--help"]).output


PARENT = """
    import subprocess, sys
    assert "attn_plugins" in sys.modules
    sys.exit(subprocess.run([sys.executable, "child.py"]).returncode)
"""
CHILD = """
    import sys
    assert "attn_plugins" not in sys.modules and "torch" not in sys.modules
    assert not any(place.endswith("children") for place in sys.path)
    import transformers
    assert "attn_plugins" in sys.modules and hasattr(transformers.PreTrainedConfig, "attn_plugin")
    import theirs
    print("their own sitecustomize", theirs.seen)
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A program that starts another process, in an environment with a sitecustomize.py of its own."""
    written(tmp_path / "parent.py", PARENT)
    written(tmp_path / "child.py", CHILD)
    written(tmp_path / "own/theirs.py", "seen = False")
    written(tmp_path / "own/sitecustomize.py", "import theirs; theirs.seen = True")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), str(Path(cli.__file__).parents[2])]))


def test_processes_that_a_program_starts_know_the_flag(places, capfd):
    with pytest.raises(SystemExit) as status:
        run("parent.py")
    assert status.value.code == 0
    assert "their own sitecustomize True" in capfd.readouterr().out


@pytest.mark.slow
def test_processes_of_a_program_that_accelerate_launches_know_the_flag(places):
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--module", "attn_plugins"]
    command = [sys.executable, "-W", "ignore", "-m", *launch, "run", "parent.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "their own sitecustomize True" in done.stdout


TASK = """
    task: tiny_words
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {rows}}}}}
    output_type: loglikelihood
    test_split: test
    doc_to_text: "{{{{text}}}}"
    doc_to_target: " cat"
    metric_list: [{{metric: perplexity}}]
"""


def measured_by_lm_eval(folder, **arguments):
    run(
        *("-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps(arguments), "--device", "cpu"),
        *("--tasks", "tiny_words", "--include_path", str(folder), "--output_path", str(folder / "out"), "--limit", "4"),
    )
    newest = max((folder / "out").rglob("*.json"), key=os.path.getmtime)
    return json.loads(newest.read_text())["results"]["tiny_words"]["perplexity,none"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("default")
def test_lm_eval_takes_the_flag_in_model_args_and_saved_swapped_folders(llama, text, tmp_path):
    written(tmp_path / "task.yaml", TASK.format(rows=text))
    own = measured_by_lm_eval(tmp_path, pretrained=llama)
    swapped = measured_by_lm_eval(tmp_path, pretrained=llama, attn_plugin={"type": "local", "window_size": 1})
    AutoModelForCausalLM.from_pretrained(llama, attn_plugin={"type": "local", "window_size": 1}).save_pretrained(
        "saved"
    )
    AutoTokenizer.from_pretrained(llama).save_pretrained("saved")
    assert measured_by_lm_eval(tmp_path, pretrained=str(tmp_path / "saved")) == swapped != own


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_sft_takes_the_flag_in_model_init_kwargs(llama, text, tmp_path):
    """The command starts accelerate, and that the script, in another process."""
    flag = json.dumps({"attn_plugin": {"type": "linear", "feature_map": "hedgehog"}, "dtype": "float32"})
    with contextlib.suppress(SystemExit):
        run(
            *("trl", "sft", "--model_name_or_path", llama, "--model_init_kwargs", flag),
            *("--output_dir", "out", "--max_steps", "1", "--report_to", "none", "--use_cpu", "--num_processes", "1"),
            *("--dataset_name", str(Path(text).parent), "--max_length", "32", "--eos_token", "</s>"),
        )
    assert [rule["type"] for rule in json.loads(Path("out/config.json").read_text())["attn_plugin"]] == ["linear"]
