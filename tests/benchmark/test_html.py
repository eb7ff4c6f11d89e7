"""report.html: what stands in it is what the records say; nothing is left out; one file is all there is."""

import itertools
import json
import re
import shlex
import shutil

import compared
import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.html.command import command
from attn_plugins.benchmark.html.figures import _framed, _kind_map, figures_of, front
from attn_plugins.benchmark.html.groups import family, groups_of
from attn_plugins.benchmark.html.noise import beside
from attn_plugins.benchmark.html.page import context, write_run_page
from attn_plugins.benchmark.html.runs import PLAN, read_run, write_plan
from attn_plugins.benchmark.html.summary import summary_of
from attn_plugins.benchmark.results.store import Results
from attn_plugins.cli import app
from attn_plugins.config.yaml import override
from attn_plugins.core.options import build
from attn_plugins.training.evaluate import attention_summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compared") / "run"
    compared.write_run(made)
    return made


@pytest.fixture(scope="module")
def group(folder):
    (made,) = groups_of(read_run(str(folder)), False)
    return made


def row(group, attention, stage="fine-tuned"):
    (found,) = [one for one in group.rows if (one.attention, one.stage) == (attention, stage)]
    return found


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_row_is_the_mean_of_its_seeds_with_its_standard_error(group):
    figure = row(group, "window").figure
    assert figure.mean == pytest.approx(12 * 0.8 + 0.02 / 3)
    spread = sum((noise - 0.02 / 3) ** 2 for noise in compared.NOISE.values()) / 2
    assert figure.error == pytest.approx((spread / 3) ** 0.5)
    assert str(figure) == "9.61 ± 0.064"
    assert row(group, "window").others["passkey"].mean == 0.625
    assert (group.baseline, group.bar, group.metric, group.lower) == ("dense", "window", "perplexity", True)


def test_failed_cells_and_those_that_have_not_run_are_rows(group):
    assert {one.status for one in group.rows if one.attention == "broken"} == {"failed"}
    assert row(group, "broken").note == "ValueError: layers=7 is out of range"
    assert {one.status for one in group.rows if one.attention == "late"} == {"not run"}
    assert [one.stage for one in group.rows if one.attention == "broken"] == ["untrained", "fine-tuned", "costs"]
    assert len(row(group, "broken", "costs").records) == len(row(group, "late", "costs").missing) == 2 + 2 + 1 + 1
    assert row(group, "window").status == "ok"
    said = summary_of(group)["sentences"]
    assert "Failed: broken (untrained, fine-tuned, costs)." in said
    assert "Not run yet: late (untrained, fine-tuned, costs)." in said


def test_a_row_with_a_figure_says_which_of_its_seeds_are_missing(tmp_path):
    _, results = compared.write_run(tmp_path)
    lines = results.path.read_text().splitlines(keepends=True)
    cut = [line for line in lines if not ('"window"' in line and '"finetune"' in line and '"seed": 2' in line)]
    assert len(cut) == len(lines) - 1
    results.path.write_text("".join(cut))
    (found,) = groups_of(read_run(str(tmp_path)), False)
    assert row(found, "window").note == "of 3 seeds, 1 not run"
    assert row(found, "window").status == "ok"


def test_differences_within_the_noise_are_said_to_be(group):
    worse = beside(row(group, "window"), row(group, "dense"), lower=True)
    assert (worse.verdict, str(worse)) == ("unknown", "~ \u221220.0 %"), "seeds shift both alike"
    noisy = row(group, "window")
    noisy.results[0]["value"] -= 3
    try:
        assert beside(noisy, row(group, "dense"), lower=True).verdict == "noise"
        assert str(beside(noisy, row(group, "dense"), lower=True)).startswith("≈ ")
    finally:
        noisy.results[0]["value"] += 3
    noisy.results[0]["value"] -= 0.01
    try:
        assert beside(noisy, row(group, "dense"), lower=True).verdict == "worse"
        assert beside(noisy, row(group, "dense"), lower=False).verdict == "better"
    finally:
        noisy.results[0]["value"] += 0.01


