"""Backends: what a user asks for runs or raises, and auto takes what was checked, the fastest first."""

import json

import pytest
import torch

from attn_plugins.core import backend as backends
from attn_plugins.core import checked
from attn_plugins.core.assignment import Target, assign
from attn_plugins.core.attention import Attention
from attn_plugins.core.backend import BACKENDS, FORMS, Backend, get_backend, list_backends, register_backend
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rules import parse_rules


class Says(Attention):
    """An attention whose forms say which of them ran."""

    name = "says"
    causal = True

    def reference(self, q, k, v, **options):
        return torch.full_like(q, 1), None

    def attend(self, q, k, v, **options):
        return torch.full_like(q, 2)

    def attend_batched(self, q, k, v, **options):
        return torch.full_like(q, 3)


class Kernel(Backend):
    """A backend for short texts."""

    what = "kernels of nobody"
    devices = ("cpu", "meta")
    absent = None

    def missing(self):
        return self.absent

    def refuses(self, attention, q, k, v, *, mask, **options):
        return None if mask.kv_length <= 8 else f"got {mask.kv_length} keys, at most 8 are served"

    def attend(self, attention, q, k, v, **options):
        return torch.full_like(q, 4)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(BACKENDS, "classes", {**BACKENDS.classes})
    monkeypatch.setattr(Kernel, "absent", None)
    list_backends()
    yield register_backend("kernel")(Kernel)
    backends.forget()


def ran(backend="auto", length=8, device="cpu", compiled=False, **options):
    q = torch.zeros(1, 2, length, 4, device=device)
    mask = AttentionMask(1, length, length, causal=True, device=device)
    module = Says(Says.Config(), backend=backend)
    if compiled:
        module.compile(backend="eager", fullgraph=True)
    return module(q, q, q, mask=mask, scale=1.0, **options)[0]


@pytest.mark.parametrize(
    ("backend", "form"), [("auto", 2), ("torch", 2), ("reference", 1), ("batched", 3), ("kernel", 4)]
)
def test_what_is_asked_for_runs(kernel, backend, form):
    assert (ran(backend) == form).all()


def test_a_forced_backend_that_cannot_honour_a_call_is_an_error(kernel, monkeypatch):
    with pytest.raises(ValueError, match=r"backend 'kernel' cannot serve this call of attention 'says': got 9 keys"):
        ran("kernel", length=9)
    monkeypatch.setattr(Kernel, "devices", ("cuda",))
    with pytest.raises(ValueError, match=r"'kernel' cannot serve .*: it runs on cuda, not on cpu; allowed: 'auto'"):
        ran("kernel")
    monkeypatch.setattr(Kernel, "devices", ("cpu",))
    monkeypatch.setattr(Kernel, "absent", "it needs kernels: pip install kernels")
    with pytest.raises(ValueError, match=r"'kernel' cannot serve .*: it needs kernels: pip install kernels"):
        ran("kernel")


@pytest.mark.parametrize(("backend", "name"), {"auto": "torch", "torch": "torch", "kernel": "kernel"}.items())
def test_what_computes_a_call_is_told(kernel, backend, name):
    q = torch.zeros(1, 2, 8, 4)
    by = Says(Says.Config(), backend=backend).computed_by(q, q, q, mask=AttentionMask(1, 8, 8, causal=True), scale=1.0)
    assert (by if isinstance(by, str) else by.name) == name


def test_weights_come_from_the_dense_form_whatever_computes(kernel):
    assert (ran("kernel", need_weights=True) == 1).all()


def test_a_backend_that_is_not_installed_is_refused_when_swapping(kernel, monkeypatch):
    target = Target(path="layers.0.attn", role="decoder", stack="layers", layer=0)
    rules = parse_rules({"type": "local", "backend": "kernel"})
    assert list(assign(rules, [target])) == ["layers.0.attn"]
    monkeypatch.setattr(Kernel, "absent", "it needs kernels: pip install kernels")
    with pytest.raises(ValueError, match=r"rule 0 \('local'\): backend='kernel' cannot run here: it needs"):
        assign(rules, [target])


def test_an_unknown_backend_is_refused_with_the_nearest_name(kernel):
    with pytest.raises(ValueError, match=r"backend='kernle' \(did you mean kernel\?\); allowed: auto, .*kernel"):
        parse_rules({"type": "local", "backend": "kernle"})


@pytest.mark.parametrize("name", FORMS)
def test_names_of_forms_are_taken(name):
    with pytest.raises(ValueError, match="is a form that every attention has; choose another name"):
        register_backend(name)


def test_incomplete_backends_are_refused():
    with pytest.raises(ValueError, match=r"is not a subclass of attn_plugins.core.backend.Backend"):
        register_backend("mine")(dict)
    with pytest.raises(ValueError, match=r"backend 'mine' .* lacks: __doc__, attend, refuses"):
        register_backend("mine")(type("Half", (Backend,), {"what": "half", "missing": Kernel.missing}))


