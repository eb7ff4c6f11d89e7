"""A suite: its parts are comparisons like any, in one file of results, each for the models that it is for."""

import json

import pytest
import yaml
from transformers import T5Config
from typer.testing import CliRunner

from attn_plugins.benchmark.compare import run as compare
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.run import all_cells, prepare_compare, run_compare
from attn_plugins.benchmark.suites.config import labelled, read_suite, suite_tree
from attn_plugins.benchmark.suites.kinds import unfit
from attn_plugins.benchmark.suites.report import write_suite_report
from attn_plugins.cli import app
from attn_plugins.config.shipped import CONFIGS, shipped_names
from attn_plugins.config.yaml import override, read_yaml
from attn_plugins.core.options import build

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}


def settings(text, **changes):
    parts = {
        "words": {"for": "decoder", "evaluation": {"length": 16, "max_tokens": 64}},
        "again": {"evaluation": {"length": 16, "max_tokens": 64}, "seeds": [0, 1]},
        "masked": {"for": "encoder", "evaluation": {"task": "masked-lm", "max_length": 16}},
        "cost": {"untrained": False, "speed": {"lengths": {"attention": [16]}, "passes": ["forward"], "rounds": 1}},
    }
    shared = {"attentions": {"dense": None, "local": LOCAL}, "bar": "local", "data": {"source": text}}
    return {"description": "Two words.", "shared": shared, "parts": parts, **changes}


def suite(tmp_path, tree, *assignments, **options):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    found = override(suite_tree(str(path)), [f"output_dir={tmp_path / 'out'}", *assignments])
    return read_suite(found, **options)


def run(asked, **options):
    results, said = prepare_compare(*(config for _, config in asked.parts)), []
    run_compare(asked.parts, results, say=said.append, **options)
    return results, said


def lines(results):
    return [json.loads(line) for line in results.path.read_text().splitlines()]


def test_a_whole_suite(llama, text, tmp_path):
    asked = suite(tmp_path, settings(text), models={"tiny": llama})
    assert [part for part, _ in asked.parts] == ["words", "again", "cost"]
    results, _ = run(asked)
    written = lines(results)
    assert {line["status"] for line in written} == {"ok"}
    found = [(line["part"], line["attention"], line["measure"], line["seed"]) for line in written]
    assert found == [
        *[("words", "dense", "evaluate", 0), ("words", "local", "evaluate", 0)],
        *[("again", "dense", "evaluate", 1), ("again", "local", "evaluate", 1)],  # seed 0 is a cell of words
        *[("cost", "dense", "speed", 0), ("cost", "local", "speed", 0)],
    ]
    alone = build(CompareConfig, {**dict_of(asked.parts[0][1]), "models": {"other": llama}})
    assert {cell.key for cell in cells(alone)} <= {line["key"] for line in written}, "keys are those of a comparison"

    tables, files = write_suite_report(asked, results)
    assert [table.title for table in tables] == [
        *["Summary", "Left out", "words: Quality", "again: Quality", "cost: Speed, attention layer"]
    ]
    summary, left = tables[:2]
    assert summary.header == ["attention", "words", "again", "attention layer at 16"]
    assert "words: perplexity, lower is better; " in summary.note
    assert "attention layer at 16: times as fast as dense, attention layer, forward, 16 tokens" in summary.note
    assert "still recalls what stood far away" in tables[2].note
    assert [row[0] for row in summary.rows] == ["dense", "local"]
    assert summary.rows[1][1] == f"{written[1]['result']['value']:.2f}"
    ratio = written[5]["result"]["passes"]["forward"]["times_as_fast"]
    assert summary.rows[1][3] == f"{ratio:.2f}x"
    assert left.rows == [["masked", "tiny", "it is of type llama, of which transformers has no masked-lm model"]]
    report = files[0].read_text()
    for said in ("# Suite mine", "Two words.", "## words", "### Quality", "## cost", "- Model tiny: "):
        assert said in report
    assert [file.name for file in files] == ["report.md", "cost_tiny_speed_vs_length.png"]

    results, said = run(asked)
    assert len(lines(results)) == len(written), "a second run runs nothing"
    assert said[0].startswith("6 of 6 cells are in")


def dict_of(config):
    return {"attentions": config.attentions, "evaluation": config.evaluation, "output_dir": "o"} | {
        "data": {"source": config.data.source}
    }


def test_a_killed_suite_goes_on_where_it_was(llama, text, tmp_path):
    asked = suite(tmp_path, settings(text), models={"tiny": llama})
    results = prepare_compare(*(config for _, config in asked.parts))
    with pytest.raises(KeyboardInterrupt):
        run_compare(asked.parts, results, say=lambda line: line.startswith("[4/6]") and raise_(KeyboardInterrupt))
    before = [line["key"] for line in lines(results)]
    assert len(before) == 3
    results, said = run(asked)
    assert said[0].startswith("3 of 6 cells are in")
    keys = [line["key"] for line in lines(results)]
    assert keys[:3] == before
    assert len(set(keys)) == len(keys) == 6


