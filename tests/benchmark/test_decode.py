"""The benchmark of generation measures what it says, keeps it, and goes on after a failure. Nothing asserts a time."""

import json

import pytest
import torch
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.cost import decode, timing
from attn_plugins.benchmark.cost.decode import (
    DecodeConfig,
    build_model,
    decode_cells,
    filled_cache,
    prepare_decode,
    run_decode,
)
from attn_plugins.benchmark.cost.decode_report import DecodeResults, decode_tables, write_decode_report
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 8, "num_sink_tokens": 2}
ATTENTIONS = {"dense": None, "local": LOCAL, "half": [{**LOCAL, "layers": "every:2"}]}
SMALL = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "attentions": ATTENTIONS,
    **{"contexts": [64, 32], "rounds": 2, "tokens": 2, "chunk": 20},
}
DENSE_BYTES = 2 * 2 * 2 * 8 * 4
"""Of a token: layers, keys and values, heads, size, float32."""


def config_of(path, **changes):
    return build(DecodeConfig, {**SMALL, "output_dir": str(path), **changes})


def run(config, **options):
    said = []
    results = prepare_decode(config)
    run_decode(config, results, say=said.append, **options)
    return results, said


def tensors(thing, seen):
    """Every tensor that can be reached, each once."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for item in (*inner, *getattr(thing, "__dict__", {}).values()):
        yield from tensors(item, seen)


def test_a_run_writes_times_and_bytes_and_is_not_run_again(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    results, said = run(config)
    written = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert len(written) == len(said) == 6
    found = DecodeResults(config, results)
    for (_, context), record in found.record.items():
        result = record["result"]
        assert result["seconds"] > 0
        assert result["lowest"] <= result["times_as_fast"] <= result["highest"]
        assert result["growth_lowest"] <= result["growth"] <= result["growth_highest"]
        assert result["growth"] == 1 or context == 64
        assert result["baseline_bytes"] == DENSE_BYTES * context
        assert record["versions"]["torch"] == torch.__version__
    assert [found.result("dense", n)["bytes"] for n in (32, 64)] == [DENSE_BYTES * 32, DENSE_BYTES * 64]
    assert found.result("local", 32)["bytes"] == found.result("local", 64)["bytes"] < DENSE_BYTES * 32
    halves = [found.result(label, 64)["bytes"] for label in ("dense", "local")]
    assert found.result("half", 64)["bytes"] == sum(halves) / 2
    monkeypatch.setattr(decode, "_measure", None)  # nothing is left to measure
    _, said = run(config)
    assert said == [f"6 of 6 cells are in {results.path} already (--fresh measures them again)"]


SPLIT = [
    {"type": "linear", "feature_map": "elu", "kv_heads": [0], "layers": [0]},
    {"type": "local", "window_size": 4, "num_sink_tokens": 0, "kv_heads": [1]},
]


def test_heads_that_keep_all_tokens_are_filled_beside_those_that_do_not(tmp_path):
    config = config_of(tmp_path, attentions={"split": SPLIT}, contexts=[32, 64], rounds=1)
    results, _ = run(config)
    found = DecodeResults(config, results)
    token = DENSE_BYTES // 4  # of one head in one layer
    window = 4 * (token + 1) + 8  # a flag beside each token, and where the text starts
    for context in (32, 64):
        sums = 8 * (8 + 1) * 4
        assert found.result("split", context)["bytes"] == context * token + 2 * window + sums


@pytest.mark.parametrize("label", ATTENTIONS)
def test_bytes_are_those_of_all_tensors_of_a_cache_with_that_many_tokens(tmp_path, label):
    config = config_of(tmp_path, attentions={label: ATTENTIONS[label]}, batch_size=3, contexts=[45], rounds=1)
    model = build_model(config, config.attentions[label])
    cache = filled_cache(model, 45, 3, 20)
    assert [layer.get_seq_length() for layer in cache.layers] == [45, 45]
    held = sum(t.numel() * t.element_size() for t in tensors(cache.layers, {}) if t.ndim)
    assert DecodeResults(config, run(config)[0]).result(label, 45)["bytes"] == held


@torch.no_grad()
def test_a_state_has_taken_in_all_tokens_in_their_places(tmp_path):
    config = config_of(tmp_path)
    model = build_model(config, config.attentions["local"])
    slot = model.model.layers[0].self_attn.attn_plugin
    given = []
    hook = slot.register_forward_pre_hook(lambda slot, tensors: given.append(tensors))
    state = filled_cache(model, 45, 1, 20).layers[0].state
    hook.remove()
    assert [k.shape[2] for _, k, _ in given] == [1, 20, 20, 4]
    whole = slot.new_state()
    mask = AttentionMask(1, 45, 45, causal=True)
    slot(*(torch.cat(x, dim=2) for x in zip(*given, strict=True)), mask=mask, scale=1.0, state=whole)
    assert state.seen == whole.seen == 45
    torch.testing.assert_close(state.tensors, whole.tensors)


def test_ratios_are_to_the_dense_model_and_to_the_own_time_at_the_first_context(tmp_path, monkeypatch):
    costs = {(False, 32): 3.0, (False, 64): 12.0, (True, 32): 6.0, (True, 64): 8.0}  # (swapped, context) -> seconds

    def timed_decode(model, cache, tokens, batch_size):
        def timed():
            pass

        timed.cost = costs[model.config.attn_plugin is not None, cache.get_seq_length()]
        return timed

    monkeypatch.setattr(decode, "decoding", timed_decode)
    monkeypatch.setattr(timing, "seconds_of", lambda run, device: order.append(run.cost) or run.cost)
    order = []
    config = config_of(tmp_path, attentions={"dense": None, "local": LOCAL})
    found = DecodeResults(config, run(config)[0])
    assert order[-4:] == [8, 12, 6, 3], "runs of one model don't follow each other"
    local, dense = found.result("local", 64), found.result("dense", 64)
    assert (local["seconds"], local["baseline_seconds"], local["first_seconds"]) == (4.0, 6.0, 3.0)  # a round has 2
    assert local["times_as_fast"] == 12 / 8
    assert local["growth"] == local["growth_lowest"] == 8 / 6
    assert (dense["times_as_fast"], dense["growth"]) == (1, 4)
    assert found.result("local", 32)["times_as_fast"] == 3 / 6
    times, ratios, growth, _ = decode_tables(found)
    assert times.rows[1] == ["local", "3.00 s", "4.00 s"]
    assert ratios.rows[1] == ["local", "0.500x (0.500 to 0.500)", "1.50x (1.50 to 1.50)"]
    assert growth.header == ["attention", "64"]
    assert growth.rows == [["dense", "4.00x (4.00 to 4.00)"], ["local", "1.33x (1.33 to 1.33)"]]


def test_a_round_is_so_many_tokens_and_they_lengthen_the_context(tmp_path):
    config = config_of(tmp_path, tokens=3)
    model = build_model(config, config.attentions["half"])
    cache = filled_cache(model, 32, 1, 20)
    decode.decoding(model, cache, config.tokens, config.batch_size)()
    assert [layer.get_seq_length() for layer in cache.layers] == [35, 35]


def test_an_attention_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(self, *tensors, **options):
        raise RuntimeError("planted\nfailure")

    monkeypatch.setattr(get_attention("local"), "attend_from", broken)
    config = config_of(tmp_path)
    results, _ = run(config)
    found = DecodeResults(config, results)
    assert found.errors() == {label: {"RuntimeError: planted failure": ["32", "64"]} for label in ("local", "half")}
    assert found.failed
    assert found.result("dense", 64)
    tables, files = write_decode_report(found, tmp_path)
    assert tables[-1].rows[0] == ["local", "RuntimeError: planted failure", "32, 64"]
    assert tables[0].rows[1] == ["local", "cannot", "cannot"]
    assert [path.name for path in files] == ["report.md", "time.png", "bytes.png"]
    monkeypatch.undo()
    results, said = run(config)
    assert said[1].endswith("failed; they are run again")
    assert len(said) == 2 + 4, "what failed is measured again, what did not is not"
    assert not DecodeResults(config, results).failed


def test_what_does_not_serve_the_model_is_no_failure(tmp_path):
    config = config_of(tmp_path, attentions={"nystrom": "nystrom"}, contexts=[32])
    found = DecodeResults(config, run(config)[0])
    (message,) = found.errors()["nystrom"]
    assert message.startswith("ValueError: ")
    assert not found.failed


def test_nothing_is_measured_without_the_dense_model(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(decode, "build_model", broken)
    config = config_of(tmp_path, contexts=[32])
    found = DecodeResults(config, run(config)[0])
    assert found.errors() == {
        "dense": {"RuntimeError: planted": ["32"]},
        "local": {"the dense model: RuntimeError: planted": ["32"]},
        "half": {"the dense model: RuntimeError: planted": ["32"]},
    }


def test_a_layer_of_another_kind_is_refused(tmp_path, monkeypatch):
    class Odd(decode.DynamicLayer):
        pass

    config = config_of(tmp_path)
    model = build_model(config, None)

    def cache_with_odd(**options):
        cache = cache_class(**options)
        cache.layers[1] = Odd()
        return cache

    cache_class = decode.DynamicCache
    monkeypatch.setattr(decode, "DynamicCache", cache_with_odd)
    with pytest.raises(ValueError, match="layer 1 of the cache is a Odd; allowed: states of attentions, DynamicLayer"):
        filled_cache(model, 32, 1, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attentions": {"x": {"type": "locale"}}}, "attentions.x: .*unknown attention 'locale' .did you mean local"),
        ({"attentions": {}}, "attentions is empty; at least one is needed"),
        ({"contexts": []}, r"contexts=\[\]; allowed: at least one, each at least 1"),
        ({"contexts": [0]}, r"contexts=\[0\]; allowed: at least one, each at least 1"),
        ({"rounds": 0}, "rounds=0; allowed: at least 1"),
        ({"tokens": 0}, "tokens=0; allowed: at least 1"),
        ({"chunk": 0}, "chunk=0; allowed: at least 1"),
        ({"batch_size": 0}, "batch_size=0; allowed: at least 1"),
        ({"together": 0}, "together=0; allowed: at least 1"),
        ({"dtype": "float8"}, "dtype='float8'; allowed: float32, bfloat16, float16"),
        ({"device": "abacus"}, "device='abacus' cannot be used here: "),
        ({"model": {"num_layers": 0}}, "model: num_layers=0; allowed: at least 1"),
        ({"model": {"num_heads": 3}}, "model: num_heads=3; allowed: a multiple of num_key_value_heads=2"),
        ({"model": {"head_dim": 7}}, "model: head_dim=7; allowed: even numbers"),
        ({"model": {"layers": 7}}, "unknown key 'layers' in model.*; allowed: num_layers"),
        ({"lengths": [32]}, "unknown key 'lengths'.*; allowed: .*contexts"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such model folder: '\./nowhere'"):
        prepare_decode(config_of(tmp_path, model="./nowhere"))


def test_cells_of_other_settings_have_other_keys(tmp_path):
    def keys(**changes):
        return {cell.key for group in decode_cells(config_of(tmp_path, **changes)) for cell in group}

    base = keys(attentions={"a": "local"})
    assert len(base) == 2
    assert keys(attentions={"another label": {"type": "local"}}, together=1, output_dir="elsewhere") == base
    for changes in (
        {"batch_size": 2},
        {"rounds": 3},
        {"tokens": 3},
        {"chunk": 21},
        {"dtype": "bfloat16"},
        {"contexts": [16, 32, 64]},
        {"model": "some/model"},
        {"model": {**SMALL["model"], "num_layers": 3}},
    ):
        assert not keys(attentions={"a": "local"}, **changes) & base


def test_the_command_runs_a_model_from_disk_beside_the_dense_one(tmp_path, llama):
    flags = ["--decode", "--attn", "{type: local, window_size: 4}", "--output-dir", str(tmp_path)]
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items() if key not in ("model", "attentions")]
    done = CliRunner().invoke(cli.app, ["bench", *flags, *sets, f"--set=model={llama}"])
    assert done.exit_code == 0, done.output
    assert "Bytes of the cache" in done.output
    for name in ("results.jsonl", "report.md", "time.png", "bytes.png"):
        assert str(tmp_path / name) in done.output
        assert (tmp_path / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    assert f"- {llama}; float32, on cpu, batch 1" in report
    assert "- dense: the model's own attention" in report
    assert "| {type: local, window_size: 4} |" in report
    wrong = CliRunner().invoke(cli.app, ["bench", "--decode", "--set", "contexts=[0]"])
    assert wrong.exit_code == 2
    assert "contexts=[0]; allowed: at least one" in wrong.output
