"""Attentions at equal budget: every row keeps the bytes that it says, measured, and heads are really chosen."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, MambaConfig
from typer.testing import CliRunner

from attn_plugins import swap_attention
from attn_plugins.benchmark.compare.cost import bytes_of_cache
from attn_plugins.benchmark.suites.config import read_suite
from attn_plugins.benchmark.suites.presets import evaluated, read_preset, rows_for, sizes_of
from attn_plugins.cli import app
from attn_plugins.data.sources import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataConfig(source="text.jsonl")


def preset(**changes):
    return read_preset({"name": "equal_budget", **changes})


def chosen_by_hand(rules, groups, layers):
    """Stands for the choice, which is made elsewhere: as many heads or layers as it would keep, the first ones."""
    if not isinstance(rules, dict) or "choose" not in rules:
        return rules
    asked = rules["choose"]
    if asked["level"] == "layers":
        number = int(asked["budget"] * layers + 1e-9)
        return [{"type": "softmax", "layers": list(range(number))}, asked["attention"]]
    number = int(asked["budget"] * layers * groups + 1e-9)
    heads = {}
    for unit in range(number):
        heads.setdefault(unit // groups, []).append(unit % groups)
    return [{"type": "softmax", "kv_heads": heads}, asked["attention"]]


def test_every_row_keeps_the_bytes_of_its_budget(letters):
    folder, _ = letters
    length = 192
    asked = preset(length=length, budgets=[0.25, 0.5])
    rows = rows_for(asked, folder, "float32", DATA)
    model = AutoModelForCausalLM.from_pretrained(folder)
    dense = bytes_of_cache(model, length)
    assert dense == 5 * 2 * 2 * 8 * 4 * length
    shares = {}
    for label, rules in rows.attentions.items():
        if rules is not None:
            swap_attention(model, chosen_by_hand(rules, 2, 5))
            shares[label] = bytes_of_cache(model, length) / dense
    for share in asked.budgets:
        found = {label: its for label, its in shares.items() if label.endswith(f" {share * 100:g} %")}
        assert len(found) + sum(label.endswith(f" {share * 100:g} %") for label in rows.left_out) == len(asked.each)
        assert all(0.97 * share < its < 1.02 * share for its in found.values()), found
    assert list(rows.left_out) == ["chosen layers, 25 %"], "an eighth of five layers is none"
    assert "budget=0" in rows.left_out["chosen layers, 25 %"]
    assert "linear" in shares
    once = {label: its for label, its in shares.items() if not label.endswith("%")}
    assert max(once.values()) < 0.25, "constant, whatever the budget"


SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024}


def test_windows_of_the_model_count_with_what_they_keep(tmp_path):
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(**SIZES, num_hidden_layers=4, layer_types=kinds, sliding_window=128)
    model, length = AutoModelForCausalLM.from_config(config), 1024
    config.save_pretrained(tmp_path)
    asked = preset(length=length, budgets=[0.25])
    rows = rows_for(asked, str(tmp_path), "float32", DATA)
    dense = bytes_of_cache(model, length)
    for label in ("window + 4 sinks, 25 %", "blocks + 4 sinks, 25 %"):
        swap_attention(model, rows.attentions[label])
        assert 0.97 * 0.25 < bytes_of_cache(model, length) / dense < 1.02 * 0.25, label
    assert rows.attentions["dense"] is None
    assert "own mask (sliding_attention)" in rows.left_out["linear"], (
        "as a row that is not there, not as cells that fail"
    )
    assert "linear" not in rows.attentions


def test_layers_without_attention_do_not_count(tmp_path):
    kinds = ["conv", "conv", "full_attention"] * 2
    Lfm2Config(**SIZES, num_hidden_layers=6, layer_types=kinds).save_pretrained(tmp_path)
    sizes = sizes_of(str(tmp_path), "float32", 64)
    assert (sizes["layers"], sizes["heads"], sizes["kept"]) == (2, 4, 64)
    rows = rows_for(preset(budgets=[0.5]), str(tmp_path), "float32", DATA)
    assert "chosen heads, 50 %" in rows.attentions
    MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="mamba' has no layer that keeps keys and values; allowed: models with attent"):
        sizes_of(str(tmp_path / "mamba"), "float32", 64)


def test_rows_follow_the_model_and_the_precision(llama, letters):
    given = {"length": 96, "kept": 96}
    assert sizes_of(llama, "float32", 96) == {"layers": 2, "heads": 2, "head_dim": 8, "itemsize": 4, **given}
    assert sizes_of(letters[0], "bfloat16", 96) == {"layers": 5, "heads": 10, "head_dim": 8, "itemsize": 2, **given}
    single, half = (
        rows_for(preset(length=96, budgets=[0.5]), llama, dtype, DATA).attentions["linear_window, 50 %"]["window_size"]
        for dtype in ("float32", "bfloat16")
    )
    assert (single, half) == (48 - 4 - 9, 48 - 4 - 18), "sums are in float32 whatever keys are in"


def test_a_bar_stands_where_there_is_one_budget(llama):
    assert rows_for(preset(budgets=[0.5]), llama, "float32", DATA).bar == "window + 4 sinks, 50 %"
    assert rows_for(preset(budgets=[0.25, 0.5]), llama, "float32", DATA).bar is None


def test_a_suite_has_the_rows_of_each_model(llama, letters, tmp_path):
    shared = {"preset": {"name": "equal_budget", "budgets": [0.5]}, "data": {"source": letters[1]}}
    tree = {
        "name": "s",
        "output_dir": str(tmp_path),
        "shared": shared,
        "parts": {"words": {"evaluation": {"length": 16}}},
    }
    asked = read_suite(tree, {"a": llama, "b": letters[0]})
    assert [(part, list(config.models)) for part, config in asked.parts] == [("words", ["a"]), ("words", ["b"])]
    of_a, of_b = (config.attentions for _, config in asked.parts)
    assert "chosen heads, 50 %" in of_b
    assert "chosen heads, 50 %" not in of_a
    assert [(part, label) for part, label, _ in asked.left_out] == [("words", "a")] * 3
    assert asked.left_out[0][2].startswith("chosen heads, 50 %: ")
    mine = read_suite(tree, {"b": letters[0]}, {"mine": "block_local"}, "equal_budget")
    assert "mine" in mine.parts[0][1].attentions
    assert "window + 4 sinks, 10 %" in mine.parts[0][1].attentions, "the flag's preset, as its file has it"
    own = read_suite(tree, {"b": letters[0]}, {"mine": "block_local"})
    order = list(of_b)
    assert order[:2] == ["dense", "window + 4 sinks, 50 %"], "the bar stands below the model's own"
    assert order[-1] == "kimi_delta"
    assert list(own.parts[0][1].attentions) == ["dense", "mine"]


def test_the_command_line_chooses_heads_at_a_budget_and_shows_bytes_beside_quality(letters, tmp_path):
    folder, text = letters
    choose = {"attention": {"type": "local", "window_size": "{tokens // 2}"}, "budget": 0.5, "length": 256, "rows": 1}
    mine = {"budgets": [0.25], "length": 96, "once": {"dense": None}, "names": {"tokens": "share * length"}}
    mine |= {"each": {"heads, {tokens}": {"choose": choose}}, "baseline": "dense"}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(mine))
    tree = {"models": {"m": folder}, "data": {"source": text}, "cost": {"lengths": [96], "what": ["cache"]}}
    tree |= {"evaluation": {"length": 32, "max_tokens": 64}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    given = ["compare", "-c", str(tmp_path / "mine.yaml"), "--preset", str(tmp_path / "preset.yaml")]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {(line["attention"], line["measure"]): line for line in lines}
    assert {*found} == {(label, measure) for label in ("dense", "heads, 24") for measure in ("evaluate", "cost")}
    kept = found["heads, 24", "evaluate"]["result"]["rules"][0]["kv_heads"]
    assert sum(len(heads) for heads in kept.values()) == 5
    share = found["heads, 24", "cost"]["result"]["bytes"] / found["dense", "cost"]["result"]["bytes"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "cache MiB at 96" in report
    (row,) = [line for line in report.splitlines() if line.startswith("| heads, 24 |")][:1]
    assert row.endswith(f"| {share:.3f} |"), "the summary"
    assert f"({share:.3f})" in report


@pytest.mark.parametrize(
    ("expression", "value"),
    [("share * 8 // 1", 2), ("-(-layers // 4)", 2), ("max(1, min(layers, 3)) / 2", 1.5), ("1 + 2 - 3", 0)],
)
def test_expressions(expression, value):
    found = evaluated(expression, {"share": 0.25, "layers": 5})
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("shares", r"unknown name 'shares' in an expression; known: share"),
        ("share ** 2", r"'share \*\* 2' in an expression; allowed: numbers, names, \+ - \* / //, min and max"),
        ("open('x')", r"\"open\('x'\)\" in an expression; allowed"),
        ("share.real", r"'share.real' in an expression; allowed"),
        ("1 / 0", r"expression '1 / 0': division by zero"),
        ("1 +", r"expression '1 \+': invalid syntax"),
    ],
)
def test_wrong_expressions(expression, message):
    with pytest.raises(ValueError, match=message):
        evaluated(expression, {"share": 0.25})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("equal", r"preset='equal' \(did you mean equal_budget\?\); allowed: equal_budget, or a YAML file"),
        ({"budgets": [0.5]}, r"preset=\{'budgets': \[0.5\]\}; allowed: a name, a YAML file, or a mapping with name"),
        (
            {"name": "equal_budget", "budgets": [1.5]},
            r"preset equal_budget: budgets=\[1.5\]; allowed: at least one, eac",
        ),
        ({"name": "equal_budget", "length": 0}, r"preset equal_budget: length=0; allowed: at least 1"),
        ({"name": "equal_budget", "budget": 1}, r"unknown key 'budget' in preset equal_budget \(did you mean budgets"),
    ],
)
def test_wrong_presets(asked, message):
    with pytest.raises(ValueError, match=message):
        read_preset(asked)
