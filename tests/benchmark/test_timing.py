"""What is measured is what is said to be measured. Nothing here asserts a time."""

import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import attn_plugins as ap
from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.timing import Workload

CPU = torch.device("cpu")
HYBRID = [{"type": "local", "window_size": 4, "layers": 0}]


def peak(run):
    return timing.peak_bytes([Workload(run=run, count=1)], CPU)


def test_peak_memory_of_dense_attention_is_known():
    n, heads, dim = 256, 4, 16
    q, k, v = (torch.randn(1, heads, n, dim, requires_grad=True) for _ in range(3))
    matrix, vector = n * n * heads * 4, n * heads * dim * 4  # bytes

    def forward():
        scores = q @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v

    def forward_inference():
        with torch.no_grad():
            forward()

    # scores, weights and output live at once; the backward needs weights, and the gradients of weights and scores
    assert peak(forward_inference) == pytest.approx(2 * matrix + vector, rel=0.01)
    assert peak(lambda: forward().sum().backward()) == pytest.approx(3 * matrix + 3 * vector, rel=0.15)


def test_peak_memory_is_not_the_sum_nor_what_was_there_before():
    held = torch.zeros(1_000_000)
    assert peak(lambda: len([torch.zeros(1000) for _ in range(50)])) == pytest.approx(50 * 4000, rel=0.02)

    def one_after_another():
        for _ in range(50):
            torch.zeros(1000)

    assert peak(one_after_another) <= 2 * 4000
    assert peak(lambda: held.add_(1)) < 100
    larger = [Workload(run=lambda: torch.zeros(10), count=9), Workload(run=lambda: torch.zeros(1000), count=1)]
    assert timing.peak_bytes(larger, CPU) == 4000


def test_rounds_alternate_and_the_first_is_thrown_away():
    order = []
    contenders = {name: [Workload(run=lambda name=name: order.append(name), count=1)] for name in ("a", "b")}
    seconds = timing.interleaved(contenders, 3, CPU)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="rounds=0; allowed: at least 1"):
        timing.interleaved(contenders, 0, CPU)


def test_parts_count_as_often_as_they_occur(monkeypatch):
    monkeypatch.setattr(timing, "seconds_of", lambda run, device: run)
    seconds = timing.interleaved({"a": [Workload(run=1.0, count=3), Workload(run=5.0, count=1)]}, 2, CPU)
    assert seconds == {"a": [2.0, 2.0]}


def test_times_on_a_cpu_are_those_of_the_process_on_one_thread():
    """A pause takes none; on several threads the clock counts."""
    before, pause = torch.get_num_threads(), {"": [Workload(run=lambda: time.sleep(0.05), count=1)]}
    seen = []
    watched = {"": [Workload(run=lambda: seen.append(torch.get_num_threads()), count=1)]}
    assert max(timing.interleaved(pause, 2, CPU)[""]) < 0.04
    assert min(timing.interleaved(pause, 2, CPU, threads=before + 1)[""]) >= 0.05
    timing.interleaved(watched, 1, CPU)
    timing.interleaved(watched, 1, CPU, threads=before + 1)
    assert seen == [1, 1, before + 1, before + 1]
    assert torch.get_num_threads() == before


def test_rates_of_a_cpu_are_of_one_thread_and_count_what_causal_attention_sees(monkeypatch):
    monkeypatch.setattr(timing, "seconds_of", lambda run, device: 0.5)
    rates = timing.cpu_rates()
    assert rates["mm"] == pytest.approx(2 * 1024**3 / 0.5 / 1e9)
    pairs = 2048 * 2049 / 2
    assert rates["attention"] == pytest.approx(2 * 2 * 8 * 64 * pairs / 0.5 / 1e9, rel=1e-3)


def test_ratios_are_taken_within_a_round():
    # the machine slows down tenfold after the first round: the ratio of medians would say 1.0
    found = timing.compared([1.0, 10.0, 30.0], [2.0, 10.0, 60.0])
    assert found == {"seconds": 10.0, "baseline_seconds": 10.0, "times_as_fast": 2.0, "lowest": 1.0, "highest": 2.0}


def test_one_call_for_each_kind_of_attention_module(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.randint(20, (1, 12))
    (own,) = timing.attention_calls(model, ids)
    assert own.count == 2
    ap.swap_attention(model, HYBRID)
    calls = timing.attention_calls(model, ids)
    assert [call.count for call in calls] == [1, 1]
    assert [call.module.layer_idx for call in calls] == [0, 1]
    seen = []
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(ids)
        again = calls[1].module(*calls[1].args, **calls[1].kwargs)[0]
    torch.testing.assert_close(again, seen[0])  # the noted inputs are those of the model


def test_a_model_stops_where_the_last_kind_has_been_seen(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    ran = []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    timing.attention_calls(model, torch.randint(20, (1, 12)))
    assert ran == []
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks stay behind"
    with pytest.raises(ValueError, match="PreTrainedModel"):
        timing.attention_calls(nn.Linear(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("scope", ["model", "attention"])
def test_a_backward_pass_trains_the_attentions_weights_alone(llama, scope):
    model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin={"type": "linear", "feature_map": "hedgehog"})
    seen = set()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.add(name)) if "attn_plugin" in name else None
    for part in timing.parts(model, torch.randint(20, (1, 12)), scope, "forward_backward"):
        part.run()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("attn_plugin" in name for name in trained)
    layers = ("layers.0.", "layers.1.") if scope == "model" else ("layers.0.",)
    assert seen == {name for name in trained if any(layer in name for layer in layers)}
    assert all(parameter.grad is None for parameter in model.parameters()), "gradients would pile up between rounds"


@pytest.mark.parametrize("scope", ["model", "attention"])
def test_an_encoder_is_measured_too(bert, scope):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    for which in ("forward", "forward_backward"):
        parts = timing.parts(model, torch.randint(20, (2, 12)), scope, which)
        assert sum(part.count for part in parts) == (1 if scope == "model" else model.config.num_hidden_layers)
        for part in parts:
            part.run()


def test_forward_keeps_no_graph(llama, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(llama)
    states = []
    model.lm_head.register_forward_hook(lambda *_: states.append(torch.is_grad_enabled()))
    (part,) = timing.parts(model, torch.randint(20, (1, 12)), "model", "forward")
    part.run()
    assert states == [False]
