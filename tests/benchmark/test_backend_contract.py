"""The short contract passes what is right and tells what is not, in which call and by how much."""

import pytest
import torch

from attn_plugins.benchmark.checks import backend_contract
from attn_plugins.benchmark.checks.backend_contract import contract, heads_of, time_of
from attn_plugins.core.attention import Attention
from attn_plugins.core.registry import get_attention

SMALL = {"heads": heads_of(4, 2, 8), "length": 40}
LOCAL = ("local", {"window_size": 8}, "batched", "cpu", [torch.float32])


def planted(monkeypatch, change):
    """Let the form for other devices of local give ``change(output, options)``."""
    cls = get_attention("local")
    monkeypatch.setattr(
        cls, "attend_batched", lambda self, *tensors, **options: change(self.attend(*tensors, **options), options)
    )


@pytest.mark.parametrize("name", ["local", "linear", "gated_delta", "neighborhood_2d"])
def test_what_is_right_passes_in_every_dtype(name):
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    assert contract(name, {}, "batched", "cpu", dtypes, **SMALL) == []
    assert contract(name, {}, "torch", "cpu", [torch.float64], **SMALL, thorough=True) == []


def test_a_wrong_output_is_told_by_call_and_size(monkeypatch):
    planted(monkeypatch, lambda out, options: out * 1.25)
    found = contract(*LOCAL, **SMALL)
    assert found[0].startswith("float32, whole rows: output differs by ")
    assert found[0].endswith(", allowed 2e-03")
    calls = {line.partition(": ")[0] for line in found}
    assert calls == {
        f"float32, {name}" for name in ("whole rows", "position bias, softcap, sinks", "left padding", "packed rows")
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out, options: out.detach() + (out - out.detach()) * 2, ["gradient to q", "gradient to k"]),
        (lambda out, options: out * (1 + (options["mask"].segments_BK is not None)), ["packed rows: output"]),
        (lambda out, options: out * (1 + ("sinks" in options)), ["sinks: output"]),
        (lambda out, options: out * float("nan"), ["whole rows: output differs by nan"]),
    ],
)
def test_what_goes_wrong_in_one_place_is_found_there(monkeypatch, change, said):
    planted(monkeypatch, change)
    found = contract(*LOCAL, **SMALL)
    assert all(any(what in line for line in found) for what in said)


def test_other_dtypes_get_one_call_unless_it_is_thorough(monkeypatch):
    planted(monkeypatch, lambda out, options: out * 2)
    dtypes = [torch.float32, torch.float16]
    for thorough, calls in ((False, 1), (True, 4)):
        found = contract(*LOCAL[:-1], dtypes, **SMALL, thorough=thorough)
        assert len({line.partition(":")[0] for line in found if line.startswith("float16")}) == calls


def test_an_error_is_a_line(monkeypatch):
    def fails(out, options):
        raise RuntimeError("planted\nfailure")

    planted(monkeypatch, fails)
    assert contract(*LOCAL, **SMALL)[0] == "float32, whole rows: RuntimeError: planted failure"


def test_what_a_backend_cannot_honour_is_left_out(monkeypatch):
    called = []

    def picky(self, *tensors, **options):
        if len(options.keys() & set(backend_contract.EXTRAS)) > 1 or "softcap" in options:
            raise ValueError("planted refusal")
        return "batched"

    planted(monkeypatch, lambda out, options: called.append(options.keys() & set(backend_contract.EXTRAS)) or out)
    monkeypatch.setattr(get_attention("local"), "computed_by", picky)
    assert contract(*LOCAL, **SMALL) == []
    assert [list(extras) for extras in called] == [[], ["position_bias"], ["sinks"], [], []]
    monkeypatch.setattr(Attention, "computed_by", lambda self, *tensors, **options: "batched")
    with pytest.raises(ValueError, match="locale"):
        contract("local", {}, "locale", "cpu", [torch.float32], **SMALL)


def test_a_backend_that_serves_nothing_says_why(monkeypatch):
    def refuses(self, *tensors, **options):
        raise ValueError("it needs planted hardware")

    monkeypatch.setattr(get_attention("local"), "_computed_by", refuses)
    with pytest.raises(ValueError, match="it needs planted hardware"):
        contract(*LOCAL, **SMALL)
    with pytest.raises(ValueError, match="it needs planted hardware"):
        time_of("local", {}, "batched", "cpu", 64, torch.float32, heads=heads_of(2, 1, 8))


def test_time_and_memory_of_a_pass():
    tensors = 4 * 256 * 2 * 8 * 4
    seconds, peak = time_of("softmax", {}, "batched", "cpu", 256, torch.float32, heads=heads_of(2, 2, 8), rounds=3)
    assert seconds > 0
    assert tensors < peak < 8 * tensors
    _, longer = time_of("softmax", {}, "batched", "cpu", 512, torch.float32, heads=heads_of(2, 2, 8), rounds=1)
    assert longer > 1.5 * peak
