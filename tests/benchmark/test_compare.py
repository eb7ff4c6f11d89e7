"""A comparison: every cell once, whatever kills it; figures in the tables are those of the cells."""

import json
import os
import signal
import time
from pathlib import Path

import programs
import pytest
import torch
import yaml
from test_schema import undescribed

from attn_plugins.benchmark.compare import run as compare
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import STAGES, CompareResults, write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.benchmark.results.schema import FIELDS
from attn_plugins.benchmark.results.store import Results
from attn_plugins.core.options import build

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
QUICK = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
FINETUNE = {
    "block_size": 16,
    "lora": {"r": 2},
    "training": {**QUICK, "learning_rate": 0.5},
}


def tree(model, text, out, **changes):
    return {
        "models": {"tiny": model},
        "attentions": {"dense": None, "local": LOCAL},
        "output_dir": str(out),
        "bar": "local",
        "data": {"source": text},
        "evaluation": {"length": 16, "max_tokens": 64},
        **changes,
    }


def run(config, **options):
    said = []
    results = prepare_compare(config)
    run_compare(config, results, say=said.append, **options)
    return results, said


def lines(results):
    return [json.loads(line) for line in results.path.read_text().splitlines()]


def test_a_whole_comparison(llama, text, tmp_path):
    config = build(
        CompareConfig,
        tree(
            llama,
            text,
            tmp_path / "out",
            attentions={"dense": None, "local": LOCAL, "learned": {"type": "linear", "feature_map": "hedgehog"}},
            finetune=FINETUNE,
            speed={
                "lengths": {"model": [16], "attention": [16, 32]},
                "passes": {"model": ["forward"], "attention": ["forward", "forward_backward"]},
                "rounds": 2,
            },
            memory={"lengths": {"attention": [16, 32]}},
            seeds=[0, 1],
        ),
    )
    results, _ = run(config)
    written = lines(results)
    assert len(written) == len(cells(config)) == 3 * (2 + 2 + 3 + 2)
    assert {line["status"] for line in written} == {"ok"}
    assert {(line["measure"], line["seed"]) for line in written} == {
        *[("evaluate", 0), ("evaluate", 1), ("finetune", 0), ("finetune", 1)],
        *[("speed", 0), ("memory", 0)],
    }
    assert all(line["versions"]["torch"] == torch.__version__ for line in written)
    assert [line["measure"] for line in written].index("finetune") > 12, "what takes longest comes last"
    assert undescribed(written) == set()
    assert {name: field for name, field in FIELDS.items() if name in written[0]}.keys() == written[0].keys()
    assert {tuple(line["hashes"]) for line in written if line["measure"] in STAGES} == {("model", "train", "held_out")}
    assert {tuple(line["hashes"]) for line in written if line["measure"] not in STAGES} == {("model",)}

    tables, files = write_report(config, results)
    names = ["report.md", "tiny_quality_vs_time.png", "tiny_memory_vs_length.png", "tiny_speed_vs_length.png"]
    assert [path.name for path in files] == names
    assert all(path.stat().st_size > 1000 for path in files)
    assert [table.title for table in tables] == [
        "Quality",
        "Speed, whole model",
        "Speed, attention layer",
        "Peak memory, attention layer",
    ]
    quality = {(row[0], row[1]): dict(zip(tables[0].header, row, strict=True)) for row in tables[0].rows}
    assert set(quality) == {
        *[("dense", "untrained"), ("local", "untrained, the bar"), ("learned", "untrained")],
        *[("dense", "fine-tuned"), ("local", "fine-tuned"), ("learned", "fine-tuned")],
    }
    values = [
        line["result"]["value"] for line in written if (line["attention"], line["measure"]) == ("local", "finetune")
    ]
    assert len(set(values)) == 2, "seeds differ"
    mean, spread = torch.tensor(values).double().mean(), torch.tensor(values).double().std()
    assert quality["local", "fine-tuned"]["perplexity"] == f"{mean:.2f} ± {spread:.3f}"
    assert quality["dense", "fine-tuned"]["against dense"] == ""
    assert quality["local", "untrained, the bar"]["against dense"].endswith(" (the same with each of 2 seeds)")
    assert " noise, p " in quality["local", "fine-tuned"]["against dense"]
    assert quality["local", "untrained, the bar"]["times the bar's"] == "1.00"
    assert (
        quality["learned", "untrained"]["new parameters"] == "384"
    )  # 2 layers of 2 query heads and 1 key head of 8 x 8
    report = files[0].read_text()
    for said in ("± ", "num_sink_tokens 1", "max_steps 2", "Seeds: 0, 1", *names[1:]):
        assert said in report
    assert tables[1].header == ["attention", "forward 16"]
    shown = [str(column.header) for column in tables[2].rich().columns]
    assert shown == [
        "attention",
        "fwd 16",
        "fwd 32",
        "fwd+bwd 16",
        "fwd+bwd 32",
    ]  # nine whole words don't fit a terminal
    memory = tables[3]
    assert memory.rows[0][1].endswith("(1.00)")


