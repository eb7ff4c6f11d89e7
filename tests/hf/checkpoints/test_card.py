"""README.md beside a swapped model: what its attention is, what to install, how to load it; a user's own text stays."""

import types
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import attn_plugins as ap

FLAG = {"type": "linear", "feature_map": "hedgehog", "layers": [0, 1]}


def code_of(card):
    """What the card says to run, with names of folders put in."""
    return card.split("```python\n")[1].split("```")[0]


@torch.no_grad()
def test_a_saved_model_says_how_to_load_it(tmp_path):
    model, given = ap.swap_attention(tiny.build("llama"), FLAG), tiny.inputs("llama")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["attn-plugins", "attention-linear"]}
    assert "pip install attn-plugins" in card
    assert "linear in 2, own (sdpa) in 1" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == model.config.attn_plugin
    scope = {}
    exec(code_of(card).replace("path/to/this/folder", str(tmp_path)), scope)
    assert torch.equal(tiny.output(scope["model"], given), tiny.output(model, given))


@torch.no_grad()
@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_a_saved_adapter_says_how_to_load_it(tmp_path, how):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    model, given = ap.swap_attention(tiny.build("llama"), "local", window_size=3), tiny.inputs("llama")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if how == "peft":
        model = get_peft_model(model, settings).eval()
    else:
        model.add_adapter(settings)
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "PEFT alone refuses to load it" in card
    code = code_of(card).replace("path/to/this/folder", str(tmp_path / "adapter"))
    scope = {}
    exec(code.replace("its base model", str(tmp_path / "base")), scope)
    assert torch.equal(tiny.output(scope["model"], given), tiny.output(model.eval(), given))


def test_only_its_own_part_of_a_card_is_written_anew(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n")
    model = ap.swap_attention(tiny.build("llama"), "local", window_size=3)
    model.save_pretrained(tmp_path)
    first = path.read_text()
    assert first.startswith("---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n\n<!-- attn-plugins")
    assert "window_size: 3" in first
    path.write_text(first + "\nMore of mine.\n")
    ap.swap_attention(model, "linear").save_pretrained(tmp_path)
    second = path.read_text()
    assert second.endswith("<!-- /attn-plugins -->\n\nMore of mine.\n")
    assert "feature_map: hedgehog" in second
    assert "window_size" not in second
    assert second.count("## Attention") == 1
    ap.restore_attention(model).save_pretrained(tmp_path)
    assert path.read_text() == "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n\n\nMore of mine.\n"


def test_models_without_rules_and_other_processes_write_none(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = ap.swap_attention(tiny.build("llama"), "local")
    model.save_pretrained(tmp_path, is_main_process=False)
    model.save_pretrained(tmp_path, False)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "file").touch()
    model.save_pretrained(tmp_path / "file")  # transformers logs that it is no folder, and saves nothing


class Hub:
    """Takes what is sent, and has a card of the model already."""

    def create_repo(self, repo_id, **kwargs):
        return types.SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **kwargs):
        self.sent = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}

    def save(self, path):
        Path(path).write_text("A card from the hub.\n")


@pytest.mark.parametrize("adapter", [False, True])
def test_what_goes_to_the_hub_has_it_too(monkeypatch, adapter):
    """There, transformers writes a card of its own over what saving has written."""
    model, hub = ap.swap_attention(tiny.build("llama"), "local"), Hub()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", lambda *args, **kwargs: hub)
    model.push_to_hub("someone/something")
    assert hub.sent["README.md"].startswith(b"A card from the hub.\n\n<!-- attn-plugins")
    assert b"pip install attn-plugins" in hub.sent["README.md"]


class Nobody(Hub):
    """Has no card yet."""

    def load(self, *args, **kwargs):
        raise EntryNotFoundError("no README.md")


def test_a_first_push_is_found_by_its_tags(monkeypatch):
    """Those of the card that transformers makes where there is none."""
    model, hub = ap.swap_attention(tiny.build("llama"), "local"), Nobody()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", hub.load)
    model.push_to_hub("someone/something", tags=["mine"])
    card = hub.sent["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["mine", "attn-plugins", "attention-local"]}
    assert card.count("pip install attn-plugins") == 1
    dense = ap.restore_attention(model)
    dense.push_to_hub("someone/something")
    assert b"attn" not in hub.sent["README.md"]


@pytest.mark.parametrize("adapter", [False, True])
def test_what_trainer_pushes_has_it_too(tmp_path, monkeypatch, adapter):
    """It writes a card of its own over what saving has written, and pushes that."""
    model, hub = ap.swap_attention(tiny.build("llama"), "local"), Hub()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    sent = []
    hub.upload_folder = lambda folder_path, **named: sent.append((Path(folder_path) / "README.md").read_text())
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    Trainer(model, arguments).push_to_hub()
    (card,) = sent
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("peft" if adapter else "transformers")
    assert {"attn-plugins", "attention-local"} <= set(front["tags"])
    assert "### Training hyperparameters" in card
    assert card.count("pip install attn-plugins") == 1


def test_a_model_of_the_hub_is_named_as_the_base(tmp_path):
    model = ap.swap_attention(tiny.build("llama"), "local")
    for name, base in {"someone/something": "someone/something", str(tmp_path): None, "": None}.items():
        model.config.name_or_path = name
        model.name_or_path = name
        out = tmp_path / f"out{len(name)}"
        model.save_pretrained(out)
        front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
        assert front.get("base_model") == base
