"""What whole models cost: bytes are those of a cache that was generated, a step is one, and no weight is changed."""

import copy
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from attn_plugins import swap_attention
from attn_plugins.benchmark.compare import cost
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.benchmark.cost.energy import joules
from attn_plugins.benchmark.cost.roofline import KERNELS, count_batched
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.options import build
from attn_plugins.core.rules import parse_rules
from attn_plugins.hf.caches.cache_layers import cache_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
HALF = [{"type": "softmax", "layers": [0]}, LOCAL]


def config_of(model, out, **changes):
    tree = {"models": {"tiny": model}, "attentions": {"dense": None, "local": LOCAL}, "output_dir": str(out)}
    return build(CompareConfig, {**tree, "cost": {"lengths": [16], "rounds": 1, "tokens": 2}, **changes})


def run(config):
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None)
    return results


def by_cell(results):
    return {(line["attention"], line["settings"]["what"]): line for line in results.records.values()}


def test_all_costs_of_a_model(llama, tmp_path):
    config = config_of(llama, tmp_path / "out", attentions={"dense": None, "local": LOCAL, "half": HALF})
    results = run(config)
    found = by_cell(results)
    assert {line["status"] for line in found.values()} == {"ok"}, [line.get("error") for line in found.values()]
    assert {what for _, what in found} == {"cache", "decode", "step", "paper"}
    token = 2 * 8 * 4  # a key and a value of one head of 8 float32
    sizes = {name: found[name, "cache"]["result"]["bytes"] for name in ("dense", "local", "half")}
    window = 5 * token + 5 + 8  # and which of the five is a token, and where the row begins
    assert sizes == {"dense": 2 * 16 * token, "local": 2 * window, "half": 16 * token + window}
    for what in ("decode", "step"):
        its = found["local", what]["result"]
        assert its["lowest"] <= its["times_as_fast"] <= its["highest"]
        assert "joules" not in its
    model = AutoModelForCausalLM.from_pretrained(llama)
    weights = sum(one.numel() * 4 for one in model.parameters())
    assert found["local", "step"]["result"]["peak_bytes"] > weights, "gradients of all weights are in it"
    assert found["dense", "paper"]["result"]["launches"] == 2 * KERNELS

    tables, files = write_report(config, results)
    (table,) = tables
    assert table.title == "Cost at 16 tokens"
    assert table.header == [
        *["attention", "cache MiB", "a token", "a training step", "peak MiB", "launches", "least on h100"]
    ]
    assert [row[1].split()[1] for row in table.rows] == ["(1.000)", "(0.325)", "(0.663)"]
    assert all(row[2].count("x (") == 1 for row in table.rows)
    assert "## Cost at 16 tokens" in files[0].read_text()


def test_bytes_are_those_of_a_cache_that_was_generated(llama):
    model = swap_attention(AutoModelForCausalLM.from_pretrained(llama), HALF)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in torch.randint(20, (16,)):
            model(input_ids=token.view(1, 1), past_key_values=cache)
    assert cost.bytes_of_cache(model, 16) == cache_bytes(cache)


def test_a_step_is_of_all_weights_and_leaves_them_as_they_are(llama, monkeypatch):
    model = swap_attention(AutoModelForCausalLM.from_pretrained(llama), {"type": "linear", "feature_map": "hedgehog"})
    model.requires_grad_(False)
    before, stepped = copy.deepcopy(model.state_dict()), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: stepped.append(self) or step(self))
    run = cost.training_step(model, torch.randint(20, (1, 16)))
    run()
    run()
    assert len(stepped) == 2
    trained = {id(one) for group in stepped[0].param_groups for one in group["params"]}
    assert trained == {id(one) for one in model.parameters()}
    assert all(len(stepped[0].state[one]) for one in model.parameters()), "every weight had a gradient"
    assert all(one.grad is None for one in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_launches_on_paper_are_those_of_the_layers(llama):
    model = swap_attention(AutoModelForCausalLM.from_pretrained(llama), {**LOCAL, "layers": [1]})
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=8, hidden_size=16, layer=0)
    (rule,) = parse_rules(LOCAL)
    counted = len(count_batched(rule, heads, 64).launches)
    found = cost.on_paper(model, 64, "h100")
    assert found["launches"] == counted + KERNELS
    assert 0 < found["least_seconds"] < 1
    split = swap_attention(AutoModelForCausalLM.from_pretrained(llama), [{**LOCAL, "heads": "all", "layers": [1]}])
    assert cost.on_paper(split, 64, "h100") == found


