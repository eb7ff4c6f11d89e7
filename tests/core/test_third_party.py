"""One file and an entry point make an attention: installed by pip, it is listed, tested, measured and compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A folder into which pip has installed the example, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    source = folder.parent / "source"  # what a build leaves behind stays out of the project
    source.mkdir()
    for file in (ROOT / "examples" / "third_party_plugin").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def run(plugin, *command, **environment):
    path = os.pathsep.join(filter(None, [str(plugin), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = programs.run("-m", *command, env={"PYTHONPATH": path, **environment}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(plugin):
    known = {entry["name"]: entry for entry in json.loads(run(plugin, "attn_plugins", "list", "--json"))}
    assert known["relu"]["source"].startswith(str(plugin / "relu_attention.py"))
    assert known["relu"]["options"] == [
        {"name": "power", "type": "int", "default": "1", "doc": "Exponent of what the ReLU lets through."}
    ]


def test_the_contract_tests_run_over_it(plugin):
    names = ("contract", "capabilities", "every_weight", "dropping")
    chosen = [*(f"tests/attentions/test_{name}.py" for name in names), "-k", "relu"]
    said = run(plugin, "pytest", "-q", "-p", "no:cacheprovider", *chosen, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert int(said.split(" passed")[0].split()[-1]) > 100, said


def test_it_is_measured(plugin, tmp_path):
    flags = ["--attn", "{type: relu, power: 2}", "-s", "lengths=[32]", "-s", "rounds=1", "-s", "peers=false"]
    run(plugin, "attn_plugins", "bench", *flags, "-o", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["status"], r["settings"]["source"]["power"]) for r in records] == [("ok", 2), ("ok", 2)]


def test_it_is_compared(plugin, llama, text, tmp_path):
    tree = {
        "models": {"tiny": str(llama)},
        "attentions": {"dense": None, "relu": "relu", "mixed": [{"type": "relu", "layers": 0}]},
        "output_dir": str(tmp_path),
        "data": {"source": str(text)},
        "evaluation": {"length": 16, "max_tokens": 64},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    run(plugin, "attn_plugins", "compare", "--config", tmp_path / "compare.yaml")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {record["attention"]: record["status"] for record in records} == dict.fromkeys(tree["attentions"], "ok")
    values = {record["attention"]: record["result"]["value"] for record in records}
    assert len(set(values.values())) == 3
