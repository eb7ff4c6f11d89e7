"""What the pages that people read show works: their Python runs; commands, options, files and links exist."""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import re
import runpy
import shlex
import sys

import pytest
import torch
import typer
from conftest import tokenizer
from pages import PAGES, ROOT, anchors, blocks, links, prose, python
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from attn_plugins import describe_attention
from attn_plugins.cli import app
from attn_plugins.cli.serve import command as served
from attn_plugins.core import registry

toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf8")
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
VERBS = typer.main.get_command(app).commands


@pytest.fixture
def clean_registry(monkeypatch):
    registry.list_attentions()
    monkeypatch.setattr(registry.ATTENTIONS, "classes", dict(registry.ATTENTIONS.classes))


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    """An 18-layer Llama with its tokenizer; what a page writes goes beside it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 18, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return "model"


def plugins(model):
    return {row.plugin for row in describe_attention(model)}


def test_the_first_page_runs(model_folder):
    names = python("README.md", model_folder)
    assert plugins(names["model"]) == {None}
    windowed = AutoModelForCausalLM.from_pretrained("runs/windowed")
    assert {row.plugin: row.options["num_sink_tokens"] for row in describe_attention(windowed)} == {"local": 4}


def test_the_guide_to_python_runs(model_folder):
    names = python("docs/python.md", model_folder)
    assert plugins(names["plain"]) == {None}
    assert plugins(names["model"]) == {"linear", "local", None}
    assert names["model"].peft_config["default"].modules_to_save == ["attn_plugin"]


def test_the_attention_of_the_guide_is_one(model_folder, clean_registry):
    model = python("docs/own_attention.md", model_folder)["model"]
    assert plugins(model) == {"my_relu"}
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 64
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits[:, :8] for ids in (tokens, changed))
    torch.testing.assert_close(before, after)  # causal


def test_the_guide_to_inspection_runs(model_folder):
    names = python("docs/inspect.md", model_folder)
    assert [layer.path for layer in names["found"].layers] == [f"model.layers.{n}.self_attn" for n in (0, 2)]
    assert names["rolled"].weights_BqK.shape == names["rolled"].own_BqK.shape == (1, 1, 8)


def test_the_guide_to_structures_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = python("docs/structures.md", None)
    assert plugins(names["classifier"]) == plugins(names["model"]) == {"graph"}
    slots = [module.attn_plugin for module in names["classifier"].modules() if hasattr(module, "attn_plugin")]
    assert all(slot.config.required for slot in slots)
    assert names["out"].shape == (1, 5, 64)


def test_the_guide_to_images_runs():
    assert plugins(python("docs/images.md", None)["model"]) == {"axial"}


def test_the_guide_to_recurrent_models_runs():
    assert plugins(python("docs/recurrent.md", None)["model"]) == {"additive"}


def test_the_guide_to_transfer_runs(model_folder):
    names = python("docs/transfer.md", model_folder)
    assert names["report"].after < names["report"].before
    assert plugins(AutoModelForCausalLM.from_pretrained("runs/transferred")) == {"linear"}


def test_rows_longer_than_a_device_run_in_one_process_too(model_folder, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        names = python("docs/scale.md", model_folder)
    finally:
        torch.distributed.destroy_process_group()
    assert names["out"].logits.shape[:2] == (1, 1024)
    assert names["input_ids"].shape == (1, 1024)
    assert names["exchange"].bytes_sent == 0
    assert all(weight.grad is not None for weight in names["model"].parameters())


def test_the_guide_to_torch_modules_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = python("docs/torch_modules.md", None)
    assert plugins(names["model"]) == plugins(names["again"]) == {"linear"}
    rows = names["rows"]
    torch.testing.assert_close(names["again"].eval()(rows), names["model"].eval()(rows))
    assert names["out"].shape == names["hidden"].shape == (2, 500, 64)
    assert names["weights"].shape == (2, 500, 40)


SKETCHES = {"docs/design.md"}
"""Pages whose Python leaves parts out (``...``), so that it can only be parsed."""


def test_every_block_is_tested():
    run = {"README.md", "docs/python.md", "docs/own_attention.md", "docs/generation.md", "docs/transfer.md"}
    run |= {"docs/scale.md", "docs/inspect.md", "docs/torch_modules.md"}
    run |= {"docs/scale.md", "docs/inspect.md", "docs/structures.md", "docs/images.md", "docs/recurrent.md"}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "sh", "toml"), f"{page}: nothing tests {block.language!r}\n{block.text}"
            if block.language == "python":
                assert page in run | SKETCHES, f"{page}: nothing runs its Python"
                ast.parse(block.text)
            elif block.language == "toml":
                assert toml.loads(block.text)


def commands(page):
    """Command lines of the sh blocks, without comments, as lists of words."""
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


@functools.cache
def help_of(script):
    """What a script prints for --help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def wrong(words):
    """What in a command line does not exist, or None."""
    if words[0] == "make":
        targets = {word for word in words[1:] if "=" not in word}
        variables = {word.partition("=")[0] for word in words[1:] if "=" in word}
        unknown = (targets - TARGETS) | {name for name in variables if not re.search(rf"\b{name}\b", MAKEFILE)}
        return unknown or None
    if words[:2] == ["pip", "install"]:
        extras = {extra for word in words for extra in re.findall(r"\[(.*)\]", word)}
        unknown = extras - set(PROJECT["optional-dependencies"])
        unknown |= {word for word in words[2:] if word.startswith("./") and not (ROOT / word).is_dir()}
        return unknown or None
    if words[0] == "python" and words[1] != "-m":
        script = ROOT / words[1]
        if not script.is_file():
            return words[1]
        options = {word for word in words[2:] if word.startswith("--")}
        return options - set(re.findall(r"--[a-z-]+", help_of(script))) or None
    if words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
        place = words.index("-m") + 1
        options = dict(itertools.pairwise(words[:place]))
        if not (ROOT / options.get("--config_file", "")).exists():
            return options["--config_file"]
        words = words[place:]
    if words[0] in ("attn-plugins", "attn_plugins"):
        verb = VERBS.get(words[1])
        if verb is None:
            return words[1]
        verb = served() if words[1] == "serve" else verb
        known = {option for parameter in verb.params for option in parameter.opts}
        options = {word for word in words[2:] if word.startswith("-")}
        return None if words[1] == "run" else (options - known or None)
    return None if words[0] in ("pytest", "git", "cd") else f"nothing tests {words[0]!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_the_commands_exist(page):
    assert {" ".join(words): wrong(words) for words in commands(page) if wrong(words)} == {}