def test_the_summary_names_the_best_within_each_budget_and_what_beats_the_bar(group):
    said = summary_of(group)
    best, other = "dense, fine-tuned, 8.01 ± 0.064", "chosen, fine-tuned, 8.41 ± 0.064 (~ \u22125.0 %)"
    assert said["lead"] == f"Best perplexity: {best}; the best other is {other}."
    bar = next(sentence for sentence in said["sentences"] if sentence.startswith("The bar is window, untrained"))
    assert "Better: window (fine-tuned); chosen (untrained, fine-tuned)." in bar
    assert "Not better: <b>odd</b> (untrained, fine-tuned)." in bar
    budgets = {one[0]: one[1] for one in said["budgets"]}
    assert budgets == {
        "at most 50 % of the cache": "chosen, fine-tuned",
        "at most 25 % of the cache": "window, fine-tuned",
        "at most 50 % of the peak memory": "chosen, fine-tuned",
        "at most 25 % of the peak memory": "window, fine-tuned",
        "at least 2 times as fast": "chosen, fine-tuned",
        "at least 3 times as fast": "window, fine-tuned",
        "at least 2 times as fast, a token": "chosen, fine-tuned",
        "at least 3 times as fast, a token": "window, fine-tuned",
    }


@pytest.mark.parametrize("lower", [True, False])
def test_the_front_is_what_nothing_beats_in_both(lower):
    points = [(float(n * 7 % 11), float(n * 5 % 13)) for n in range(20)]

    def beaten(point, other):
        good = other[1] <= point[1] if lower else other[1] >= point[1]
        return other != point and other[0] <= point[0] and good

    alone = sorted({point for point in points if not any(beaten(point, other) for other in points)})
    assert [points[number] for number in front(points, lower)] == alone


def test_figures_hold_what_was_measured(group):
    found = {(one["section"], one["title"]): one for one in figures_of(group)}
    assert [title for section, title in found if section == "cost"] == [
        *["perplexity against time", "perplexity against time of a token"],
        *["perplexity against peak memory", "perplexity against cache"],
    ]
    cost = found["cost", "perplexity against time"]
    points = {trace["name"]: (trace["x"][0], trace["y"][0]) for trace in cost["data"][1:]}
    assert points["window, fine-tuned"] == (1 / 4, pytest.approx(9.607, abs=0.001))
    assert "On the front, cheapest first: window (fine-tuned), then chosen (fine-tuned), then dense" in cost["caption"]
    assert "Above the frame: <b>odd</b>" in cost["caption"]
    curves = {title for section, title in found if section == "curves"}
    assert curves == {
        *["perplexity by position", "passkey by distance", "copy by distance"],
        *["speed by length", "peak memory by length"],
    }
    (line,) = [one for one in found["curves", "copy by distance"]["data"] if one["name"] == "chosen, untrained"]
    assert (line["x"], line["y"]) == ([8, 16], [0.75, 0.5])
    scores = found["maps", "chosen: scores, and what keeps full attention"]
    assert scores["data"][0]["z"] == [[0, 1, 2], [0.5, 1.5, 2.5]]
    assert scores["data"][0]["text"] == [["", "", "●"], ["", "", "●"]]
    kinds = found["maps", "window: which attention serves which head"]
    assert kinds["data"][0]["text"] == [["local", "local", "own (sdpa)"], ["local", "softmax", "own (sdpa)"]]
    losses = found["training", "loss in training, fine-tuned"]
    assert len(losses["data"]) == 4 * 3
    assert losses["data"][0]["x"] == [1, 2, 3, 4]


def test_an_axis_shows_what_lies_together_and_names_what_does_not(group):
    lines = [(row(group, "dense"), [10.0, 11.0]), (row(group, "chosen"), [12.0]), (row(group, "window"), [5000.0])]
    axis, said = _framed(lines, lower=True)
    assert axis["range"][0] < 10
    assert 12 < axis["range"][1] < 15
    assert said == "Above the frame: window (fine-tuned, 5000.00)."
    assert _framed(lines, lower=False) == ({}, "")
    wide = [(row(group, "dense"), [10.0]), *[(row(group, "chosen"), [400.0, 900.0])] * 2]
    axis, said = _framed(wide, lower=True)
    assert (axis["type"], said) == ("log", ""), "else the best would lie on each other"
    assert axis["ticktext"] == ["10", "20", "50", "100", "200", "500", "1000"]