def raise_(error):
    raise error


def test_the_command_line_chooses_models_attentions_and_settings(llama, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings(text)))
    given = ["compare", "--suite", str(path), "-m", f"a={llama}", "-a", "{type: local, window_size: 3}"]
    given += [
        "-s",
        "parts.again=null",
        "-s",
        "parts.cost=null",
        "-s",
        "parts.words.seeds=[3]",
        "-o",
        str(tmp_path / "o"),
    ]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 0, ran.output
    written = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [(line["model"], line["attention"], line["seed"]) for line in written] == [
        *[("a", "dense", 3), ("a", "{type: local, window_size: 3}", 3)]
    ]
    assert "Summary" in ran.output
    assert "report.md" in ran.output


def test_what_is_misspelled_on_the_command_line_of_a_suite_changes_nothing(llama, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings(text)))
    given = ["compare", "--suite", str(path), "-m", llama, "-o", str(tmp_path / "o")]
    for more, said in (
        (
            ["-s", "parts.word=null"],
            "error: unknown key 'word' in parts of suite mine (did you mean words?); allowed: again",
        ),
        (["-s", "parts=1"], "error: parts is 1; allowed: a mapping of settings of a comparison"),
        (
            ["--report"],
            f"error: --report of {tmp_path / 'o' / 'results.jsonl'}, which has no results; allowed: a folder",
        ),
    ):
        ran = CliRunner().invoke(app, [*given, *more])
        assert (ran.exit_code, ran.stderr[: len(said)]) == (2, said)
    assert not (tmp_path / "o").exists()


def test_a_comparison_takes_models_and_attentions_from_the_command_line_too(llama, text, tmp_path):
    tree = {"models": {"m": "none"}, "attentions": {"dense": None, "local": LOCAL}, "bar": "local"}
    tree |= {"data": {"source": text}, "evaluation": {"length": 16, "max_tokens": 64}}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(tree))
    given = ["compare", "-c", str(path), "-m", llama, "-a", "block_local", "-o", str(tmp_path / "o")]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 0, ran.output
    written = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [line["attention"] for line in written] == ["dense", "block_local"]
    assert "part" not in written[0]


def test_a_part_may_be_a_file_and_says_what_it_wants_otherwise(text, llama, tmp_path):
    own = {"models": {"own": llama}, "attentions": {"dense": None, "one": "local"}, "bar": "one", "seeds": [5]}
    own |= {"data": {"source": text}, "evaluation": {"length": 8}, "output_dir": "elsewhere"}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(own))
    parts = {"plain": str(tmp_path / "one.yaml"), "other": {"file": str(tmp_path / "one.yaml"), "seeds": [6]}}
    asked = suite(tmp_path, settings(text, parts=parts))
    (_, plain), (_, other) = asked.parts
    assert (plain.seeds, other.seeds) == ([5], [6])
    assert list(plain.attentions) == ["dense", "one"]
    assert plain.bar == other.bar == "one"
    assert plain.output_dir == other.output_dir == str(tmp_path / "out")
    assert plain.models == {"own": llama}


def test_parts_are_for_models_of_their_kind(llama, bert, text, tmp_path):
    asked = suite(tmp_path, settings(text), models={"bert": bert, "llama": llama})
    assert {part: list(config.models) for part, config in asked.parts} == {
        "words": ["llama"],
        "again": ["bert", "llama"],  # which says nothing of a kind: transformers has decoders of BERT's type
        "masked": ["bert"],
        "cost": ["bert", "llama"],
    }
    assert asked.left_out == [
        ("words", "bert", "it is no decoder: its attention is that of encoder"),
        ("masked", "llama", "it is of type llama, of which transformers has no masked-lm model"),
    ]