def test_commands_that_do_not_exist_are_found():
    planted = ["make tset", "make NOT=1 test", "attn-plugins lits", "attn-plugins list --jso", "python examples/no.py"]
    planted += ["python examples/stream.py --no", "pip install '.[no]'", "pip install ./no", "conda install x"]
    planted += ["accelerate launch --config_file configs/no.yaml -m attn_plugins list", "torchrun -m attn_plugins lits"]
    planted += ["accelerate launch -m attn_plugins finetun", "attn-plugins bench --attn local --no"]
    planted += ["attn-plugins serve MODEL --attn local --no 1"]
    assert [line for line in planted if not wrong(shlex.split(line))] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page):
    quoted = re.findall(r"`([^`\n]+)`", prose(page))
    verbs = {match for code in quoted for match in re.findall(r"^(?:.* -m attn_plugins|attn-plugins) ([a-z]+)", code)}
    targets = {match for code in quoted for match in re.findall(r"^make (?:[A-Z]+=\S+ )*([a-z-]+)", code)}
    assert verbs <= set(VERBS)
    assert targets <= TARGETS


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page):
    def missing(link):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            return True
        return bool(anchor) and anchor not in anchors(target.resolve().relative_to(ROOT).as_posix())

    assert [link for link in links(page) if missing(link)] == []


def test_every_make_target_is_listed():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) - {"help"} == TARGETS, "a target without a ## line is not in `make help`"


def test_every_page_is_reached_from_the_first():
    found, new = set(), {"README.md"}
    while new:
        page = new.pop()
        found.add(page)
        there = {((ROOT / page).parent / link.partition("#")[0]).resolve() for link in links(page)}
        new |= {path.relative_to(ROOT).as_posix() for path in there if path.suffix == ".md"} - found
    assert set(PAGES) - found == set()
