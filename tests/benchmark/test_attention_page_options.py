"""What docs/generation.md shows works, and its table says of every attention what its cache holds."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from attn_plugins import HeadShape
from attn_plugins.benchmark.pages import attention_page
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.hf.caches.state_layer import StateLayer

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
TEXT = PAGE.read_text(encoding="utf8")


def test_the_python_runs(tmp_path, monkeypatch, capsys, one_thread):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, eos_token_id=None, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    source, replaced = re.subn(r"^path = .*$", "path = 'model'", "\n".join(blocks), flags=re.MULTILINE)
    assert replaced == 1
    names: dict = {}
    exec(compile(source, PAGE.name, "exec"), names)
    printed = re.findall(r"(\d+) tokens seen, (\d+) bytes", capsys.readouterr().out)
    assert [int(tokens) for tokens, _ in printed] == [719, 769, 819]
    assert len({size for _, size in printed}) == 1
    assert names["cache"].get_seq_length() == 601
    assert names["loaded"].get_seq_length() == 819
    assert all(isinstance(layer, StateLayer) for layer in names["cache"].layers)


@pytest.mark.of_the_registry
def test_the_table_holds_every_causal_attention_and_says_whether_its_cache_grows():
    rows = [line for line in TEXT.splitlines() if re.match(r"\| `", line)]
    told = {name: row.endswith("| yes |") for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    own = [name for name in list_attentions() if get_attention(name).__module__.startswith(attention_page.OWN)]
    assert set(told) == {name for name in own if get_attention(name).causal}
    for name, stays in told.items():
        cls = get_attention(name)
        sizes = {"num_heads": 2 * cls.heads_multiple_of, "num_key_value_heads": 1, "head_dim": 8, "value_dim": 8}
        attention = cls(cls.Config(), HeadShape(**sizes, hidden_size=12, layer=0))
        state = attention.new_state()
        assert stays == (state is not None and not state.grows), name
        ordinary = "in an ordinary layer" in next(row for row in rows if f"`{name}`" in row.split("|")[1])
        assert ordinary == (state is None), name
        assert state is None or attention.new_state(64).supports_fixed_length, name


def test_the_figures_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("long_document", PAGE.parent.parent / "examples" / "long_document.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    lines = [json.loads(line) for line in (PAGE.parent / "generation" / "results.jsonl").read_text().splitlines()]
    labels = [label.partition("=")[0] for label in example.ATTENTIONS]
    found = {label: [line["result"] for line in lines if line["attention"] == label] for label in labels}
    assert example.table(found) in TEXT


def test_the_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if ":" not in link]
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
