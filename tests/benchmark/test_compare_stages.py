"""A comparison whose attentions are taught and chosen first: which rows there are, and what they start from."""

import json
from pathlib import Path

import pytest
import yaml

from attn_plugins.benchmark.compare import models as compare_models
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.core.options import build
from attn_plugins.training.config import EvaluateConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.run import prepare_transfer

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
LINEAR = {"type": "linear", "feature_map": "hedgehog"}
TRANSFER = {"steps": 3, "length": 16, "held_out": 2, "training": {"disable_tqdm": True}}
QUICK = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.1}


def config(model, text, out, **changes):
    tree = {
        "models": {"tiny": model},
        "attentions": {"dense": None, "local": LOCAL, "linear": LINEAR},
        "output_dir": str(out),
        "data": {"source": text},
        "evaluation": {"length": 16, "max_tokens": 64},
        "transfer": TRANSFER,
        "finetune": {"block_size": 16, "lora": {"r": 2}, "training": QUICK},
    }
    return build(CompareConfig, {**tree, **changes})


def run(config, **options):
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None, **options)
    return results


def by_cell(results):
    lines = map(json.loads, results.path.read_text().splitlines())
    return {(line["attention"], line["measure"]): line for line in lines}


def test_attentions_with_weights_are_taught_before_they_are_fine_tuned(llama, text, tmp_path):
    given = config(llama, text, tmp_path / "out")
    results = run(given)
    found = by_cell(results)
    assert {line["status"] for line in found.values()} == {"ok"}
    assert {attention for attention, measure in found if measure == "transfer"} == {"linear"}
    taught = found["linear", "transfer"]["result"]
    tuned = json.loads((Path(found["linear", "finetune"]["result"]["folder"]) / "metrics.json").read_text())
    assert tuned["settings"]["model"] == taught["folder"]
    assert [stage["stage"] for stage in tuned["history"]] == ["transfer"]
    other = json.loads((Path(found["local", "finetune"]["result"]["folder"]) / "metrics.json").read_text())
    assert other["settings"]["model"] == llama

    same = {"model": llama, "attention": LINEAR, "data": {"source": text}}
    prepare_transfer(build(TransferConfig, {**same, **TRANSFER, "output_dir": str(tmp_path / "alone")})).run(False)
    alone = {"model": str(tmp_path / "alone"), "data": {"source": text}, "evaluation": given.evaluation}
    figures = prepare_evaluation(build(EvaluateConfig, alone)).run()["result"]
    assert taught["value"] == pytest.approx(figures["perplexity"], rel=1e-6)
    assert taught["value"] != found["linear", "evaluate"]["result"]["value"]
    assert taught["errors"]["after"] < taught["errors"]["before"]

    tables, files = write_report(given, results)
    rows = [row[:2] for row in tables[0].rows if row[0] == "linear"]
    assert rows == [["linear", "untrained"], ["linear", "transferred"], ["linear", "fine-tuned"]]
    assert "- Transfer: steps 3, length 16" in files[0].read_text()


def test_a_run_that_was_stopped_teaches_once(llama, text, tmp_path, monkeypatch):
    given = config(llama, text, tmp_path / "out", attentions={"dense": None, "linear": LINEAR})
    results = run(given)
    lines = results.path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"measure": "transfer"' not in line and '"measure": "finetune"' not in line]
    results.path.write_text("".join(kept))  # killed after the training, before its figures were written
    monkeypatch.setattr(compare_models, "prepare_transfer", None)
    again = by_cell(run(given))
    before = {json.loads(line)["measure"]: json.loads(line) for line in lines if '"linear"' in line}
    for measure in ("transfer", "finetune"):
        assert again["linear", measure]["result"]["value"] == pytest.approx(
            before[measure]["result"]["value"], rel=1e-6
        )


def test_only_what_is_taught_depends_on_the_transfer(text):
    one, other, none = (
        {(cell.attention, cell.measure): cell.key for cell in cells(config("m", text, "out", transfer=transfer))}
        for transfer in (TRANSFER, {**TRANSFER, "steps": 4}, None)
    )
    assert {place for place in one if one[place] != other[place]} == {("linear", "transfer"), ("linear", "finetune")}
    assert {place for place in none if one[place] != none[place]} == {("linear", "finetune")}
    assert set(one) - set(none) == {("linear", "transfer")}


