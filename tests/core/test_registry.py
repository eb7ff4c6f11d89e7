"""The registry: the only list of attentions, open to third parties."""

import json
import os

import programs
import pytest

import attn_plugins as ap

PLUGIN = '''
{broken}
from attn_plugins import register_attention
from attn_plugins.attentions.softmax import SoftmaxAttention

@register_attention("{name}")
class Mine(SoftmaxAttention):
    """Softmax attention of somebody else."""
'''


def complete(name="mine_complete", **changes):
    from attn_plugins.attentions.softmax import SoftmaxAttention

    return type(name, (SoftmaxAttention,), {"__doc__": "One.", "__module__": __name__, "__qualname__": name, **changes})


def test_own_attentions_are_listed_and_found():
    names = ap.list_attentions()
    assert {"softmax", "local", "linear", "block_topk", "additive", "fastformer"} <= set(names)
    assert names == sorted(names)
    for name in names:
        assert ap.get_attention(name).name == name


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown attention 'softmacks' \(did you mean softmax\?\); known: .*local"):
        ap.get_attention("softmacks")
    with pytest.raises(ValueError, match="unknown attention 3; known"):
        ap.get_attention(3)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("softmax", complete(), "attention 'softmax' is already registered by attn_plugins.attentions.softmax"),
        ("my attention", complete(), "attention name 'my attention' is not an identifier"),
        ("mine", dict, "is not a subclass of attn_plugins.core.attention.Attention"),
        ("mine", complete(cost=None), "lacks: cost"),
        ("mine", complete(attend=ap.Attention.attend, __doc__=None), "lacks: __doc__, attend"),
        (
            "mine",
            complete(causal=False, bidirectional=False, cross=False),
            "lacks: one of causal, bidirectional, cross",
        ),
    ],
)
def test_incomplete_attentions_are_refused(name, cls, message):
    with pytest.raises(ValueError, match=message):
        ap.register_attention(name)(cls)
    assert "mine" not in ap.list_attentions()


@pytest.mark.parametrize("broken", [False, True])
def test_third_party_by_entry_point(tmp_path, broken):
    """An installed distribution with the entry point is picked up; a broken one is named and takes nothing down."""
    (tmp_path / "their_plugin.py").write_text(
        PLUGIN.format(name="theirs", broken="raise RuntimeError('oh')" if broken else "")
    )
    info = tmp_path / "their_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attn_plugins]\ntheirs = their_plugin\n")
    code = "import attn_plugins as ap, json; print(json.dumps(ap.list_attentions()))"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = programs.run("-c", code, env={"PYTHONPATH": path})
    names = json.loads(done.stdout.splitlines()[-1])
    assert ("theirs" in names) != broken
    assert "softmax" in names
    assert ("plug-in 'theirs' (their_plugin) could not be loaded: RuntimeError('oh')" in done.stderr) == broken