def test_a_model_with_more_roles_is_of_another_kind(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    T5Config(**sizes, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    assert unfit(str(tmp_path), "text-to-text", None) is None
    assert unfit(str(tmp_path), "text-to-text", "encoder-decoder") is None
    why = unfit(str(tmp_path), "text-to-text", "decoder")
    assert why == "it is no decoder: its attention is that of cross, decoder, encoder"


def test_models_of_a_part_that_is_over_are_let_go(llama, text, tmp_path, monkeypatch):
    seen = []

    def measure(config, cell, models):
        assert not any(other.loaded for other in seen if other is not models)
        seen.append(models)
        models.loaded["a model", "", 0] = None
        return {"metric": "perplexity", "better": "lower", "value": 1.0, "figures": {}, "attention": {"new_params": 0}}

    monkeypatch.setitem(compare._MEASURES, "evaluate", measure)
    results, _ = run(suite(tmp_path, settings(text), "parts.cost=null", models={"tiny": llama}))
    assert {line["status"] for line in lines(results)} == {"ok"}
    assert len({id(models) for models in seen}) == 2


def test_recall_is_not_said_to_be_missing_where_another_part_measures_it(letters, tmp_path):
    folder, text = letters
    parts = {"words": {"evaluation": {"length": 16, "max_tokens": 32}}}
    parts["passkey"] = {"evaluation": {"task": "passkey", "distances": [256], "rows": 1}}
    shared = {"attentions": {"dense": None, "local": LOCAL}, "data": {"source": text}}
    shared["cost"] = {"lengths": [16], "what": ["cache"]}
    asked = suite(tmp_path, {"parts": parts, "shared": shared}, models={"tiny": folder})
    results, _ = run(asked)
    tables, _ = write_suite_report(asked, results)
    assert [table.title for table in tables] == ["Summary", "words: Quality", "passkey: Quality"], (
        "no table for a column"
    )
    assert tables[0].header == ["attention", "words", "passkey", "cache at 16"], "costs stand after quality"
    assert tables[0].rows[0][-1] == "1.000"
    assert "recalls" not in tables[1].note


def test_costs_are_a_column_of_all_parts_that_ask_for_them_and_tables_say_of_which_model(llama, letters, tmp_path):
    cost = {"untrained": False, "cost": {"lengths": [16], "what": ["cache"]}}
    ours = {"dense": None, "local": LOCAL}
    parts = {"one": {**cost, "models": {"a": llama}, "attentions": ours}}
    late = {**ours, "late": {"type": "linear", "feature_map": "elu"}}
    parts["two"] = {**cost, "models": {"b": letters[0]}, "attentions": late}
    parts["at a budget"] = {**cost, "models": {"a": llama, "b": letters[0]}}
    parts["at a budget"]["preset"] = {"name": "equal_budget", "budgets": [0.5], "length": 96}
    asked = suite(tmp_path, {"parts": parts, "shared": {"data": {"source": letters[1]}}})
    results = prepare_compare(*(config for _, config in asked.parts))
    for cell in all_cells(asked.parts):
        figures = {"result": {"bytes": {"dense": 100, "late": 30}.get(cell.attention, 50)}}
        record = {"key": cell.key, **cell.labels, "settings": cell.settings, "status": "ok", "seconds": 1.0}
        results.add(record | figures)
    summary, *tables = write_suite_report(asked, results)[0]
    assert summary.header == ["model", "attention", "cache at 16"]
    rows = [["a", "dense", "1.000"], ["a", "local", "0.500"], ["b", "dense", "1.000"], ["b", "local", "0.500"]]
    assert [row for row in summary.rows if row[1] in ours] == rows
    assert ["b", "late", "0.300"] in summary.rows
    report = results.path.with_name("report.md").read_text()
    for model in ("a", "b"):
        assert f"### Cost at 16 tokens, {model}\n" in report
        assert f"at a budget: Cost at 16 tokens, {model}" in [table.title for table in tables]


def test_a_preset_of_the_command_line_takes_the_place_of_what_goes_with_attentions(llama, text, tmp_path):
    own = {"untrained": False, "transfer": {"steps": 1}, "transfer_of": ["mine"], "data": {"source": text}}
    own |= {"attentions": {"dense": None, "mine": "linear"}, "baseline": "mine", "bar": "mine"}
    tree = {"name": "s", "output_dir": str(tmp_path), "parts": {"words": own}}
    ((_, config),) = read_suite(tree, {"tiny": llama}, preset="equal_budget").parts
    assert (config.baseline, config.bar, config.transfer_of) == ("dense", None, None)


def test_a_suite_may_be_of_others(llama, text, tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**settings(text), "models": {"a": llama}}, sort_keys=False))
    parts = {"own": {"attentions": {"dense": None}, "data": {"source": text}, "evaluation": {"length": 8}}}
    whole = {"suites": [str(tmp_path / "one.yaml")], "parts": parts, "models": {"b": llama}}
    asked = suite(tmp_path, whole, "parts.one: again=null", "parts.one: words.seeds=[4]")
    assert [(part, list(config.models)) for part, config in asked.parts] == [
        *[("one: words", ["a"]), ("one: cost", ["a"]), ("own", ["b"])]
    ]
    words, cost, own = (config for _, config in asked.parts)
    assert (words.seeds, words.bar, list(words.attentions)) == ([4], "local", ["dense", "local"])
    assert (cost.untrained, own.data.source) == (False, text)
    assert {config.output_dir for _, config in asked.parts} == {str(tmp_path / "out")}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"suites": [str(tmp_path / "mine.yaml")]}))
    with pytest.raises(ValueError, match="suites name each other in a ring: mine, one, mine"):
        suite(tmp_path, whole)


