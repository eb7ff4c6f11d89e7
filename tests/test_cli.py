"""The command line as a user meets it: tables, JSON, one line where something is wrong, help that is true."""

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import attn_plugins as ap
from attn_plugins import cli
from attn_plugins.benchmark.results.store import Results
from attn_plugins.cli import look
from attn_plugins.config import extras
from attn_plugins.core.capabilities import CAPABILITIES
from attn_plugins.data.text import PYTHON_DOCS
from attn_plugins.tasks import list_tasks
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.models import DEMO

pytestmark = pytest.mark.usefixtures("one_thread")

VERBS = [
    "bench",
    "build",
    "check",
    "choose",
    "compare",
    "describe",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "list",
    "recipe",
    "report",
    "results",
    "run",
    "search",
    "serve",
    "transfer",
]
SHORT = ["-s", "evaluation.length=16", "-s", "evaluation.max_tokens=64"]


def call(*arguments, status=0, columns=200):
    ran = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert ran.exit_code == status, ran.output + str(ran.exception)
    return ran


def refused(*arguments):
    """The one line on stderr of a command that cannot start."""
    ran = call(*arguments, status=2)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def options(verb):
    return {name for parameter in typer.main.get_command(cli.app).commands[verb].params for name in parameter.opts}


def test_help_tells_what_there_is():
    assert sorted(typer.main.get_command(cli.app).commands) == VERBS
    text = call("--help").output
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        shown = call(verb, "--help").output
        assert all(name in shown for name in options(verb) if name.startswith("--"))
    finetune, evaluate = call("finetune", "--help").output, call("evaluate", "--help").output
    assert DEMO in finetune
    assert PYTHON_DOCS in finetune
    assert all(task in evaluate for task in list_tasks())
    assert all(mode in finetune for mode in typing.get_args(typing.get_type_hints(FinetuneConfig)["tune"]))


def test_list_shows_all_of_the_registry_in_80_columns():
    lines = call("list", columns=80).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    families, seen = set(), []
    for line in lines[1 : lines.index("")]:  # below the names of the columns
        if not line.startswith(" "):
            family = line.strip().replace(" ", "_")
            families.add(family)
        elif line[2] != " ":  # else the rest of a cell
            name, supports = line.split()[:2]
            attention = ap.get_attention(name)
            seen.append(name)
            assert attention.family == family
            assert supports == "".join(
                letter if getattr(attention, what) else "·" for what, letter in look.LETTERS.items()
            )
            assert look.brief_paper(attention.paper)[:20] in line
            assert attention.cost[:12] in line
    assert sorted(seen) == ap.list_attentions()
    assert families == {ap.get_attention(name).family for name in ap.list_attentions()}


def test_list_tells_everything_as_json():
    assert list(look.LETTERS) == list(CAPABILITIES)
    known = json.loads(call("list", "--json").output)
    assert [entry["name"] for entry in known] == ap.list_attentions()
    for entry in known:
        told = {"name", "family", "summary", "cost", "keeps", "capabilities", "paper", "options", "doc", "source"}
        assert told == set(entry)
        assert entry["summary"]
        assert all(option["doc"] for option in entry["options"]), f"{entry['name']} has an option without a docstring"


@pytest.mark.parametrize("name", ap.list_attentions())
def test_describe_an_attention(name):
    text = call("describe", name).output
    attention = ap.get_attention(name)
    known = json.loads(call("describe", name, "--json").output)
    file, _, line = known["source"].rpartition(":")
    source = Path(file).read_text().splitlines()
    assert (
        f'@register_attention("{name}")' in source[int(line) - 1]
        or f"class {attention.__name__}" in source[int(line) - 1]
    )
    assert attention.paper[:40] in text
    for option in known["options"]:
        assert option["name"] in text