def test_the_transfer_is_for_those_that_are_named(text):
    attentions = {"dense": None, "one": LINEAR, "other": {**LINEAR, "chunk_size": 8}}
    found = cells(config("m", text, "out", attentions=attentions, transfer_of=["other"]))
    assert [cell.attention for cell in found if cell.measure == "transfer"] == ["other"]
    assert {cell.attention for cell in found if "transfer" in cell.settings} == {"other"}


CHOOSE = {"choose": {"attention": LOCAL, "budget": 0.5, "level": "layers"}}
CHOSEN = [{"type": "softmax", "layers": [1]}, LOCAL]
SCORES = [{"role": "decoder", "layer": n, "score": n / 4, "kept": n == 1} for n in range(2)]


@pytest.fixture
def choice(monkeypatch):
    """Stands for the choice, which wants a tokenizer of more words; tells what was asked for."""
    asked = []

    def choose(settings, told):
        asked.append(settings)
        Path(settings.output_dir).mkdir(parents=True)
        (Path(settings.output_dir) / "rules.yaml").write_text(yaml.safe_dump(CHOSEN, sort_keys=False))
        told = [{"path": f"layers.{n}", "stack": "layers", **score} for n, score in enumerate(SCORES)]
        (Path(settings.output_dir) / "scores.json").write_text(json.dumps({"scores": told}))

    monkeypatch.setattr(compare_models, "choose", choose)
    return asked


def test_rules_are_chosen_when_the_cell_runs_and_once(llama, text, tmp_path, choice):
    attentions = {"dense": None, "local": LOCAL, "chosen": CHOOSE}
    given = config(llama, text, tmp_path / "out", attentions=attentions, transfer=None)
    results = run(given)
    found = by_cell(results)
    assert len(choice) == 1
    assert (choice[0].budget, choice[0].level, choice[0].model, choice[0].data.source) == (0.5, "layers", llama, text)
    assert {line["status"] for line in found.values()} == {"ok"}
    modules = {label: found[label, "evaluate"]["result"]["attention"]["modules"] for label in attentions}
    assert modules["chosen"] == {"local": 1, "softmax": 1}
    values = {label: found[label, "evaluate"]["result"]["value"] for label in attentions}
    assert len(set(values.values())) == 3
    tuned = json.loads((Path(found["chosen", "finetune"]["result"]["folder"]) / "metrics.json").read_text())
    assert tuned["attention"]["modules"] == modules["chosen"]
    assert found["chosen", "evaluate"]["result"]["rules"] == CHOSEN
    assert found["chosen", "evaluate"]["result"]["scores"] == SCORES
    _, files = write_report(given, results)
    report = files[0].read_text()
    assert "- Attention chosen: choose attention type local" in report
    assert "- Chosen for chosen of tiny: type softmax, layers 1; type local, window_size 4" in report
    results.path.unlink()
    run(given)
    assert len(choice) == 1, "found again"
    run(given, fresh=True)
    assert len(choice) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attentions": {"dense": None, "a": {**CHOOSE, "type": "local"}}},
            "attentions.a: got .* rules, or choose and",
        ),
        (
            {"attentions": {"dense": None, "a": {"choose": {"attention": LOCAL, "budget": 2.0}}}},
            "a: choose: budget=2.0",
        ),
        ({"attentions": {"dense": None, "a": {"choose": {"seed": 1}}}}, "choose.seed is set for the whole comparison"),
        ({"transfer": {"steps": 0}}, "transfer: steps=0; allowed: at least 1"),
        ({"transfer_of": ["local"]}, "transfer_of has 'local'; allowed: those that bring weights: linear"),
        ({"transfer_of": ["other"]}, "transfer_of has 'other'; allowed: those that bring weights: linear"),
        ({"transfer": {"model": "m"}}, "transfer.model is set for the whole comparison; take it out of transfer"),
        ({"data": None, "speed": {"lengths": {"model": [8]}}, "finetune": None}, "transfer needs data"),
        (
            {"attentions": {"dense": None, "a": CHOOSE}, "data": None, "finetune": None, "transfer": None},
            "nothing is measured|a: choose needs data",
        ),
    ],
)
def test_wrong_settings_are_refused(text, changes, message):
    with pytest.raises(ValueError, match=message):
        config("m", text, "out", **changes)
