"""Modules under their former names, which third parties' files import."""

import importlib
import sys

import pytest

import attn_plugins as ap
from attn_plugins.core.former_names import FORMER


@pytest.mark.parametrize(("old", "new"), FORMER.items())
def test_a_former_name_warns_and_holds_what_the_new_one_does(monkeypatch, old, new):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}; the old name goes with the next release"):
        module = importlib.import_module(old)
    expected = importlib.import_module(new)
    assert expected.__name__ == expected.__spec__.name == new
    for name, value in vars(expected).items():
        assert name.startswith("__") or getattr(module, name) is value


def test_a_third_partys_file_of_before_runs(monkeypatch):
    for old in FORMER:
        monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match="is now attn_plugins"):
        exec(
            "from attn_plugins.attention import Attention, AttentionConfig, HeadShape\n"
            "from attn_plugins.mask import AttentionMask\n"
            "from attn_plugins.ops.dense import expand_heads, scores\n"
            "from attn_plugins.ops import dense\n",
            held := {},
        )
    assert held["Attention"] is ap.Attention
    assert held["AttentionMask"] is ap.AttentionMask
    assert held["dense"].scores is held["scores"]
