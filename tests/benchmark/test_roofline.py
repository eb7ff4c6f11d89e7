"""Cost on paper: what is counted is what runs, what is longer follows the law, and rates are applied as published."""

import json

import pytest
import torch
from transformers import LlamaConfig, ViTConfig
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.checks.backend_contract import heads_of as shape_of
from attn_plugins.benchmark.cost import roofline
from attn_plugins.benchmark.cost.launches import LaunchCall
from attn_plugins.benchmark.cost.operations import Launch, Operations
from attn_plugins.benchmark.cost.roofline import (
    DEVICES,
    LAUNCH,
    Cost,
    RooflineConfig,
    batched,
    costs,
    count_batched,
    flash,
    heads_of,
    pairs,
    takes,
)
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention
from attn_plugins.core.rules import parse_rules

HEADS = shape_of(4, 2, 16)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(roofline, "GRID", (64, 128, 256))


def rule(name, **options):
    (found,) = parse_rules({"type": name, **options})
    return found


def test_flash_attention_is_half_of_all_pairs_in_seven_products():
    amounts = flash(HEADS, 1000, 3, ["h100"])
    pairs_of_all = 3 * 4 * 1000 * 1000 / 2
    assert amounts["flops"] == pairs_of_all * 7 * 2 * 16
    assert amounts["bytes"] == 12 * 3 * 4 * 1000 * 16 * 2
    assert amounts["h100"] == max(amounts["flops"] / 989e12, amounts["bytes"] / 3.35e12)
    assert takes(amounts, "h100") == 4 * LAUNCH
    long = flash(HEADS, 10**6, 3, ["h100"])
    assert takes(long, "h100") == long["flops"] / 989e12


def test_an_operation_takes_as_long_as_its_arithmetic_or_its_bytes():
    launches = [
        Launch("bmm", 10**12, 10**3, torch.bfloat16),
        Launch("bmm", 10**12, 10**3, torch.float32),
        Launch("exp", 0, 10**9, None),
    ]
    amounts = batched(Operations(launches), ["a100"])
    device = DEVICES["a100"]
    assert amounts["a100"] == pytest.approx(1e12 / device.half + 1e12 / device.single + 1e9 / device.bandwidth)
    assert (amounts["flops"], amounts["bytes"], amounts["launches"]) == (2e12, 1e9 + 2e3, 3)


@pytest.mark.parametrize("name", ["linear", "nystrom", "gated_delta"])
def test_tensors_without_values_are_counted_as_those_with(name):
    fake = count_batched(rule(name), HEADS, 100)
    torch.manual_seed(0)
    module = get_attention(name)(rule(name).config, HEADS, backend="batched").to(torch.bfloat16)
    call = LaunchCall(module, 100, dtype=torch.bfloat16)
    call.both()
    real = call.both()
    assert (fake.flops, fake.bytes, fake.names) == (real.flops, real.bytes, real.names)
    assert fake.flops > 0


def test_what_was_not_counted_follows_the_law():
    def law(n):
        return {"flops": 3 + 5 * n + 7 * n * n, "bytes": 2 * n, "launches": 40 + n / 64}

    cost = Cost("a", "batched", {n: law(n) for n in (64, 128, 256)}, [64, 128, 256])
    cost.extrapolate([128, 1024], quadratic=False)
    assert cost.amounts[1024] == pytest.approx(law(1024))
    steps = Cost("b", "batched", {n: {"launches": 10 + n * n} for n in (64, 128, 256)}, [64, 128, 256])
    steps.extrapolate([512], quadratic=True)
    assert steps.amounts[512]["launches"] == pytest.approx(10 + 512**2)
    with pytest.raises(ValueError, match="counted at 2 lengths, which does not tell how it grows"):
        Cost("c", "batched", {64: law(64), 128: law(128)}, [64, 128]).extrapolate([256], quadratic=False)


def test_it_pays_from_where_it_stays_below_flash_attention():
    lengths = [2**10, 2**14, 2**18]
    dense = {n: takes(flash(HEADS, n, 1, ["h200"]), "h200") for n in lengths}

    def cost(*shares):
        amounts = {n: {"h200": dense[n] * share, "launches": 0.0} for n, share in zip(lengths, shares, strict=True)}
        return Cost("a", "batched", amounts, lengths).pays_from("h200", HEADS, 1)

    assert cost(0.5, 0.5, 0.5) == lengths[0]
    assert cost(0.5, 1.5, 0.5) == lengths[2]
    assert cost(0.5, 0.5, 1.0) is None


