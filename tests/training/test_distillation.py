"""Distillation: the teacher is the model itself, and the loss is what its definition says."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import softmax
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.distillation import as_pretrained, distillation_loss
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
QUICK = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama_model(**options):
    config = LlamaConfig(vocab_size=40, num_key_value_heads=2, initializer_range=0.3, **SIZES, **options)
    return LlamaForCausalLM(config)


def with_lora(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["attn_plugin"])
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain(student, teacher, temperature=1.0):
    """KL by its definition, over the rows of two matrices of logits."""
    p, q = softmax(teacher.double() / temperature, -1), softmax(student.double() / temperature, -1)
    return (p * (p.log() - q.log())).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tune", ["new", "lora"])
@pytest.mark.parametrize("padded", [False, True])
def test_kl_equals_its_definition_with_a_teacher_of_its_own(monkeypatch, tune, temperature, padded):
    monkeypatch.setattr("attn_plugins.training.distillation.ELEMENTS", 3 * 40)  # several pieces, the last one shorter
    model = llama_model()
    teacher = copy.deepcopy(model).eval()
    ap.swap_attention(model, LINEAR)
    if tune == "lora":
        model = with_lora(model)
    else:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attn_plugin" in name)
    ids = torch.randint(40, (2, 10))
    real = torch.ones_like(ids)
    if padded:
        real[0, :3] = 0
    inputs = {"input_ids": ids, **({"attention_mask": real} if padded else {})}

    loss, output = distillation_loss(model, {**inputs, "labels": ids}, temperature=temperature)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert output.logits.shape == (2, 10, 40)

    model.zero_grad()
    with torch.no_grad():
        target = teacher(**inputs, use_cache=False).logits[real.bool()]
    wanted = plain(model(**inputs, use_cache=False).logits[real.bool()], target, temperature)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    assert got
    assert any("attn_plugin" in name for name in got)
    assert any("lora_" in name for name in got) == (tune == "lora")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_the_teacher_has_no_dropout_no_adapters_and_leaves_all_as_it_was():
    model = llama_model(attention_dropout=0.5)
    own = copy.deepcopy(model).eval()
    ap.swap_attention(model, "softmax")
    model = with_lora(model).train()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    ids = torch.randint(40, (2, 10))
    with as_pretrained(model):
        logits = model(input_ids=ids, use_cache=False).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits, own(input_ids=ids, use_cache=False).logits)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


def test_the_teacher_drops_nothing_anywhere():
    model = BertModel(BertConfig(vocab_size=40, hidden_dropout_prob=0.5, **SIZES), add_pooling_layer=False)
    own = copy.deepcopy(model).eval()
    ap.swap_attention(model, LINEAR).train()
    ids = torch.randint(40, (2, 10))
    with as_pretrained(model):
        torch.testing.assert_close(model(ids).last_hidden_state, own(ids).last_hidden_state)
    assert model.training
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hidden_states_are_compared_token_by_token(kind):
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=40, initializer_range=0.3, **SIZES), add_pooling_layer=False).eval()
    else:
        model = llama_model().eval()
    teacher = copy.deepcopy(model)
    ap.swap_attention(model, LINEAR)
    ids, real = torch.randint(40, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    real[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": real}
    loss, _ = distillation_loss(model, inputs, loss="hidden")

    def states(one):
        return one.base_model(**inputs).last_hidden_state[real.bool()].double()

    with torch.no_grad():
        target = states(teacher)
    wanted = ((states(model) - target).square().sum(-1) / target.square().sum(-1)).mean()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    loss.backward()
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "attn_plugin" in name)


def test_images_are_no_texts():
    model = ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES), add_pooling_layer=False).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    wanted = model(**inputs).last_hidden_state
    ap.swap_attention(model, LINEAR)
    loss, output = distillation_loss(model, inputs, loss="hidden")
    error = (output.last_hidden_state - wanted).square().sum(-1) / wanted.square().sum(-1)
    torch.testing.assert_close(loss, error.mean())
    with pytest.raises(ValueError, match=r"loss='kl' needs logits, and a BaseModelOutput.* has none; .* 'hidden'"):
        distillation_loss(model, inputs)


def test_a_model_that_is_not_swapped_has_no_teacher():
    with pytest.raises(
        ValueError, match="no attention module of this LlamaForCausalLM is swapped: it is its own teach"
    ):
        distillation_loss(llama_model(), {"input_ids": torch.randint(40, (1, 4))})


def settings(folder, rows, out, **changes):
    tree = {
        "model": folder,
        "data": {"source": rows},
        "output_dir": str(out),
        "attention": LINEAR,
        "block_size": 16,
        "training": QUICK,
        "evaluation": {"length": 16, "max_tokens": 64},
        "loss": "kl",
    }
    return build(FinetuneConfig, {**tree, **changes})


@pytest.mark.parametrize("loss", ["kl", "hidden"])
@pytest.mark.parametrize("tune", ["new", "lora"])
def test_a_fine_tune_takes_the_loss(llama, text, tmp_path, loss, tune):
    lora = {"lora": {"r": 2, "target_modules": ["q_proj"]}} if tune == "lora" else {}
    run = prepare_finetune(settings(llama, text, tmp_path, loss=loss, tune=tune, **lora))
    first = next(iter(run.trainer.get_train_dataloader()))
    with torch.no_grad():
        wanted, _ = distillation_loss(run.trainer.model, first, loss=loss)
    run = prepare_finetune(settings(llama, text, tmp_path, loss=loss, tune=tune, **lora))
    metrics = run.run(None)
    assert metrics["stage"] == "distill"
    assert metrics["loss"] == loss
    assert metrics["train"]["losses"][0]["loss"] == pytest.approx(float(wanted), abs=1e-4)
    assert run.trainer.args.learning_rate == (5e-3 if tune == "new" else 2e-3)
    card = (tmp_path / "README.md").read_text()
    assert "Distilled from itself with its own attention" in card
    if tune == "new":
        base, saved = load_file(Path(llama) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(weight, saved[name]) for name, weight in base.items())


def test_batches_of_a_step_weigh_as_one(llama, text, tmp_path):
    losses = []
    for batch, steps in ((4, 1), (2, 2)):
        training = {**QUICK, "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        run = prepare_finetune(settings(llama, text, tmp_path / str(batch), tune="new", training=training))
        losses.append([entry["loss"] for entry in run.run(None)["train"]["losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "full"}, "loss='kl' holds the model to itself .* tune='full' would change that along with it"),
        ({"attention": None}, "loss='kl' holds the model to itself .* and attention is null, its own"),
        ({"loss": "task", "temperature": 2.0}, "temperature=2.0 goes with loss='kl', not with loss='task'"),
        ({"temperature": 0.0}, "temperature=0.0; allowed: greater than 0"),
        ({"loss": "mse"}, "loss='mse'"),
    ],
)
def test_a_wrong_loss_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("nowhere", "nothing.jsonl", "out", **changes)


def test_what_has_no_teacher_is_refused_before_training(llama, bert, text, labelled, tmp_path):
    with pytest.raises(ValueError, match="has no other; name an attention, or take loss='task'"):
        prepare_finetune(settings(llama, text, tmp_path, attention="as-saved"))
    changes = {"task": "classification", "evaluation": {"batch_size": 4}}
    with pytest.raises(ValueError, match=r"has no weights for classifier.bias, .*; allowed here: loss='task'"):
        prepare_finetune(settings(bert, labelled, tmp_path, **changes))


def test_stages_follow_each_other_and_the_card_tells_them(llama, text, tmp_path):
    prepare_finetune(settings(llama, text, tmp_path / "one", tune="new", evaluate_before=True)).run(None)
    lora = {"attention": "as-saved", "lora": {"target_modules": ["q_proj"]}}
    two = prepare_finetune(settings(str(tmp_path / "one"), text, tmp_path / "two", **lora)).run(None)
    three = prepare_finetune(
        settings(str(tmp_path / "two"), text, tmp_path / "three", attention="as-saved", loss="task")
    ).run(None)
    assert [stage["stage"] for stage in three["history"]] == ["distill", "distill"]
    assert two["base_model"] == three["base_model"] == llama, "an adapter brings the slots along"
    card = (tmp_path / "three" / "README.md").read_text()
    assert "1. distill (kl), new weights alone: 3 steps, 6 rows of" in card
    assert "2. distill (kl), LoRA and new weights: 3 steps" in card
    first = three["history"][0]["evaluation"]
    assert f"perplexity {first['before']['perplexity']:.4g} before, {first['after']['perplexity']:.4g} after" in card
    adapter = json.loads((tmp_path / "three" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == llama
