"""attn-plugins check: each backend against the reference form, what passed remembered, what failed told."""

import json
import types

import pytest
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.checks import check as checks
from attn_plugins.core import checked
from attn_plugins.core.backend import list_backends
from attn_plugins.core.registry import list_attentions


def call(*arguments):
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device whose kernels are fast and of which one is wrong; it is called meta."""
    monkeypatch.setenv("ATTN_PLUGINS_CACHE", str(tmp_path))
    monkeypatch.setattr(checked, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(checks, "PROCESSES", 0)
    refused = {"batched": None, "quick": None, "wrong": None, "absent": "it needs kernels: pip install kernels"}
    monkeypatch.setattr(checks, "candidates", lambda _: list(refused.items()))
    monkeypatch.setattr(
        checks, "get_backend", lambda name: types.SimpleNamespace(what=f"{name} kernels", devices=("meta",))
    )
    wrong = ["plain, bfloat16: gradient to k differs by 3.0e-01, allowed 1e-02"]
    monkeypatch.setattr(checks, "contract", lambda _, options, backend, *rest: wrong if backend == "wrong" else [])
    seconds = {"batched": 2e-3, "quick": 1e-3}
    monkeypatch.setattr(checks, "time_of", lambda _, options, backend, device, length: (seconds[backend], 0))
    checked._order.cache_clear()
    checked.checked_backends.cache_clear()
    yield "meta"
    checked._order.cache_clear()
    checked.checked_backends.cache_clear()


def test_what_passed_is_remembered_the_fastest_first(device):
    said = []
    file, results = checks.check(device, ["local"], say=said.append)
    assert said == [
        "local by batched: passed, 2.00 ms at 8192 tokens",
        "local by quick: passed, 1.00 ms at 8192 tokens",
        "local by wrong: plain, bfloat16: gradient to k differs by 3.0e-01, allowed 1e-02",
    ]
    assert [one["passed"] for one in results] == [True, True, False]
    assert checked.checked_backends("local", "meta") == ("quick", "batched")
    assert checked.checked_backends("linear", "meta") == ()
    checks.check(device, ["linear"], say=said.append)
    assert checked.checked_backends("local", "meta") == ("quick", "batched"), "earlier results are kept"
    (record,) = json.loads(file.read_text())
    assert {one["attention"] for one in record["results"]} == {"local", "linear"}


def test_a_kernel_that_fails_at_length_has_not_passed(device, monkeypatch):
    def fails(*args):
        raise RuntimeError("out of shared memory\nat some line")

    monkeypatch.setattr(checks, "time_of", fails)
    _, results = checks.check(device, ["local"], say=lambda _: None)
    assert not any(one["passed"] for one in results)
    assert results[0]["note"] == "RuntimeError: out of shared memory at some line"


def test_a_killed_check_keeps_what_it_has(device, monkeypatch):
    def dies(_, options, backend, *rest):
        if backend == "quick":
            raise KeyboardInterrupt
        return []

    checks.check(device, ["linear"], say=lambda _: None)
    monkeypatch.setattr(checks, "contract", dies)
    with pytest.raises(KeyboardInterrupt):
        checks.check(device, ["local", "linear"], say=lambda _: None)
    assert checked.checked_backends("local", "meta") == ("batched",)
    assert checked.checked_backends("linear", "meta") == ("quick", "batched"), "earlier results stay until replaced"


def test_a_cpu_and_what_is_not_there_are_refused():
    with pytest.raises(ValueError, match="device='cpu'; allowed: another"):
        checks.check("cpu")
    with pytest.raises(ValueError, match="device='nonsense' cannot be used here"):
        checks.check("nonsense")


def test_the_table_of_an_attention(device):
    before = call("describe", "local", "--device", device).output
    assert "nothing was checked on this device" in " ".join(before.split())
    checks.check(device, ["local"], say=lambda _: None)
    shown = json.loads(call("describe", "local", "--device", device, "--json").output)
    assert shown["auto"] == "auto takes the first of quick, batched that can honour a call"
    assert [(row["backend"], row["passed"]) for row in shown["backends"]] == [
        ("quick", True),
        ("batched", True),
        ("wrong", False),
        ("absent", None),
    ]
    assert shown["backends"][0]["note"] == "quick kernels"
    assert shown["backends"][3]["note"] == "it needs kernels: pip install kernels"


def test_on_a_cpu_the_form_for_cpus_is_taken():
    shown = json.loads(call("describe", "local", "--device", "cpu", "--json").output)
    assert shown["auto"] == "auto takes torch, the form for CPUs"
    assert shown["backends"][0]["backend"] == "torch"


def test_the_verb_ends_with_status_1_where_a_backend_failed(device):
    ran = call("check", "local", "--device", device)
    assert ran.exit_code == 1
    assert "2 of 3 passed; remembered in" in ran.output


def test_the_own_backends_are_candidates_or_say_why_not():
    for name in list_attentions():
        found = dict(checks.candidates(name))
        assert set(found) == {"batched", *list_backends()}
        assert all(why is None or why for why in found.values())