def again_of(cell):
    """The cells of the command that measures this one again."""
    words = shlex.split(command({"settings": cell.settings, **cell.labels}))
    assert words[:2] == ["attn-plugins", "compare"]
    sets = [word for before, word in itertools.pairwise(words) if before == "--set"]
    return cells(build(CompareConfig, override({"output_dir": "x"}, sets)))


def test_the_command_of_a_cell_is_of_that_cell_alone(tmp_path):
    given = compared.config(
        tmp_path,
        transfer={"steps": 3, "length": 16},
        transfer_of=["<b>odd</b>"],
        attentions={
            "dense": None,
            "chosen": compared.CHOSEN,
            "<b>odd</b>": {"type": "linear", "feature_map": "hedgehog"},
        },
        bar=None,
    )
    measures = set()
    for cell in cells(given):
        again = again_of(cell)
        assert cell.key in {one.key for one in again}, cell
        others = {one.measure for one in again if one.key != cell.key}
        assert others <= ({"transfer"} if cell.measure == "finetune" else {cell.measure}), "as little else as can be"
        measures.add(cell.measure)
    assert measures == {"evaluate", "transfer", "finetune", "speed", "memory", "cost"}
    other = compared.config(
        tmp_path,
        evaluation={},
        attentions={"dense": None},
        bar=None,
        finetune={"task": "masked-lm", "options": {"max_length": 8}, "training": {"max_steps": 4}},
    )
    for cell in cells(other):
        assert cell.key in {one.key for one in again_of(cell)}, cell
    assert command({"settings": {"length": 3}, "measure": "bench", "attention": "local"}) is None


def test_the_page_is_one_file_and_its_data_can_be_read(folder):
    config = compared.config(folder)
    page = write_run_page([(None, config)], Results(folder / "results.jsonl"))
    text = page.read_text(encoding="utf-8")
    outside, library = re.compile(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(["']?http"""), "plotly.js v"
    own = text[: text.index(library)] + text[text.index('"use strict";\n(() => {') :]
    assert outside.search(own) is None
    assert text.count(library) == 1
    assert "<b>odd</b>" not in own, "labels are text"
    assert "&lt;b&gt;odd&lt;/b&gt;" in own
    data = data_of(text)
    assert len(data["rows"]) == 6 * 2 + 2
    assert {key for its in data["rows"] for key in its["cells"]} <= set(data["cells"])
    told = data["cells"][
        next(key for its in data["rows"] if its["title"] == "broken, untrained" for key in its["cells"])
    ]
    assert told["log"] == "Traceback: here"
    assert ["Reason", "ValueError: layers=7 is out of range"] in told["facts"]
    assert "48 of 72 cells measured" in text
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["<b>odd</b>", "dense"])
def test_figures_that_are_not_finite_do_not_break_the_page(name, tmp_path):
    config, results = compared.write_run(tmp_path)
    for record in list(results.records.values()):
        if record["attention"] == name and record["measure"] == "finetune":
            result = {
                **record["result"],
                "value": float("inf"),
                "train": {"losses": [{"step": step, "loss": float("nan")} for step in (1, 2)]},
            }
            results.add({**record, "result": result})
    text = write_run_page([(None, config)], Results(results.path)).read_text(encoding="utf-8")
    data_of(text.replace("NaN", "!").replace("Infinity", "!"))
    (found,) = groups_of(read_run(str(tmp_path)), False)
    assert [one.attention for one in found.ranked][-1] == "<b>odd</b>"
    assert row(found, name) not in found.ranked


def test_labels_are_text_to_plotly_too(tmp_path):
    _, results = compared.write_run(tmp_path)
    for record in list(results.records.values()):
        if record["attention"] == "<b>odd</b>" and "value" in record.get("result", {}):
            results.add(
                {**record, "result": {**record["result"], "value": 1.0}}
            )  # on the front, where points are named
    (found,) = groups_of(read_run(str(tmp_path)), False)
    told = [text for figure in figures_of(found) for one in figure["data"] for text in one.get("text", [])]
    assert "&lt;b>odd&lt;/b>" in told
    assert "<b>odd</b>" not in told


def test_a_map_of_layers_with_other_numbers_of_heads():
    (drawn,) = _kind_map("some", [["local", "softmax"], ["own (sdpa)"], ["local", "local", "softmax"]])["data"]
    assert drawn["text"] == [
        ["local", "own (sdpa)", "local"],
        ["softmax", "own (sdpa)", "local"],
        ["", "own (sdpa)", "softmax"],
    ]
    assert drawn["z"][2][0] is None


def test_a_folder_may_have_an_equals_sign_in_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "lr=0.1")
    assert read_run(str(tmp_path / "lr=0.1")).label == "lr=0.1"


