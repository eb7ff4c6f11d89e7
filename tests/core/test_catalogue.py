"""What is read from the sources of attentions is what their classes say; what sources do not tell is not guessed."""

import shutil

import pytest

from attn_plugins.core import catalogue
from attn_plugins.core.capabilities import CAPABILITIES
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.tasks import list_tasks, trained_tasks

ATTRIBUTES = ("family", "cost", "paper", "when", "keeps", *CAPABILITIES)


def test_the_sources_tell_what_the_classes_of_the_registry_say():
    own = [name for name in list_attentions() if get_attention(name).__module__.startswith("attn_plugins.attentions.")]
    said = [{one: getattr(get_attention(name), one) for one in ("name", *ATTRIBUTES)} for name in own]
    assert catalogue.from_sources(ATTRIBUTES) == said, "list would import torch, or show something else"


def test_the_sources_tell_the_tasks_of_the_registry():
    assert catalogue.task_names() == list_tasks()
    assert catalogue.task_names(trained=True) == list(trained_tasks())


def test_another_package_is_asked_for_its_attentions(monkeypatch):
    monkeypatch.setattr(catalogue.metadata, "entry_points", lambda group: [group])
    monkeypatch.setattr(catalogue, "from_sources", lambda attributes: pytest.fail("the sources are not all there is"))
    assert [one["name"] for one in catalogue.declared(["cost"])] == list_attentions()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the package's sources, to which a test adds an attention."""
    for folder in ("core", "attentions", "ops"):
        shutil.copytree(catalogue.PACKAGE / folder, tmp_path / folder)
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    return tmp_path / "attentions"


def added(sources, text, attributes=("cost", "causal", "cross")):
    (sources / "added.py").write_text(text)
    catalogue._parsed.cache_clear()
    found = catalogue.from_sources(attributes)
    return found and next(one for one in found if one["name"] == "added")


CLASS = """
from attn_plugins.core.attention import Attention

@register_attention("added")
class Added({base}):
    {body}
"""


def test_bases_and_all_forms_of_assignment_are_read(sources):
    assert added(sources, CLASS.format(base="Attention", body='cost, causal = "a", True')) == {
        "name": "added",
        "cost": "a",
        "causal": True,
        "cross": False,  # as the base class has it
    }
    between = 'class Between(Attention):\n    causal = cross = True\n    cost: str = "b"\n'
    assert added(sources, between + CLASS.format(base="Between", body="cross = False")) == {
        "name": "added",
        "cost": "b",
        "causal": True,
        "cross": False,
    }


@pytest.mark.parametrize(
    ("base", "body"),
    [
        ("Attention", 'cost = "a" + str(1)'),
        ("Attention", "cost = COST"),
        ("Attention", "cost = f'{1}'"),
        ("Attention", "@classproperty\n    def cost(cls): ..."),
        ("Attention", "@property\n    def causal(self): ...\n    cost = 'a'"),
        ("Elsewhere", 'cost = "a"'),
        ("Attention", "family, cost = FAMILY_AND_COST"),
        ("Attention, Elsewhere", "cost = 'a'"),
    ],
)
def test_what_a_class_computes_is_asked_from_the_registry(sources, base, body):
    assert added(sources, CLASS.format(base=base, body=body)) is None
