"""What a layer starts on a device that is not a CPU: counted, held against the bars, and shown."""

import json

import pytest
from torch._subclasses.fake_tensor import DataDependentOutputException
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.cost import launches
from attn_plugins.benchmark.cost.launches import LaunchesConfig, LayerCounts, count_layer, run_launches, served
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.core.rules import parse_rules

HEADS = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=4, value_dim=4, hidden_size=8, layer=0)
NARROW = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=2, value_dim=2, hidden_size=4, layer=0)
"""As narrow as can be: what heads hold changes no count."""
SMALL = {"lengths": [64, 128], "packed_length": 50, "num_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


@pytest.mark.of_the_registry
@pytest.mark.parametrize("name", list_attentions())
def test_the_form_for_other_devices_is_within_the_bars(name):
    """Operations and syncs of a layer and of the tables of a mask, at 1k and 4k tokens, plain and packed."""
    (rule,) = build(LaunchesConfig, {"attentions": {name: name}, "lengths": [4096]}).rules().values()
    squared = launches.quadratic(rule.attention)
    above = []
    for packed_length in (0, 1000) if rule.attention.segments else (0,):
        shorter = None
        for length in (256, 1024, 4096) if squared else (1024, 4096):  # the first of all pairs has values
            found = count_layer(rule, NARROW, length, packed_length=packed_length)
            what = "packed" if packed_length else "plain"
            above += [f"{length}, {what}: {line}" for line in found.exceeds(shorter=shorter, quadratic=squared)]
            shorter = found
    assert above == []


def test_all_pairs_of_many_tokens_are_counted_without_values(monkeypatch):
    (rule,) = parse_rules("topk", backend="batched")
    want = count_layer(rule, HEADS, 64)
    monkeypatch.setattr(launches, "ALL_PAIRS", 32)
    assert count_layer(rule, HEADS, 64) == want
    attend = get_attention("topk").attend_batched
    monkeypatch.setattr(
        get_attention("topk"), "attend_batched", lambda s, q, *a, **o: attend(s, q * int(q.sum()), *a, **o)
    )
    with pytest.raises(DataDependentOutputException):
        count_layer(rule, HEADS, 64)


def counts(**changes):
    none = {"forward": 9, "forward_backward": 20, "tables": 0, "syncs": {}, "syncs_of_tables": {}}
    return LayerCounts(**{"length": 16384, "packed": False, **none, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forward_backward": 700}, None),
        ({"forward_backward": 701}, "701 operations, more than 700"),
        ({"tables": 301}, "301 operations for the tables of a mask, more than 300"),
        ({"syncs": {"item at a.py:1": 2}}, "2 syncs: 2 x item at a.py:1"),
        ({"syncs_of_tables": {"item at a.py:1": 5}}, None),
        ({"syncs_of_tables": {"item at a.py:1": 6}}, "6 syncs for the tables of a mask, more than 5"),
    ],
)
def test_what_is_above_the_bars_is_told(changes, says):
    above = counts(**changes).exceeds()
    assert len(above) == (says is not None)
    assert says is None or says in above[0]


def test_growth_is_held_against_the_bar_unless_the_cost_is_quadratic():
    short, long = counts(length=4096, forward_backward=200), counts(forward_backward=261)
    assert counts(forward_backward=260).exceeds(shorter=short) == []
    (above,) = long.exceeds(shorter=short)
    assert above == "261 operations at 16384 tokens, more than 1.3 times the 200 at 4096"
    assert long.exceeds(shorter=short, quadratic=True) == []
    assert counts(forward_backward=700 + 256).exceeds(quadratic=True) == []
    assert counts(forward_backward=700 + 257).exceeds(quadratic=True) == ["957 operations, more than 700 + N / 64"]
    assert launches.quadratic(get_attention("softmax"))
    assert not launches.quadratic(get_attention("local"))


def test_the_first_call_pays_for_the_tables_of_a_mask(monkeypatch):
    attend = get_attention("softmax").attend

    def with_table(self, q, k, v, *, mask, **options):
        mask.cached("planted", lambda: int(q.detach().sum().exp()))
        return attend(self, q, k, v, mask=mask, **options).exp()

    (rule,) = parse_rules("softmax", backend="batched")
    before = count_layer(rule, HEADS, 32)
    monkeypatch.setattr(get_attention("softmax"), "attend", with_table)
    after = count_layer(rule, HEADS, 32)
    assert (after.tables - before.tables, sum(after.syncs_of_tables.values())) == (2, 1)
    assert not after.syncs
    assert (after.forward - before.forward, after.forward_backward - before.forward_backward) == (1, 2)
    assert count_layer(rule, HEADS, 32, packed_length=10).packed


def test_an_attention_of_certain_lengths_gets_the_next_one_that_it_serves(monkeypatch):
    monkeypatch.setattr(launches, "LONGEST_GAP", 20)
    cls = get_attention("neighborhood_2d")
    assert served(cls(cls.Config(), HEADS), 60) == 65
    assert served(cls(cls.Config(num_prefix_tokens=0), HEADS), 64) == 64
    with pytest.raises(ValueError, match="allowed: 3 x 3 patches"):
        served(cls(cls.Config(grid_size=(3, 3)), HEADS), 60)


def test_what_cannot_be_counted_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(self, *tensors, **options):
        raise RuntimeError("planted\nfailure")

    monkeypatch.setattr(get_attention("local"), "reference", broken)
    chosen = {"a": {"type": "local", "backend": "reference"}, "b": "nystrom"}
    said = []
    records = run_launches(build(LaunchesConfig, {**SMALL, "attentions": chosen}), said.append)
    assert [(record["label"], record["length"], record["packed"]) for record in records] == [
        *[("a", 64, False), ("a", 128, False), ("a", 64, True), ("a", 128, True)],
        *[("b", 64, False), ("b", 128, False)],
    ]
    assert all(record["error"] == "RuntimeError: planted failure" for record in records[:4])
    assert records[5]["forward_backward"] > 0
    assert said[3] == "a, packed · 128: RuntimeError: planted failure"


def test_the_form_for_other_devices_is_counted_unless_a_rule_names_a_backend():
    chosen = {"a": "linear", "b": {"type": "linear", "backend": "torch"}}
    rules = build(LaunchesConfig, {"attentions": chosen}).rules()
    assert [rule.backend for rule in rules.values()] == ["batched", "torch"]
    (linformer,) = build(LaunchesConfig, {"attentions": {"a": "linformer"}, "lengths": [30000]}).rules().values()
    assert linformer.config.max_length == 30000


def test_the_command_writes_a_table_and_json(tmp_path):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    flags = ["bench", "--launches", "-a", "{type: local, window_size: 8}", "-a", "softmax", "-o", str(tmp_path)]
    done = CliRunner().invoke(cli.app, [*flags, *sets])
    assert done.exit_code == 0, done.output
    assert "Packed rows of texts of 50 tokens" in done.output
    records = json.loads((tmp_path / "launches.json").read_text())["records"]
    assert len(records) == 8
    plain = [record["forward_backward"] for record in records if not record["packed"] and record["label"] == "softmax"]
    assert f"| softmax | {plain[0]} (" in (tmp_path / "report.md").read_text()
    for wrong in ("lengths=[0]", "head_dim=0", "backend=locale", "packed_length=-1", "num_key_value_heads=3"):
        refused = CliRunner().invoke(cli.app, ["bench", "--launches", "--set", wrong])
        assert refused.exit_code == 2
        assert wrong.partition("=")[2] in refused.output
