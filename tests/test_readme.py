"""What README.md shows works: its Python runs, in order, and its commands, files and make targets exist."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from attn_plugins.benchmark import attention_page as docs
from attn_plugins.cli import app
from attn_plugins.core import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")


@pytest.fixture
def clean_registry(monkeypatch):
    registry.list_attentions()
    monkeypatch.setattr(registry, "_attentions", dict(registry._attentions))


def test_the_python_runs(tmp_path, monkeypatch, clean_registry):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    source, replaced = re.subn(r"^path = .*$", "path = 'model'", "\n".join(blocks), flags=re.MULTILINE)
    assert replaced == 1
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)

    assert {row.plugin for row in names["ap"].describe_attention(names["plain"])} == {None}
    assert {row.plugin for row in names["ap"].describe_attention(names["model"])} == {"my_relu"}
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 64
    with torch.no_grad():
        before, after = (names["model"](input_ids=ids).logits[:, :8] for ids in (tokens, changed))
    torch.testing.assert_close(before, after)  # causal


def test_every_attention_is_named():
    own = [name for name in registry.list_attentions() if registry.get_attention(name).__module__.startswith(docs.OWN)]
    assert [name for name in own if f"`{name}`" not in README] == []


def test_the_commands_exist():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = set(re.findall(r"(?:attn-plugins|-m attn_plugins) ([a-z]+)", README))
    assert shown
    assert shown <= verbs


def test_every_make_target_is_listed_and_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) - {"help"} == targets, "a target without a ## line is not in `make help`"
    code = re.findall(r"`(make [^`]*)`", README) + re.findall(r"^make .*$", README, re.MULTILINE)
    shown = {re.sub(r"#.*|[A-Z]+=\S+|make", "", line).strip() for line in code}
    assert {"demo", "test"} <= shown
    assert shown <= targets


def test_the_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if ":" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