def test_runs_are_told_apart_and_read_without_a_plan(folder, tmp_path):
    compared.write_run(tmp_path / "run")
    (tmp_path / "run" / PLAN).unlink()
    runs = [read_run(str(folder)), read_run(str(tmp_path / "run")), read_run(f"mine={tmp_path}/run/results.jsonl")]
    shown = context(runs)
    assert shown["groups"] == ["run · tiny", "run 2 · tiny", "mine · tiny"]
    assert [filter[0] for filter in shown["filters"]] == ["run", "stage", "family", "state"]
    assert all(one["baseline"] == "dense" for one in shown["summaries"])
    assert not any("late" in repr(one["by"]) for one in shown["rows"][-8:])


def test_a_cell_of_several_parts_is_a_row_of_each(tmp_path):
    config, _ = compared.write_run(tmp_path)
    write_plan(tmp_path, [("one", config), ("two", config)])
    found = groups_of(read_run(str(tmp_path)), False)
    assert [one.label for one in found] == ["one · tiny", "two · tiny"]
    assert row(found[0], "window").figure == row(found[1], "window").figure


def test_quality_and_cost_of_a_suite_are_held_against_each_other(tmp_path):
    config, _ = compared.write_run(tmp_path)
    none = dict.fromkeys(("speed", "memory", "cost"))
    words = compared.config(tmp_path, **none)
    write_plan(tmp_path, [("words", words), ("cost", compared.config(tmp_path, untrained=False, finetune=None))])
    found = groups_of(read_run(str(tmp_path)), False)
    assert [one.label for one in found] == ["words · tiny", "cost · tiny"]
    titles = [[figure["title"] for figure in figures_of(one) if figure["section"] != "training"] for one in found]
    assert "perplexity against time" in titles[0]
    assert "speed by length" not in titles[0], "it stands where it was measured"
    assert titles[1] == ["speed by length", "peak memory by length"]
    assert summary_of(found[1])["lead"].startswith(
        "Fastest: window, 4.00 times as fast as dense (attention layer, forward"
    )
    attentions = {"dense": None, "window": {**compared.LOCAL, "window_size": 5}}
    other = compared.config(tmp_path, attentions=attentions, **none)
    write_plan(tmp_path, [("words", words), ("other", other), ("cost", config)])
    lent = groups_of(read_run(str(tmp_path)), False)[1].lent["speed"]
    assert list(lent) == ["dense"], "another window has the label"


def test_families_are_those_of_the_registry():
    assert family(None) == "own"
    assert family([{"type": "local"}, {"type": "linear"}]) == "local + linear"
    assert family(compared.CHOSEN) == "local"
    assert family([{"type": "of a package that is not installed"}]) == "of a package that is not installed"


def test_a_model_of_several_attentions_tells_which_serves_which_head():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    config.attn_plugin = [{"type": "softmax", "layers": 0, "kv_heads": [1]}, {"type": "local", "layers": [0, 2]}]
    summary = attention_summary(LlamaForCausalLM(config))
    assert summary["map"] == {"decoder": [["local", "softmax"], ["own (sdpa)"], ["local"]]}
    assert "map" not in attention_summary(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no nowhere; allowed: the output_dir of a comparison, or its results.jsonl"),
        (["{empty}"], "holds no result of a comparison"),
        (["{run}", "-o", "page.pdf"], "--output page.pdf; allowed: a file that ends in .html"),
        (["{damaged}"], "plan.json is not what a comparison wrote"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, words, message):
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text('{"key": "a", "status": "ok"}\n')
    (tmp_path / "damaged" / PLAN).write_text('{"cells": [3]}')
    places = {"run": folder, "empty": tmp_path / "empty", "damaged": tmp_path / "damaged"}
    ran = CliRunner().invoke(app, ["report", *(word.format(**places) for word in words)])
    assert ran.exit_code == 2
    assert message in ran.output