def test_a_backend_that_comes_later_is_asked_too(kernel):
    """Registered after a first call, or again, as a notebook does that defines its class anew."""

    def define(number):
        class Later(Kernel):
            """Another one."""

            own = True

            def attend(self, attention, q, k, v, **options):
                return torch.full_like(q, number)

            def steps(self, cls):
                return True

            def attend_from(self, attention, q, k, v, *, state, **options):
                return torch.full_like(q, number)

        return register_backend("later")(Later)

    q = torch.zeros(1, 2, 1, 4)
    assert (ran() == 2).all()
    for number in (5, 6):
        define(number)
        assert (ran() == number).all()
        for asked in ("auto", "later"):
            module = Says(Says.Config(), backend=asked)
            assert (backends.attend_from(module, q, q, q, state=None) == number).all(), asked


def test_own_backends_say_what_they_are():
    for name in list_backends():
        assert get_backend(name).what
        assert get_backend(name) is get_backend(name)
        assert "\n" not in get_backend(name).what


# On the device "meta", which is not a CPU and has no values, only the choice is made.


def choice(monkeypatch, length=8, **options):
    """Which forms and backends run for a call on a device that is not a CPU."""
    seen = []
    for cls, name in ((Says, "attend_batched"), (Says, "attend"), (Kernel, "attend")):

        def attend(self, *args, _told=f"{cls.__name__}.{name}", **options):
            seen.append(_told)
            return torch.empty_like(args[-3])

        monkeypatch.setattr(cls, name, attend)
    ran(length=length, device="meta", **options)
    return seen


@pytest.fixture
def remembered(kernel, monkeypatch, tmp_path):
    """A function that remembers results for the device "meta"."""
    monkeypatch.setenv("ATTN_PLUGINS_CACHE", str(tmp_path))
    monkeypatch.setattr(checked, "SHIPPED", tmp_path / "shipped.json")

    def remember(*results):
        names = ("attention", "backend", "passed", "seconds")
        checked._order.cache_clear()
        return checked.add_record(checked.place("meta"), [dict(zip(names, one, strict=True)) for one in results])

    yield remember
    checked._order.cache_clear()
    checked.checked_backends.cache_clear()


def test_auto_leaves_alone_what_was_not_checked(remembered, monkeypatch):
    remembered()
    assert choice(monkeypatch) == ["Says.attend_batched"]


def test_auto_takes_the_fastest_that_passed(remembered, monkeypatch):
    remembered(("says", "batched", True, 2.0), ("says", "kernel", True, 1.0))
    assert choice(monkeypatch) == ["Kernel.attend"]
    assert choice(monkeypatch, length=9) == ["Says.attend_batched"]  # which it refuses
    remembered(("says", "batched", True, 1.0), ("says", "kernel", True, 2.0))
    assert choice(monkeypatch) == ["Says.attend_batched"]
    remembered(("says", "batched", True, 2.0), ("says", "kernel", False, 1.0))
    assert choice(monkeypatch) == ["Says.attend_batched"]
    remembered(("softmax", "kernel", True, 1.0))
    assert choice(monkeypatch) == ["Says.attend_batched"]


def test_the_choice_of_auto_is_part_of_a_graph(remembered, monkeypatch):
    """A backend that is none is passed over there."""

    def compiled():
        torch._dynamo.reset()
        return choice(monkeypatch, compiled=True)

    assert compiled() == ["Says.attend_batched"]
    remembered(("says", "batched", True, 2.0), ("says", "kernel", True, 1.0))
    assert compiled() == ["Says.attend_batched"]
    monkeypatch.setattr(Kernel, "traceable", True)
    assert compiled() == ["Kernel.attend"]


def test_records_are_of_one_device_and_its_versions(remembered, monkeypatch):
    file = remembered(("says", "kernel", True, 1.0))
    (record,) = json.loads(file.read_text())
    assert record["place"] == checked.place("meta")
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    checked._order.cache_clear()
    checked.checked_backends.cache_clear()
    assert choice(monkeypatch) == ["Says.attend_batched"]
    remembered(("says", "batched", True, 1.0))
    assert len(json.loads(file.read_text())) == 2, "that of the other versions is kept"


def test_the_packages_records_hold_for_a_kind_of_device_until_the_users_own(remembered, monkeypatch, tmp_path):
    kind = {
        **checked.place("meta"),
        "name": "another of its kind",
        "torch": ".".join(torch.__version__.split(".")[:2]) + ".99",
    }
    results = [{"attention": "says", "backend": "kernel", "passed": True, "seconds": 1.0}]
    checked.SHIPPED.write_text(json.dumps([{"place": kind, "results": results}]))
    assert choice(monkeypatch) == ["Kernel.attend"]
    remembered(("says", "batched", True, 1.0))
    assert choice(monkeypatch) == ["Says.attend_batched"]


@pytest.mark.parametrize("text", ["{", "3", '[{"place": 1, "results": []}]', "[{}]"])
def test_a_file_of_something_else_is_an_error(remembered, text):
    file = remembered()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"checked.json is not a record of checks .*delete it and run"):
        checked.records(file)


def test_the_packages_records_are_whole():
    for record in checked.records(checked.SHIPPED):
        assert set(checked.FIELDS) <= set(record["place"])
        assert {one["backend"] for one in record["results"]} <= {"batched", *backends.list_backends()}
