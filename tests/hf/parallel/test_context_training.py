"""Training on rows that processes have parts of: losses, gradients and weights are those of one process."""

import json
import random
from types import SimpleNamespace

import context_trainer_program
import fleet
import programs
import pytest
import torch
import yaml
from conftest import WORDS, tokenizer, write_rows
from fleet import Launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

import attn_plugins as ap


def test_trainer_with_parts_and_with_other_rows_beside_them(tmp_path):
    done = programs.run(context_trainer_program.__file__, tmp_path, 1, 2, "2x2")
    assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "1x1-0.json").read_text())
    assert one["kind"] == "LlamaForCausalLM"
    names = [f"2x1-{rank}" for rank in range(2)] + [f"2x2-{rank}" for rank in range(4)]
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["kind"] == "FSDPLlamaForCausalLM"
        for figure in ("loss", "grad_norm", "eval_loss"):
            assert found[figure] == pytest.approx(one[figure], abs=1e-5), (name, figure)


def test_trainer_is_refused_what_it_would_do_with_parts_as_with_whole_rows():
    """Before its own function is asked, which would cut the rows."""
    model = ap.swap_attention(LlamaForCausalLM(LlamaConfig(**context_trainer_program.SIZES)), "local")
    config = SimpleNamespace(cp_enabled=True)
    for smoother, metrics, message in (
        (object(), None, "label_smoothing_factor moves labels by one within a part; allowed: 0"),
        (None, object(), "compute_metrics would get logits of parts"),
    ):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(parallelism_config=config), label_smoother=smoother, compute_metrics=metrics
        )
        with pytest.raises(ValueError, match=message):
            Trainer._prepare_context_parallel_inputs(trainer, model.eval(), {})
    with pytest.raises(ValueError, match=r"predict\(\) and compute_metrics would get logits of parts"):
        Trainer.prediction_step(trainer, model, {}, False)


@pytest.fixture
def finetune(tmp_path):
    """A launch of a fine-tune into a folder of its own name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    chance = random.Random(0)
    write_rows(tmp_path / "text.jsonl", [{"text": " ".join(chance.choices(WORDS, k=24))} for _ in range(32)])
    tree = {
        "model": str(tmp_path / "model"),
        "data": {"source": str(tmp_path / "text.jsonl")},
        "tune": "full",
        "block_size": 32,
        "recall": False,
        "evaluation": {"length": 32, "max_tokens": 96},
        "training": {
            **{"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.03, "adam_epsilon": 1e-3},
            **{"disable_tqdm": True, "per_device_train_batch_size": 4},
        },
    }

    def made(name, attention, processes=1, *options):
        changes = {"attention": attention, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**tree, **changes}))
        return Launch(
            name=name,
            arguments=["finetune", "--config", str(tmp_path / f"{name}.yaml")],
            processes=processes,
            file="configs/accelerate/context_parallel.yaml" if processes > 1 else None,
            options=list(options),
        )

    return made


SERVED = [{"type": "local", "window_size": 12, "layers": 0}, {"type": "gated_delta", "layers": 1}]
"""The last layer keeps the model's own attention."""


@pytest.mark.slow
def test_a_fine_tune_by_the_file_for_accelerate(finetune, tmp_path):
    """On four processes as the file says, and on two rows at a time with two processes each."""
    pairs = ["--parallelism_config_cp_size", "2", "--parallelism_config_dp_shard_size", "2"]
    alone, parts, both, refused = fleet.train(
        tmp_path,
        [
            finetune("alone", SERVED),
            finetune("parts", SERVED, 4),
            finetune("both", SERVED, 4, *pairs),
            finetune("refused", {"type": "topk"}, 2, "--parallelism_config_cp_size", "2"),
        ],
    )
    for done in (alone, parts):
        assert done.statuses == [0] * done.processes, done.said
    assert both.statuses == [0] * 4, both.said
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())["train"] for name in ("alone", "parts"))
    for before, after in zip(one["losses"], other["losses"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "parts"))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert {row.plugin for row in ap.describe_attention(model)} == {"local", "gated_delta", None}
    assert refused.statuses != [0, 0]
    assert "attention 'topk' of model.layers.0.self_attn cannot attend there; those that can: " in refused.said