def test_blocks_with_a_visible_pair_are_counted(monkeypatch):
    def blocks(length, num_sink_tokens=0, **options):
        module = get_attention("local")(rule("local", num_sink_tokens=num_sink_tokens, **options).config, HEADS)
        return pairs(module, HEADS, length) / roofline.BLOCK**2 / 4

    monkeypatch.setattr(roofline, "TILES", 8)
    assert blocks(1024, window_size=1) == 8
    assert blocks(1024, window_size=2) == 8 + 7
    assert blocks(1024, window_size=4096) == 36
    assert blocks(1024, window_size=1, num_sink_tokens=2) == 8 + 7
    assert blocks(1000, window_size=4096) == 36
    monkeypatch.setattr(roofline, "TILES", 4)
    assert blocks(4096, window_size=129) == pytest.approx(32 + 31, rel=0.05)
    linear = get_attention("linear")
    assert pairs(linear(linear.Config(), HEADS), HEADS, 64) is None


def test_heads_are_those_of_a_model(tmp_path):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 96, "num_hidden_layers": 5}
    LlamaConfig(**sizes).save_pretrained(tmp_path / "a")
    shape, layers = heads_of(RooflineConfig(model=str(tmp_path / "a"), attentions={}))
    assert (shape.num_heads, shape.num_key_value_heads, shape.head_dim, layers) == (8, 2, 12, 5)
    ViTConfig(num_attention_heads=3, hidden_size=48).save_pretrained(tmp_path / "b")
    shape, _ = heads_of(RooflineConfig(model=str(tmp_path / "b"), attentions={}))
    assert (shape.num_heads, shape.num_key_value_heads, shape.head_dim) == (3, 3, 16)
    with pytest.raises(ValueError, match="no such model folder"):
        heads_of(RooflineConfig(model=str(tmp_path / "c"), attentions={}))
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="its config does not tell its heads"):
        heads_of(RooflineConfig(model=str(tmp_path / "d"), attentions={}))


def test_what_cannot_be_counted_is_told_and_the_others_go_on(small, monkeypatch):
    def asks(self, q, k, v, **options):
        return q * int(q.sum())

    monkeypatch.setattr(get_attention("nystrom"), "attend_batched", asks)
    config = build(RooflineConfig, {"attentions": {"a": "nystrom", "b": "linear"}, "lengths": [64, 1024]})
    said = []
    found = {(cost.label, cost.by): cost for cost in costs(config, HEADS, said.append)}
    assert "DataDependentOutputException" in found["a", "batched"].error
    assert found["b", "batched"].counted == [64, 128, 256, 1024]
    assert said[0].startswith("a: DataDependentOutputException")


def test_what_takes_too_many_operations_is_extrapolated(small, monkeypatch):
    monkeypatch.setattr(roofline, "MOST_COUNTED", 300)
    config = build(RooflineConfig, {"attentions": {"a": "linear"}, "lengths": [4096]})
    (cost,) = (cost for cost in costs(config, HEADS, lambda line: None) if cost.by == "batched")
    assert cost.counted == [64, 128, 256]
    assert cost.amounts[4096]["bytes"] == pytest.approx(16 * cost.amounts[256]["bytes"], rel=0.5)


def test_the_command_writes_tables_and_json(small, tmp_path):
    LlamaConfig(num_attention_heads=2, num_key_value_heads=1, hidden_size=32).save_pretrained(tmp_path / "model")
    flags = ["bench", "--roofline", "h100,b200", "--model", str(tmp_path / "model"), "--length", "128"]
    done = CliRunner().invoke(cli.app, [*flags, "-a", "local", "-a", "linear", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Time on H100 SXM" in done.output
    report = (tmp_path / "out" / "report.md").read_text()
    assert "32 layers" in report
    assert "| softmax | flash attention |" in report
    assert "| local | flex |" in report
    written = json.loads((tmp_path / "out" / "roofline.json").read_text())
    assert {cost["label"] for cost in written["costs"]} == {"local", "linear"}
    for wrong, says in (("v100", "allowed: a100, h100, h200, b200"), ("", "allowed: a100")):
        refused = CliRunner().invoke(cli.app, ["bench", "--roofline", wrong])
        assert refused.exit_code == 2
        assert says in refused.output