def test_bytes_are_shown_where_there_is_time_and_no_quality(llama, tmp_path):
    speed = {"lengths": {"attention": [16]}, "passes": ["forward"], "rounds": 1}
    config = config_of(llama, tmp_path, cost={"lengths": [16], "what": ["cache"]}, speed=speed)
    tables, _ = write_report(config, prepare_compare(config))
    assert [table.title for table in tables] == ["Speed, attention layer", "Cost at 16 tokens"]


def test_an_encoder_has_no_cost_on_paper(bert, tmp_path):
    config = config_of(bert, tmp_path, cost={"lengths": [16], "what": ["paper"]}, evaluation={"task": "masked-lm"})
    (record, *_) = run(config).records.values()
    assert "BertForMaskedLM has no causal self-attention" in record["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, r"cost: lengths=\[\]; allowed: at least one, each at least 2"),
        ({"what": []}, r"cost: what is empty; allowed: any of cache, decode, step, paper"),
        ({"what": ["time"]}, r"cost.what\[0\]='time'; allowed: 'cache', 'decode', 'step', 'paper'"),
        ({"rounds": 0}, r"cost: rounds=0; allowed: at least 1"),
        ({"gpu": "h1"}, r"cost: gpu='h1'; allowed: a100, h100, h200, b200"),
    ],
)
def test_what_is_wrong_in_costs(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("m", "out", cost={"lengths": [16], **changes})


def test_only_what_a_cost_depends_on_is_in_its_key():
    def keys(**changes):
        config = config_of("m", "out", cost={"lengths": [16], **changes})
        return {cell.settings["what"]: cell.key for cell in cells(config) if cell.attention == "local"}

    before = keys()
    for changes, changed in (
        ({"rounds": 4}, {"decode", "step"}),
        ({"tokens": 4}, {"decode"}),
        ({"gpu": "h200"}, {"paper"}),
        ({"batch_size": 2}, {"decode", "step", "paper"}),
        ({"lengths": [32]}, {"cache", "decode", "step", "paper"}),
    ):
        after = keys(**changes)
        assert {what for what in before if before[what] != after[what]} == changed


def test_what_is_counted_may_run_beside_other_work():
    timed = {cell.settings["what"] for cell in cells(config_of("m", "out")) if cell.timed}
    assert timed == {"decode", "step"}


class NoEnergyError(Exception):
    pass


def test_energy_is_that_of_the_counter(monkeypatch):
    read = iter([None, 1000, 6000])  # millijoules; the first look is whether it tells
    nvml = types.SimpleNamespace(
        NVMLError=NoEnergyError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-abc": 0}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(read),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    clock, ran = iter([0.0, 0.2, 0.4, 0.6]), []
    monkeypatch.setattr("attn_plugins.benchmark.cost.energy.time.perf_counter", lambda: next(clock))
    assert joules(lambda: ran.append(1), torch.device("cuda")) == 5 / 3
    assert len(ran) == 3

    def silent(handle):
        raise NoEnergyError

    nvml.nvmlDeviceGetTotalEnergyConsumption = silent
    assert joules(lambda: ran.append(1), torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert joules(lambda: ran.append(1), torch.device("cuda")) is None
    assert joules(lambda: ran.append(1), torch.device("cpu")) is None
    assert len(ran) == 3