def test_describe_a_model_reads_no_weights(llama, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((Path(llama) / "config.json").read_text())
    rows = json.loads(call("describe", bare, "--attn", "{type: local, window_size: 8, layers: 1}", "--json").output)
    assert [(row["plugin"], row["layer"]) for row in rows] == [(None, 0), ("local", 1)]
    assert "window_size=8" in call("describe", bare, "--attn", "{type: local, window_size: 8}").output
    assert "(sdpa)" in call("describe", llama).output
    assert "layers=9 is out of range" in refused("describe", bare, "-a", "{type: local, layers: 9}")


def test_describe_what_is_not_there():
    assert "'locl' is neither an attention (did you mean local?) nor a model folder" in refused("describe", "locl")
    assert "no such model folder: './nothing'" in refused("describe", "./nothing")


def test_finetune_with_flags_over_a_file(llama, text, tmp_path):
    settings = {
        "model": "/not/this",
        "data": {"source": "nor-this.jsonl"},
        "output_dir": "nor this",
        "attention": {"type": "local", "window_size": 4},
        "tune": "lora",
        "block_size": 16,
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 0.01},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    flags = ["-m", llama, "-d", text, "-o", tmp_path / "out", "--tune", "full", "--seed", 3, "-a", "linear"]
    sets = ["-s", "training.max_steps=2", "-s", "attention.feature_map=relu", *SHORT]
    ran = call("finetune", "--config", tmp_path / "c.yaml", *flags, *sets)
    assert "written to" in ran.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["model"], metrics["tune"], metrics["seed"], metrics["train"]["steps"]) == (llama, "full", 3, 2)
    assert (metrics["rules"][0]["type"], metrics["rules"][0]["feature_map"]) == ("linear", "relu")
    assert f"{metrics['evaluation']['after']['perplexity']:.4g}" in ran.stdout
    assert "holds an earlier run" in refused("finetune", "--config", tmp_path / "c.yaml", *flags, *sets)


def test_evaluate_prints_and_writes_what_it_measured(llama, text, tmp_path):
    linear = "{type: linear, feature_map: hedgehog}"
    ran = call("evaluate", "-m", llama, "-d", text, "-a", linear, "-o", tmp_path / "out" / "r.json", *SHORT)
    result = json.loads((tmp_path / "out" / "r.json").read_text())
    assert f"{result['result']['perplexity']:.4g}" in ran.stdout
    assert "perplexity at positions 1 to 4" in ran.stdout
    assert "weights of the attention are at their initial values: it is untrained" in ran.stdout
    assert result["attention"]["modules"] == {"linear": 2}
    printed = json.loads(call("evaluate", "-m", llama, "-d", text, "--json", *SHORT).stdout)
    assert printed["attention"]["modules"] == {"own (sdpa)": 2}
    assert printed["result"]["perplexity"] != result["result"]["perplexity"]


def test_a_yaml_file_of_rules_is_an_attention(llama, text, tmp_path):
    (tmp_path / "rules.yaml").write_text("- {type: local, window_size: 3, layers: 0}\n")
    printed = json.loads(
        call("evaluate", "-m", llama, "-d", text, "-a", tmp_path / "rules.yaml", "--json", *SHORT).stdout
    )
    assert printed["attention"]["modules"] == {"local": 1, "own (sdpa)": 1}
    assert printed["attention"]["map"] == {"decoder": [["local"], ["own (sdpa)"]]}