def test_models_from_scratch_stay_and_others_give_way(llama, text, tmp_path):
    new = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    new |= {"num_attention_heads": 2, "intermediate_size": 16}
    task = {"tune": "full", "task": "associative-recall", "options": {"length": 16, "vocab_size": 64, "pairs": [2]}}
    scratch = {
        "models": {"new": new},
        "attentions": {"dense": None},
        "untrained": False,
        "data": None,
        "finetune": task,
    }
    words = {"models": {"old": "./nowhere"}, "evaluation": {"length": 16, "max_tokens": 64}}
    tree = settings(text, parts={"pairs": scratch, "words": words})
    asked = suite(tmp_path, tree, models={"tiny": llama})
    assert [(part, list(config.models)) for part, config in asked.parts] == [("pairs", ["new"]), ("words", ["tiny"])]
    own = suite(tmp_path, tree)
    assert [part for part, _ in own.parts] == ["pairs"]
    assert own.left_out == [("words", "old", "no such model folder: './nowhere'")], "the others are still of use"
    with pytest.raises(ValueError, match=r"no such model folder: './none'"):
        suite(tmp_path, tree, models={"asked": "./none"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {}}, r"parts=\{\}; allowed: a mapping of names to comparisons, at least one"),
        ({"part": 1}, r"unknown key 'part' in .*mine.yaml \(did you mean parts\?\)"),
        ({"parts": {"a": 1}}, r"parts.a is 1; allowed: a mapping of settings of a comparison"),
        ({"models": ["a"]}, r"parts.words.models=\['a'\]; allowed: a mapping of labels to models"),
        ({"suites": "quick"}, r"suites='quick'; allowed: a list of names or YAML files"),
        ({"suites": ["quik"]}, r"suite='quik' \(did you mean quick\?\); allowed: "),
        ({"shared": [1]}, r"shared is \[1\]; allowed: a mapping of settings"),
        (
            {"parts": {"a": {"for": "decoders"}}},
            r"parts.a.for='decoders' \(did you mean decoder\?\); allowed: ",
        ),
        ({"parts": {"a": {"seeds_": 1}}}, r"unknown key 'seeds_' in parts.a \(did you mean seeds\?\)"),
        ({"parts": {"a": {"bar": "b"}}}, r"parts.a: bar='b' is none of the attentions; allowed: dense, local"),
        ({"parts": {"a": {"file": "no.yaml"}}}, r"cannot read parts.a no.yaml: No such file"),
        ({"parts": {"a": None}}, r"suite 'mine' has no part for these models \(it has none at all\)"),
        (
            {"parts": {"a": {"for": "encoder"}}},
            r"suite 'mine' has no part for these models \(a, tiny: it is no encoder: its attention is that of dec",
        ),
    ],
)
def test_what_is_wrong_in_a_suite(llama, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        suite(tmp_path, settings(text, **changes), models={"tiny": llama})


def test_a_suite_without_models_asks_for_them(text, tmp_path):
    with pytest.raises(ValueError, match=r"parts.words names no models; give them: --model NAME, or --model LABEL=N"):
        suite(tmp_path, settings(text))


def test_suites_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quick" in shipped_names("suites")
    assert suite_tree("quick")["output_dir"] == "runs/suites/quick"
    assert read_yaml("configs/compare/demo.yaml") == read_yaml(CONFIGS / "compare" / "demo.yaml")
    (tmp_path / "configs" / "compare").mkdir(parents=True)
    (tmp_path / "configs" / "compare" / "demo.yaml").write_text("mine: 1")
    assert read_yaml("configs/compare/demo.yaml") == {"mine": 1}, "what is there counts"
    (tmp_path / "configs" / "compare" / "scratch").mkdir()
    (tmp_path / "configs" / "compare" / "scratch" / "listops.yaml").write_text("mine: 1")
    assert read_suite(suite_tree("long")).parts[0][1].finetune["task"] == "listops", "a suite is that of the package"
    with pytest.raises(ValueError, match=r"suite='quik' \(did you mean quick\?\); allowed: .*quick.*, or a YAML file"):
        suite_tree("quik")
    with pytest.raises(ValueError, match=r"cannot read configs/compare/no.yaml: No such file"):
        read_yaml("configs/compare/no.yaml")


def test_labels_of_models():
    assert labelled(["a=b/c", "x/y", "/tmp/folder/"]) == {"a": "b/c", "y": "x/y", "folder": "/tmp/folder/"}
    with pytest.raises(ValueError, match=r"--model 'z/y': 'y' is the label of 'x/y'; write LABEL=z/y"):
        labelled(["x/y", "z/y"])
    with pytest.raises(ValueError, match=r"--model '=y'; allowed: a folder, a name, or label=these"):
        labelled(["=y"])
