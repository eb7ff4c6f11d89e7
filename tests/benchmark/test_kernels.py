"""The benchmark measures what it says, keeps it, and goes on after a failure. Nothing here asserts a time."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.cost import kernels, peers
from attn_plugins.benchmark.cost.kernels import BenchConfig, cells, contenders, prepare_bench, run_bench
from attn_plugins.benchmark.cost.kernels_report import (
    KernelResults,
    bench_tables,
    pays_from,
    says_pays_from,
    write_bench_report,
)
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention, list_attentions

SMALL = {"lengths": [24, 48], "num_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rounds": 1, "peers": False}


def config_of(path, **changes):
    return build(BenchConfig, {**SMALL, "output_dir": str(path), **changes})


def run(config, **options):
    said = []
    results = prepare_bench(config)
    run_bench(config, results, say=said.append, **options)
    return results, said


def test_every_attention_is_measured_unless_some_are_named(tmp_path):
    config = config_of(tmp_path, lengths=[16])
    assert {contender.label for contender in contenders(config)} == set(list_attentions())


def test_all_stands_for_every_attention_that_has_no_label(tmp_path):
    chosen = {"a window": {"type": "local", "window_size": 4}, "others": "all", "elu": "linear"}
    config = config_of(tmp_path, lengths=[16], attentions=chosen)
    found = {contender.label: contender.source["type"] for contender in contenders(config)}
    assert found == {"a window": "local", "elu": "linear"} | {
        name: name for name in list_attentions() if name not in ("local", "linear")
    }
    with pytest.raises(ValueError, match="allowed: a label that is the name of an attention is for it"):
        config_of(tmp_path, attentions={"softmax": "local", "others": "all"})


def test_results_are_kept_and_not_measured_again(tmp_path, monkeypatch):
    config = config_of(tmp_path, attentions={"local": "local", "elu": "linear"})
    results, said = run(config)
    written = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert len(written) == len(said) == 2 * 2 * 2
    for record in written:
        assert record["status"] == "ok"
        assert record["result"]["lowest"] <= record["result"]["times_as_fast"] <= record["result"]["highest"]
        wall = record["result"]["wall"]
        assert wall["lowest"] <= wall["times_as_fast"] <= wall["highest"]
        assert record["result"]["threads"] == 1
        assert min(record["result"]["gflops"].values()) > 0
        assert record["result"]["bytes"] > 0
        assert record["result"]["computed_by"] == "torch"
        n, heads = record["settings"]["length"], 2 * (2 + 1)  # q and out have two heads, k and v one
        assert record["result"]["tensor_bytes"] == n * heads * 8 * 4
        assert record["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(kernels, "_measure", None)  # nothing is left to measure
    _, said = run(config)
    assert said == [f"8 of 8 cells are in {results.path} already (--fresh measures them again)"]


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    config = config_of(tmp_path, attentions={"local": "local"})
    measure, calls = kernels._measure, []

    def dies(config, group):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(group)
        return measure(config, group)

    monkeypatch.setattr(kernels, "_measure", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(kernels, "_measure", measure)
    results, said = run(config)
    assert said[0].startswith("2 of 4 cells are in ")
    assert len(results.path.read_text().splitlines()) == 4


def test_an_attention_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(self, *tensors, **options):
        raise RuntimeError("planted\nfailure")

    monkeypatch.setattr(get_attention("linear"), "attend", broken)
    config = config_of(tmp_path, attentions={"linear": "linear", "local": "local"}, lengths=[16], passes=["forward"])
    results, _ = run(config)
    found = KernelResults(config, results)
    assert found.errors() == {"linear": {"RuntimeError: planted failure": ["forward 16"]}}
    assert found.failed
    assert found.result("local", "forward", 16)
    tables, files = write_bench_report(found, tmp_path)
    assert tables[-1].rows == [["linear", "RuntimeError: planted failure", "forward 16"]]
    assert (tmp_path / "report.md") in files
    monkeypatch.undo()
    results, said = run(config)
    assert said[1].endswith("failed; they are run again")
    assert len(said) == 3, "what failed is measured again, what did not is not"
    assert not KernelResults(config, results).failed


def test_a_length_that_an_attention_does_not_serve_is_no_failure(tmp_path, monkeypatch):
    def short_only(self, q, *tensors, **options):
        if q.shape[2] > 24:
            raise ValueError("got 48; allowed: at most 24")
        return q

    monkeypatch.setattr(get_attention("local"), "attend", short_only)
    config = config_of(tmp_path, attentions={"local": "local"}, passes=["forward"])
    results, _ = run(config)
    found = KernelResults(config, results)
    assert not found.failed
    (speed, *_) = bench_tables(found)
    assert speed.rows[0][3] == "cannot"


def test_what_takes_too_long_is_left_out_at_longer_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.timing, "seconds_of", lambda run, device: 8.0)
    config = config_of(tmp_path, attentions={"local": "local"}, passes=["forward"], patience=31.0)
    results, said = run(config)
    assert "local · forward · 48: left out, a pass took 8 s at 24 tokens (patience=31 s)" in said[-1]
    assert len(results.records) == 1
    results, said = run(config_of(tmp_path, attentions={"local": "local"}, passes=["forward"], patience=33.0))
    assert len(results.records) == 2


def test_no_rounds_measure_memory_alone(tmp_path):
    config = config_of(tmp_path, attentions={"local": "local"}, rounds=0)
    results, said = run(config)
    assert all("the tensors' bytes" in line and "x (" not in line for line in said)
    tables, files = write_bench_report(KernelResults(config, results), tmp_path)
    assert [table.title.split(",")[0] for table in tables] == ["Peak memory"] * 2
    assert sorted(path.name for path in files) == ["memory_forward.png", "memory_forward_backward.png", "report.md"]


def test_an_attention_runs_against_torch_with_the_same_direction(tmp_path, monkeypatch):
    seen = []

    def sdpa(q, k, v, *, is_causal, enable_gqa):
        seen.append((is_causal, enable_gqa))
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", sdpa)
    masks = []
    monkeypatch.setattr(kernels, "AttentionMask", lambda *a, **o: masks.append(o["causal"]) or AttentionMask(*a, **o))
    causal = {"lengths": [16], "passes": ["forward"], "attentions": {"local": "local"}, "memory": False}
    run(config_of(tmp_path, **causal))
    assert set(seen) == {(True, True)}
    assert set(masks) == {True}
    monkeypatch.setattr(get_attention("local"), "causal", False)
    seen.clear(), masks.clear()
    run(config_of(tmp_path, **causal))
    assert set(seen) == {(False, True)}
    assert set(masks) == {False}


def test_gradients_reach_queries_keys_and_values_in_the_backward_pass(tmp_path, monkeypatch):
    ran = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ran.append(True)
            return gradient

    for which, expected in (("forward", 0), ("forward_backward", 3)):
        ran.clear()
        tensors = kernels._tensors(config_of(tmp_path), 16, gradients=which == "forward_backward")
        kernels._workload(lambda q, k, v: Spy.apply(q) + Spy.apply(k) + Spy.apply(v), tensors, which).run()
        assert len(ran) == expected
        assert all(x.grad is None for x in tensors)


@pytest.mark.parametrize(
    ("ratios", "pays", "says"),
    [
        ({1: 0.5, 2: 1.5, 4: 2.0}, 2, "2"),
        ({1: 1.5, 2: 0.9, 4: 2.0}, 4, "4"),
        ({1: 1.5, 2: 1.1}, 1, "1"),
        ({1: 1.5, 2: 1.0}, None, "not up to 2"),
        ({}, None, ""),
    ],
)
def test_the_length_from_which_it_pays(ratios, pays, says):
    assert pays_from(ratios) == pays
    assert says_pays_from(ratios) == says


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attentions": {"x": {"type": "locale"}}}, "attentions.x: unknown attention 'locale' .did you mean local"),
        ({"attentions": {"x": {"type": "local", "layers": 0}}}, "attentions.x=.*; allowed: one attention with"),
        ({"lengths": []}, r"lengths=\[\]; allowed: at least one"),
        ({"lengths": [0]}, r"lengths=\[0\]; allowed: at least one"),
        ({"passes": []}, r"passes=\[\]; allowed: at least one of forward, forward_backward"),
        ({"dtype": "float8"}, "dtype='float8'; allowed: float32, bfloat16, float16"),
        ({"rounds": -1}, "rounds=-1; allowed: at least 1, or 0 with memory=true"),
        ({"rounds": 0, "memory": False}, "rounds=0; allowed: at least 1, or 0 with memory=true"),
        ({"patience": 0.0}, "patience=0.0; allowed: seconds above 0"),
        ({"num_heads": 3, "num_key_value_heads": 2}, "num_heads=3; allowed: a multiple of num_key_value_heads=2"),
        ({"device": "abacus"}, "device='abacus' cannot be used here: "),
        ({"device": "meta"}, "memory=true with device='meta'; allowed: memory is measured on cpu and cuda only"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


def test_cells_of_other_settings_have_other_keys(tmp_path):
    def keys(**changes):
        return {cell.key for group in cells(config_of(tmp_path, **changes)) for cell in group}

    base = keys(attentions={"a": "local"})
    assert keys(attentions={"another label": {"type": "local"}}) == base
    for changes in ({"batch_size": 2}, {"rounds": 2}, {"dtype": "bfloat16"}, {"memory": False}, {"head_dim": 4}):
        assert not keys(attentions={"a": "local"}, **changes) & base


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_run_and_are_causal_if_they_say_so(peer):
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    if peer.package != "transformers":
        pytest.importorskip(peer.package)
    n = 1024
    torch.manual_seed(0)
    attend = peer.build(2, 16, n)
    q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
    with torch.no_grad():
        out = attend(q, k, v)
        changed = attend(*(torch.cat([x[:, :, :512], x[:, :, 512:].flip(2)], dim=2) for x in (q, k, v)))
    assert out.numel() == q.numel()
    tokens = 2 if out.shape[1] == 2 else 1
    same = torch.allclose(out.narrow(tokens, 400, 112), changed.narrow(tokens, 400, 112), atol=1e-5)
    assert same == peer.causal


def test_the_command_writes_tables_plots_and_says_where(tmp_path):
    flags = ["--attn", "{type: local, window_size: 4}", "--attn", "softmax", "--output-dir", str(tmp_path)]
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    done = CliRunner().invoke(cli.app, ["bench", *flags, *sets])
    assert done.exit_code == 0, done.output
    assert "pays from" in done.output
    for name in ("results.jsonl", "report.md", "speed_forward.png", "memory_forward_backward.png"):
        assert str(tmp_path / name) in done.output
        assert (tmp_path / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    assert "| {type: local, window_size: 4} | local |" in report
    wrong = CliRunner().invoke(cli.app, ["bench", "--attn", "locale"])
    assert wrong.exit_code == 2
    assert "did you mean local" in wrong.output