def test_compare_ends_by_naming_its_files_and_tells_failure_by_its_status(llama, text, tmp_path):
    settings = {
        "models": {"tiny": llama},
        "attentions": {"dense": None, "local": {"type": "local", "window_size": 4}},
        "output_dir": str(tmp_path / "out"),
        "data": {"source": text},
        "evaluation": {"length": 16, "max_tokens": 64},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    ran = call("compare", "-c", tmp_path / "c.yaml")
    assert "[1/2] tiny · dense · evaluate · seed 0" in ran.stdout
    files = ran.stdout.split("files:\n")[1].split()
    assert [Path(file).name for file in files] == ["results.jsonl", "report.md", "report.html"]
    assert all(Path(file).exists() for file in files)
    bad = call("compare", "-c", tmp_path / "c.yaml", "-s", "attentions.bad={type: local, layers: 7}", status=1)
    assert "layers=7 is out of range" in bad.stdout
    assert "error: some cells failed; see the table of errors" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "model is missing; needed: model, output_dir"),
        (["finetune", "-c", "nothing.yaml"], "cannot read nothing.yaml: No such file"),
        (
            ["finetune", "-m", "x", "-d", "y", "-o", "z", "-s", "trainig.max_steps=2"],
            "unknown key 'trainig' (did you mean training?)",
        ),
        (["finetune", "-m", "/no/x", "-d", "python-docs", "-o", "z"], "no such model folder: '/no/x'"),
        (["finetune", "-m", "/no/x", "-d", "y.jsonl", "-o", "z"], "no such file or folder: y.jsonl"),
        (["evaluate", "-m", "x", "-d", "y", "-a", "locl"], "unknown attention 'locl' (did you mean local?)"),
        (["evaluate", "-m", "x", "-d", "y", "-a", "{type: local, windw_size: 3}"], "did you mean window_size?"),
        (["evaluate", "-m", "x", "-d", "y", "--task", "accurcy"], "unknown task 'accurcy' (did you mean accuracy?)"),
        (["evaluate", "-m", "x", "-d", "y", "-s", "nonsense"], "--set 'nonsense'; allowed: key=value"),
        (["compare", "-s", "seeds=3"], "models is missing"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_a_run_that_has_ended_is_shown_and_left_alone(llama, text, tmp_path):
    out = tmp_path / "out"
    sizes = ["-s", "block_size=16", "-s", "training.max_steps=1", "-s", "training.save_strategy='no'"]
    arguments = ["finetune", "-m", llama, "-a", "local", "-d", text, "-o", out, *sizes, *SHORT]
    assert f"written to {out}: the model" in call(*arguments).stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = call(*arguments, "--resume").stdout
    assert f"the run in {out} has ended with these settings; nothing was trained, nothing written" in said
    assert "perplexity, held-out" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_where_results_cannot_go_is_one_line(llama, text, tmp_path):
    (tmp_path / "file").touch()
    there = tmp_path / "file" / "out"
    for verb, flags in (
        ("bench", ["-a", "local"]),
        ("bench", ["--decode", "-a", "local"]),
        ("finetune", ["-m", "/no/such", "-d", text]),
        ("evaluate", ["-m", "/no/such", "-d", text]),
    ):
        assert "is a file; allowed: a folder" in refused(verb, *flags, "-o", there)


def test_a_second_run_is_one_line(tmp_path):
    with Results(tmp_path / "results.jsonl").lock():
        assert "another run is measuring into" in refused("bench", "-a", "local", "-o", tmp_path)


def test_a_missing_extra_is_one_clear_line(llama, text, monkeypatch):
    real = extras.importlib.import_module

    def without(name, *rest):
        if name.split(".")[0] == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *rest)

    monkeypatch.setattr(extras.importlib, "import_module", without)
    line = refused("evaluate", "-m", llama, "-d", text)
    assert line == "error: this needs the package 'datasets': pip install 'attn-plugins[train]'"


def test_a_developer_can_have_the_traceback(monkeypatch):
    monkeypatch.setenv("ATTN_PLUGINS_TRACEBACK", "1")
    ran = CliRunner().invoke(cli.app, ["describe", "./nothing"])
    assert isinstance(ran.exception, ValueError)


def test_the_module_is_the_command_and_list_needs_no_extras():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['attn_plugins', 'list', '--json']\n"
        "try:\n    runpy.run_module('attn_plugins', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "extras = {'datasets', 'peft', 'evaluate', 'sklearn', 'matplotlib', 'gguf', 'pandas'}\n"
        "print('LOADED', sorted(extras & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    listed, _, loaded = ran.stdout.partition("LOADED")
    assert [entry["name"] for entry in json.loads(listed)] == ap.list_attentions()
    assert re.findall(r"'(\w+)'", loaded) == []