def test_results_are_those_of_the_single_commands(llama, text, tmp_path):
    from attn_plugins.training.config import EvaluateConfig
    from attn_plugins.training.evaluate import prepare_evaluation

    config = build(CompareConfig, tree(llama, text, tmp_path / "out"))
    results, _ = run(config)
    for label, rules in config.attentions.items():
        alone = {"model": llama, "attention": rules, "data": {"source": text}, "evaluation": config.evaluation}
        figures = prepare_evaluation(build(EvaluateConfig, alone)).run()["result"]
        (record,) = CompareResults(config, results).of("tiny", label, "evaluate")
        assert record["result"]["figures"] == figures


def test_a_second_run_runs_nothing_and_a_changed_one_what_changed(llama, text, tmp_path, monkeypatch):
    config = build(CompareConfig, tree(llama, text, tmp_path / "out"))
    run(config)
    ran = []
    monkeypatch.setitem(compare._MEASURES, "evaluate", lambda config, cell, held: ran.append(cell.attention) or FIGURES)
    _, said = run(config)
    assert ran == []
    assert "2 of 2 cells are in" in said[0]
    renamed = build(
        CompareConfig,
        tree(llama, text, tmp_path / "out", attentions={"native": None, "w": LOCAL}, baseline="native", bar="w"),
    )
    run(renamed)
    assert ran == [], "labels are not part of a cell's key"
    wider = {**LOCAL, "window_size": 5}
    run(build(CompareConfig, tree(llama, text, tmp_path / "out", attentions={"dense": None, "local": wider})))
    assert ran == ["local"]
    run(config, fresh=True)
    assert ran == ["local", "dense", "local"]


FIGURES = {"metric": "perplexity", "better": "lower", "value": 1.0, "figures": {}, "attention": {"new_params": 0}}


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [1]},
        {"dtype": "bfloat16"},
        {"data": {"source": "other.jsonl"}},
        {"evaluation": {"length": 32}},
        {"models": {"tiny": "other"}},
    ],
)
def test_whatever_changes_a_result_changes_the_key(text, change):
    one = {cell.key for cell in cells(build(CompareConfig, tree("model", text, "out")))}
    other = {cell.key for cell in cells(build(CompareConfig, tree("model", text, "out", **change)))}
    assert len(one) == len(other) == 2
    assert not one & other


def measured_keys(text, measures, **changes):
    asked = {"bar": None, "attentions": {"dense": None}, "evaluation": {}}
    found = cells(build(CompareConfig, tree("model", text, "out", **asked | changes)))
    return {cell.measure: cell.key for cell in found if cell.measure in measures}


def test_what_a_fine_tune_says_of_the_evaluation_counts_without_it_too(text):
    """Its task and options are those of the evaluation before any training, which is another cell then."""

    def keys(data=None, evaluation=None, **finetune):
        changes = {"data": {"source": text, **(data or {})}, "evaluation": evaluation or {}}
        return measured_keys(text, ("evaluate", "finetune"), **changes, finetune={"training": QUICK, **finetune})

    classes = keys(task="classification", tune="full")
    assert classes["evaluate"] != keys(task="masked-lm", tune="full")["evaluate"]
    longer = keys(task="masked-lm", tune="full", options={"max_length": 32})
    assert longer["evaluate"] != keys(task="masked-lm", tune="full", options={"max_length": 64})["evaluate"]
    alone = measured_keys(text, ("evaluate",), evaluation={"task": "masked-lm", "max_length": 32})
    assert longer["evaluate"] == alone["evaluate"], "as it is said without a fine-tune"
    several = keys(evaluation=[{"max_length": 16}], task="masked-lm", tune="full", options={"max_length": 32})
    same = measured_keys(text, ("evaluate",), evaluation=[{"task": "masked-lm", "max_length": 16}])
    assert several["evaluate"] == same["evaluate"], "what the evaluation says itself counts"


