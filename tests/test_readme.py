"""What README.md says of the project is so: its attentions, versions and picture."""

import importlib.util
import re

import pytest
from packaging.requirements import Requirement
from pages import ROOT, read
from test_packaging import pins
from test_pages import PROJECT

from attn_plugins.benchmark.pages import attention_page as docs
from attn_plugins.benchmark.pages.transfer_tables import CHOICES, RECALLED
from attn_plugins.core import registry

README = read("README.md")


@pytest.mark.of_the_registry
def test_every_attention_is_named():
    own = [name for name in registry.list_attentions() if registry.get_attention(name).__module__.startswith(docs.OWN)]
    assert [name for name in own if f"`{name}`" not in README] == []


def test_the_badges_say_what_the_project_declares():
    written = dict(re.findall(r"^!\[(.*?): (.*?)\]\(https://img\.shields\.io/badge/", README, re.MULTILINE))
    for name, value in written.items():
        shown = value.replace("-", "--").replace(" ", "_")
        assert f"/badge/{name}-{shown}-blue)" in README, f"the picture of {name} says something else than its text"
    pythons = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    oldest = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    ends = [pins(file)["transformers"].split(".") for file in ("constraints-oldest.txt", "constraints.txt")]
    assert written == {
        "licence": PROJECT["license"],
        "Python": f"{pythons[0]} to {pythons[-1]}",
        "PyTorch": f"{next(iter(oldest['torch'])).version} or newer",
        "transformers": " to ".join(f"{major}.{minor}" for major, minor, _ in ends),
    }
    assert f"Python {written['Python']}" in README


def test_the_picture_is_drawn_from_the_results(tmp_path):
    place = ROOT / "docs" / "first_page" / "figure.py"
    spec = importlib.util.spec_from_file_location("first_page_figure", place)
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    page = read("docs/transfer.md")
    for case, figures in figure.recalled().items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {CHOICES[case]} |"))
        for name, cell in zip(RECALLED, row.split("|")[2:], strict=False):
            assert float(cell.split()[0]) == round(figures[name], 2), (case, name)
    times = figure.decode_times()
    assert {len(points) for points in times.values()} == {5}
    figure.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