def test_time_and_memory_of_models_with_other_heads_are_other_cells(text):
    passes = {"lengths": {"model": [16]}, "passes": ["forward"]}
    tasks = ("masked-lm", "accuracy", "perplexity")
    words, classes, tokens = (
        measured_keys(text, ("speed", "memory"), evaluation={"task": task}, speed=passes, memory=passes)
        for task in tasks
    )
    for measure in ("speed", "memory"):
        assert len({words[measure], classes[measure], tokens[measure]}) == 3
    whole = build(CompareConfig, tree("model", text, "out", evaluation={"task": "perplexity"}, memory=passes))
    assert {"kind" in cell.settings for cell in cells(whole)} == {False}, "as in records from before"


def test_spelled_out_defaults_are_the_same_cell(text):
    one = cells(build(CompareConfig, tree("model", text, "out", attentions={"dense": None, "local": "local"})))
    other = {"type": "local", "dilation": 1, "num_sink_tokens": None}
    assert [cell.key for cell in one] == [
        cell.key
        for cell in cells(build(CompareConfig, tree("model", text, "out", attentions={"dense": None, "local": other})))
    ]


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(llama, text, tmp_path):
    attentions = {"dense": None, "bad": {"type": "local", "layers": 7}, "local": LOCAL}
    config = build(CompareConfig, tree(llama, text, tmp_path / "out", attentions=attentions))
    results, said = run(config)
    status = {line["attention"]: line["status"] for line in lines(results)}
    assert status == {"dense": "ok", "bad": "error", "local": "ok"}
    tables, files = write_report(config, results)
    assert tables[-1].title == "Errors"
    assert "layers=7 is out of range" in tables[-1].rows[0][1]
    assert "layers=7 is out of range" in files[0].read_text()
    assert [row[2] for row in tables[0].rows if row[0] == "bad"] == ["error"]
    assert any("layers=7" in line for line in said)
    again, _ = run(config)
    assert [line["attention"] for line in lines(again)][3:] == ["bad"], "what failed is tried again, and nothing else"


def test_a_cut_off_line_is_dropped_and_does_not_join_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps({"key": "a", "status": "ok"})
    path.write_text(whole + "\n" + whole[:9])
    results = Results(path)
    assert set(results.records) == {"a"}
    results.add({"key": "b", "status": "ok"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_text(whole[:9] + "\n" + whole + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1 is not a result; repair it, or move the file away"):
        Results(path)


def test_a_killed_run_goes_on_where_it_was(llama, text, tmp_path):
    attentions = {"dense": None, **{f"local{size}": {**LOCAL, "window_size": size} for size in range(1, 9)}}
    settings = tree(llama, text, tmp_path / "out", attentions=attentions, bar=None)
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings))
    path = tmp_path / "out" / "results.jsonl"
    program = programs.start("-m", "attn_plugins", "compare", "--config", tmp_path / "compare.yaml")
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait().returncode == -signal.SIGKILL, "it ended before it could be killed"
    config = build(CompareConfig, settings)
    before = [json.loads(line)["key"] for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]
    assert 2 <= len(before) < 9
    results, said = run(config)
    assert said[0].startswith(f"{len(before)} of 9 cells are in")
    keys = [line["key"] for line in lines(results)]
    assert keys[: len(before)] == before
    assert sorted(keys) == sorted(cell.key for cell in cells(config)), "each cell ran once"


def test_a_fine_tune_that_counts_is_kept_and_another_begins_anew(llama, text, tmp_path, monkeypatch):
    saving = {**FINETUNE, "training": {**FINETUNE["training"], "save_strategy": "steps", "save_steps": 1}}
    changes = {"attentions": {"dense": None}, "bar": None, "untrained": False, "finetune": saving}
    config = build(CompareConfig, tree(llama, text, tmp_path / "out", **changes))
    results, _ = run(config)
    (first,) = lines(results)
    folder = Path(first["result"]["folder"])
    assert (folder / "checkpoint-2").exists()

    results.path.unlink()  # killed between the end of the fine-tune and the line that says so
    prepare = compare.prepare_finetune
    monkeypatch.setattr(compare, "prepare_finetune", None)
    results, _ = run(config)
    assert lines(results)[0]["result"] == first["result"]
    monkeypatch.setattr(compare, "prepare_finetune", prepare)

    def trained_anew(**options):
        (folder / "left").touch()
        results, _ = run(config, **options)
        last = lines(results)[-1]["result"]
        assert last["value"] == first["result"]["value"]
        assert last["train"]["resumed_from"] is None
        return not (folder / "left").exists()

    assert trained_anew(fresh=True)
    noted = json.loads((folder / "settings.json").read_text())
    noted["versions"]["attn_plugins"] = "0.0.1"
    (folder / "settings.json").write_text(json.dumps(noted))
    record = lines(results)[-1]
    results.add({**record, "versions": noted["versions"]})
    assert trained_anew(), "what another version has trained is no start for this one"
    assert not trained_anew()


def test_what_cannot_be_written_is_said_before_a_cell_is_measured(llama, text, tmp_path):
    (tmp_path / "file").touch()
    config = build(CompareConfig, tree(llama, text, tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match=r"output_dir='.*file/out': .*file is a file; allowed: a folder"):
        prepare_compare(config)


def test_two_runs_do_not_measure_into_one_file(llama, text, tmp_path, monkeypatch):
    config = build(CompareConfig, tree(llama, text, tmp_path / "out"))
    monkeypatch.setitem(compare._MEASURES, "evaluate", lambda *arguments: FIGURES)
    first, second = prepare_compare(config), prepare_compare(config)
    with (
        first.lock(),
        pytest.raises(ValueError, match=r"another run is measuring into .*results\.jsonl; wait until it ends, or"),
    ):
        run_compare(config, second)
    run_compare(config, first, say=lambda line: None)
    said = []
    run_compare(config, second, say=said.append)
    assert said[0].startswith("2 of 2 cells are in"), "what the first one has measured meanwhile is read"


def test_classification_is_compared_after_training(bert, labelled, tmp_path):
    changes = {
        "data": {"source": labelled},
        "evaluation": {"task": "accuracy"},
        "untrained": False,
        "bar": None,
        "finetune": {"task": "classification", "tune": "full", "max_length": 16, "training": QUICK},
        "speed": {"lengths": {"model": [16]}, "passes": ["forward"], "rounds": 1},
    }
    config = build(CompareConfig, tree(bert, labelled, tmp_path / "out", **changes))
    results, _ = run(config)
    assert {(line["measure"], line["status"]) for line in lines(results)} == {("finetune", "ok"), ("speed", "ok")}
    tables, _ = write_report(config, results)
    assert tables[0].header[2] == "accuracy"
    assert [row[1] for row in tables[0].rows] == ["fine-tuned", "fine-tuned"]


def test_a_fine_tune_may_be_the_file_of_one(text, tmp_path):
    file, evaluation = tmp_path / "train.yaml", {"task": "perplexity", "length": 16, "max_tokens": 64}
    own = {"model": "m", "attention": "local", "output_dir": "o", "seed": 7, "evaluate_before": True, "recall": True}
    file.write_text(yaml.safe_dump({**own, **FINETUNE, "data": {"source": text}, "evaluation": evaluation}))
    spelled = tree("model", text, "out", finetune=FINETUNE, evaluation=evaluation)
    named = {key: value for key, value in spelled.items() if key not in ("data", "evaluation")}
    named["finetune"] = str(file)
    assert cells(build(CompareConfig, named)) == cells(build(CompareConfig, spelled))

    other = {"data": {"source": text, "max_eval_rows": 3}, "evaluation": {"task": "perplexity", "length": 8}}
    config = build(CompareConfig, {**named, **other})
    assert (config.data.max_eval_rows, config.task.config.length) == (3, 8), "what stands here counts"

    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"finetune .*train.yaml is \[1\]; allowed: settings of a fine-tune"):
        build(CompareConfig, named)
    file.write_text(yaml.safe_dump({"data": {"sources": text}}))
    with pytest.raises(ValueError, match=r"unknown key 'sources' in .*train.yaml: data \(did you mean source"):
        build(CompareConfig, named)
    with pytest.raises(ValueError, match=r"cannot read finetune .*none.yaml: No such file"):
        build(CompareConfig, {**named, "finetune": "none.yaml"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": {}}, r"unknown key 'attention' \(did you mean attentions\?\)"),
        (
            {"models": {"a/b": "x", "a-b": "y"}},
            "models: the labels a/b, a-b give files of the same name; allowed: labels",
        ),
        ({"seeds": [0, 1, 0]}, r"seeds=\[0, 1, 0\]; allowed: each once"),
        ({"models": {}}, "models is empty; at least one is needed"),
        ({"baseline": "none"}, "baseline='none' is none of the attentions; allowed: dense, local"),
        ({"bar": "x"}, "bar='x' is none of the attentions"),
        ({"attentions": {"dense": {"type": "locl"}}, "bar": None}, r"attentions.dense: unknown attention 'locl'"),
        ({"data": None}, r"nothing is measured; allowed: any of data \(with untrained or finetune\), speed, memory"),
        ({"data": None, "finetune": FINETUNE}, "finetune needs data"),
        ({"finetune": {"model": "x"}}, "finetune.model is set for the whole comparison"),
        ({"finetune": {"block_sizes": 1}}, r"unknown key 'block_sizes' in finetune \(did you mean block_size\?\)"),
        ({"finetune": {"training": {"max_step": 1}}}, r"finetune: unknown key 'max_step' in training"),
        (
            {"evaluation": {"task": "accuracy"}, "finetune": FINETUNE},
            "evaluation.task='accuracy' is for classification",
        ),
        (
            {"speed": {"lengths": {"models": [8]}}},
            r"speed: lengths has the scopes \['models'\]; allowed: model, attention",
        ),
        ({"speed": {"lengths": {"model": [0]}}}, "speed: batch_size and lengths must be at least 1"),
        ({"speed": {"lengths": {"model": []}}}, "speed: passes and lengths must name at least one for each scope"),
        (
            {"speed": {"lengths": {"model": [8]}, "passes": {"attention": ["forward"]}}},
            r"speed: passes has the scopes \['attention'\]; allowed: those of lengths, \['model'\]",
        ),
        ({"speed": {"lengths": {"model": [8]}, "rounds": 0}}, "speed: rounds=0; allowed: at least 1"),
        ({"memory": {"lengths": {"model": [8]}, "passes": ["back"]}}, r"memory.passes\[0\]='back'; allowed: 'forward'"),
    ],
)
def test_a_wrong_config_is_refused(text, changes, message):
    with pytest.raises(ValueError, match=message):
        build(CompareConfig, tree("model", text, "out", **changes))


def test_what_shows_before_work_starts(llama, text, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such model folder: '/no/such'"):
        prepare_compare(build(CompareConfig, tree("/no/such", text, tmp_path / "out")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="compare measures time, so it runs in one process"):
        prepare_compare(build(CompareConfig, tree(llama, text, tmp_path / "out")))
    assert not Path(tmp_path / "out").exists()


def test_lengths_beyond_the_model_are_an_error_of_their_cell(llama, text, tmp_path):
    changes = {"untrained": False, "speed": {"lengths": {"attention": [16, 999]}, "rounds": 1, "passes": ["forward"]}}
    config = build(CompareConfig, tree(llama, text, tmp_path / "out", **changes))
    results, _ = run(config)
    assert [line["status"] for line in lines(results)] == ["ok", "error"] * 2
    tables, _ = write_report(config, results)
    assert tables[0].rows[0][2] == "error"
    assert "length 999; allowed: at most 128" in tables[-1].rows[0][1]
