"""Models without weights: a config that a run trains from scratch, as any other model from then on."""

import json

import pytest
import torch
import yaml
from conftest import KillAt
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.benchmark.cost.plan import Machines, make_plan
from attn_plugins.benchmark.suites.kinds import unfit
from attn_plugins.core.options import build
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load, load_blank, resolve, skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
LLAMA = {"model_type": "llama", "vocab_size": 32, **HEADS, "num_key_value_heads": 2, "max_position_embeddings": 32}
BERT = {"model_type": "bert", **HEADS, "tokenizer": "bytes", "max_position_embeddings": 96}
LOCAL, HEDGEHOG = {"type": "local", "window_size": 4}, {"type": "linear", "feature_map": "hedgehog"}
ROWS = {"length": 16, "vocab_size": 32, "pairs": [1, 2], "train_rows": 60, "rows": 20}
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 5, "logging_steps": 1, "save_strategy": "no"}


def settings(out, **changes):
    tree = {"model": LLAMA, "task": "associative-recall", "options": ROWS, "tune": "full", "training": TRAINING}
    return build(FinetuneConfig, {**tree, "attention": LOCAL, "output_dir": str(out), **changes})


def spelled(**changes):
    return json.dumps({**LLAMA, **changes})


def test_it_trains_and_comes_back_from_disk(tmp_path):
    metrics = prepare_finetune(settings(tmp_path / "out")).run(None)
    assert metrics["parameters"]["trained"] == metrics["parameters"]["total"]
    evaluation = {"task": "associative-recall", **ROWS}
    found = prepare_evaluation(build(EvaluateConfig, {"model": str(tmp_path / "out"), "evaluation": evaluation})).run()
    assert found["result"] == metrics["evaluation"]["after"]
    assert found["attention"]["modules"] == {"local": 2}
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card
    for said in ("# a new llama (hidden_size 16,", "Trained from scratch", "Data: made-by-the-task\n"):
        assert said in card
    again = settings(tmp_path / "more", model=str(tmp_path / "out"))
    (before,) = prepare_finetune(again).run(None)["history"]
    assert before["train"]["steps"] == 4, "what it is trained for next knows what it began from"


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    training = {**TRAINING, "save_strategy": "steps", "save_steps": 2}
    whole = prepare_finetune(settings(tmp_path / "whole", training=training)).run(None)
    killed = prepare_finetune(settings(tmp_path / "killed", training=training))
    killed.trainer.add_callback(KillAt(3))
    with pytest.raises(KeyboardInterrupt):
        killed.run(None)
    metrics = prepare_finetune(settings(tmp_path / "killed", training=training), resume=True).run(None)
    assert metrics["train"]["resumed_from"].endswith("checkpoint-2")
    assert metrics["evaluation"]["after"] == whole["evaluation"]["after"]
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("killed", "whole"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    with pytest.raises(ValueError, match=r"holds a run with other settings: model; a run goes on"):
        prepare_finetune(settings(tmp_path / "killed", model={**LLAMA, "hidden_size": 32}), resume=True)


def test_weights_follow_from_the_seed_whatever_the_attention():
    def weights(seed, attention):
        model = load(spelled(), attention=attention, kind="causal-tokens", seed=seed).model
        return {name: value for name, value in model.state_dict().items() if "attn_plugin" not in name}

    dense = weights(0, None)
    for attention in ("local", HEDGEHOG):
        assert all(torch.equal(dense[name], value) for name, value in weights(0, attention).items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(dense[name], weights(1, None)[name])
    assert dense[name].std().item() == pytest.approx(0.02, rel=0.2)
    wide = load(spelled(initializer_range=0.1), kind="causal-tokens").model.state_dict()
    assert wide[name].std().item() == pytest.approx(0.1, rel=0.2)


def test_weights_of_the_attention_have_their_initial_values(tmp_path):
    load(spelled(), kind="causal-tokens").model.save_pretrained(tmp_path)
    new, read = (
        load(source, attention="gated_delta", kind="causal-tokens").model for source in (spelled(), str(tmp_path))
    )
    slots = {name: value for name, value in new.named_parameters() if "attn_plugin" in name}
    assert len(slots) == 14
    assert any(value.any() for value in slots.values())
    assert all(torch.equal(value, read.get_parameter(name)) for name, value in slots.items())


def test_bytes_are_tokens_without_any_file(labelled, tmp_path):
    changes = {"model": BERT, "task": "classification", "options": {}, "data": {"source": labelled}}
    config = settings(tmp_path / "out", **changes, max_length=64, training={**TRAINING, "max_steps": 2})
    run = prepare_finetune(config)
    model, maker = run.loaded.model, run.loaded.processing
    assert model.config.vocab_size == len(maker) == 259, "bytes and three special tokens"
    assert (model.config.pad_token_id, model.config.num_labels) == (0, 3)
    metrics = run.run(None)
    read, back = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForSequenceClassification
    assert read("naïve").input_ids == [*(3 + byte for byte in "naïve".encode()), 1]
    assert back.from_pretrained(tmp_path / "out").config.id2label == {0: "minus", 1: "none", 2: "plus"}
    tree = {"model": str(tmp_path / "out"), "data": {"source": labelled}}
    tree["evaluation"] = {"task": "accuracy", "max_length": 64}
    found = prepare_evaluation(build(EvaluateConfig, tree)).run()
    assert found["result"] == pytest.approx(metrics["evaluation"]["after"], rel=1e-5)


LSTM = {
    "model_type": "recurrent_seq2seq",
    "hidden_size": 64,
    "dropout": 0.0,
    "tokenizer": {"train": "bpe", "vocab_size": 280},
}


def test_a_tokenizer_is_trained_on_the_rows_of_a_fine_tune(tmp_path):
    pairs = [
        {"translation": {"en": f"{one} {other}", "fr": f"{other} naïve {one}"}}
        for one in ("reading", "writing", "telling")
        for other in ("letters", "numbers", "pictures")
    ]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf8")
    columns = {"source_column": "translation.en", "target_column": "translation.fr"}
    changes = {
        "model": LSTM,
        "attention": {"type": "additive", "initial_gate": 1.0, "roles": ["cross"]},
        "task": "translation",
        "options": {"max_source_length": 32, "max_target_length": 32, "lengths": [1]},
        "data": {"source": str(rows), "eval_source": str(rows), **columns},
        "training": {**TRAINING, "max_steps": 80, "per_device_train_batch_size": 9, "learning_rate": 0.02},
    }
    plan = make_plan(settings(tmp_path / "out", **changes), Machines())
    metrics = prepare_finetune(settings(tmp_path / "out", **changes)).run(None)
    assert plan.parameters == metrics["parameters"]
    after = metrics["evaluation"]["after"]
    assert after["chrf"] > 90, "it has learnt nine pairs"
    assert [(part["length"], part["rows"]) for part in after["by_length"]] == [("2-", 9)]
    maker = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve letters telling 中"
    assert maker.decode(maker(text).input_ids, skip_special_tokens=True) == text
    assert maker(text).input_ids[-1] == maker.eos_token_id == 2
    assert len(maker("letters").input_ids) < len("letters"), "what comes often is a token"
    assert maker.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    tree = {"model": str(tmp_path / "out"), "data": changes["data"]}
    tree["evaluation"] = {"task": "translation", **changes["options"]}
    found = prepare_evaluation(build(EvaluateConfig, tree)).run()
    assert found["result"]["chrf"] == pytest.approx(after["chrf"])
    with pytest.raises(ValueError, match="trained on the rows of a fine-tune, and there are none here"):
        load(json.dumps(LSTM), kind="text-to-text")


def test_a_tokenizer_of_a_folder_and_fields_that_were_given_stay(llama):
    named = {**LLAMA, "tokenizer": llama, "vocab_size": 64, "pad_token_id": 7}
    model, maker = (lambda made: (made.model, made.processing))(load(json.dumps(named)))
    assert len(maker) == 20
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (64, 7, 2)
    del named["vocab_size"]
    assert load(json.dumps(named)).model.config.vocab_size == 20


def test_a_model_is_compared_from_a_file_or_a_mapping(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(LLAMA))
    tree = {
        "models": {"tiny": str(file)},
        "attentions": {"dense": None, "local": LOCAL},
        "untrained": False,
        "finetune": {"task": "associative-recall", "options": ROWS, "tune": "full", "training": TRAINING},
        "seeds": [0, 1],
        "output_dir": str(tmp_path / "out"),
    }
    config = build(CompareConfig, tree)
    keys = [cell.key for cell in cells(config)]
    assert keys == [cell.key for cell in cells(build(CompareConfig, {**tree, "models": {"other": LLAMA}}))]
    wider = {"tiny": {**LLAMA, "hidden_size": 32}}
    assert not set(keys) & {cell.key for cell in cells(build(CompareConfig, {**tree, "models": wider}))}
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None)
    assert {record["status"] for record in results.records.values()} == {"ok"}
    tables, files = write_report(config, results)
    assert tables[0].header[2:5] == ["accuracy", "1 pairs", "2 pairs"]
    assert len({record["result"]["figures"]["loss"] for record in results.records.values()}) == 4, "seeds differ"
    assert "- Model tiny: a new llama (hidden_size 16," in files[0].read_text()
    with pytest.raises(ValueError, match=r"models.tiny has no weights, and says nothing untrained; allowed: untr"):
        build(CompareConfig, {**tree, "untrained": True})
    with pytest.raises(ValueError, match=r"models.tiny: model: model_type='lama' \(did you mean llama\?\)"):
        build(CompareConfig, {**tree, "models": {"tiny": {**LLAMA, "model_type": "lama"}}})


def test_it_is_looked_at_and_planned_without_weights(tmp_path):
    assert {parameter.device.type for parameter in skeleton(spelled()).parameters()} == {"meta"}
    blank = load_blank(spelled(), attention=HEDGEHOG, kind="causal-tokens")
    assert blank.model.config.attn_plugin is not None
    config = settings(tmp_path / "out", attention=HEDGEHOG)
    plan = make_plan(config, Machines())
    metrics = prepare_finetune(config).run(None)
    assert (plan.parameters, plan.attention) == (metrics["parameters"], metrics["attention"]["modules"])
    assert unfit(spelled(), "causal-tokens", "decoder") is None
    assert unfit(spelled(), "masked-lm", None) == "it is of type llama, of which transformers has no masked-lm model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "model: model_type is missing; got nothing"),
        ({"hidden_size": 8}, "model: model_type is missing; got hidden_size"),
        ({"model_type": "lamma"}, r"model: model_type='lamma' \(did you mean .*\?\); allowed: a type of model that tr"),
        ({"model_type": 3}, "model: model_type=3; allowed: a type of model"),
        ({**LLAMA, "hiden_size": 8}, r"model: llama has no field 'hiden_size' \(did you mean hidden_size\?\) in its"),
        ({**LLAMA, "_name": 8}, "model: llama has no field '_name'"),
        ({**LLAMA, "hidden_size": "wide"}, "model: transformers makes no config of llama: .*hidden_size"),
        ({**LLAMA, "tokenizer": 3}, "model: tokenizer=3 is of type int; allowed: str; 'bytes' needs no files"),
        ({**LLAMA, "tokenizer": {"train": "wordpiece"}}, "tokenizer.train='wordpiece'"),
        ({**LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 99}}, "vocab_size=99; allowed: at least 259"),
        (3, "model=3 is of type int; allowed: str"),
        ("none.yaml", "cannot read model none.yaml: No such file"),
        ("{a: [}", "model: not valid YAML"),
    ],
)
def test_one_line_says_what_is_wrong_in_a_config(model, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        settings(tmp_path / "out", model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "lora"}, "tune='lora' keeps weights, and the model has none; allowed here: tune='full'"),
        ({"tune": "new"}, "tune='new' keeps weights"),
        ({"data": {"source": "x.jsonl"}}, "task='associative-recall' makes its rows itself; leave data out"),
        ({"task": "causal-lm", "options": {}}, "data is missing; task='causal-lm' reads rows with text_column"),
    ],
)
def test_what_goes_with_it_is_said_before_anything_is_read(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "causal-lm", "options": {}, "data": {"source": "TEXT"}}, "names no tokenizer, and a causal-lm model"),
        ({"model": {"model_type": "vit"}}, "is of type vit, of which transformers has no causal-tokens model"),
        ({"model": {**LLAMA, "pad_token_id": 99}}, "transformers makes no model of .*[Pp]adding"),
        ({"model": {**LLAMA, "vocab_size": 16}}, "vocab_size=32; allowed: at most 16, the model's vocab_size"),
        ({"model": {**LLAMA, "max_position_embeddings": 8}}, "length=16; allowed: at most 8, the model's max_position"),
        ({"attention": {"type": "local", "layers": 7}}, "layers=7 is out of range"),
    ],
)
def test_what_the_model_cannot_do_is_said_in_one_line(changes, message, text, tmp_path):
    if "data" in changes:
        changes = {**changes, "data": {"source": text}}
    with pytest.raises(ValueError, match=message) as caught:
        prepare_finetune(settings(tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)


def test_what_needs_weights_refuses_it(tmp_path):
    tree = {"model": spelled(), "evaluation": {"task": "associative-recall", **ROWS}}
    with pytest.raises(ValueError, match=r"holds no weights for .*, so associative-recall would say nothing of it"):
        prepare_evaluation(build(EvaluateConfig, tree))
    with pytest.raises(ValueError, match="is a config without weights; allowed here: a folder, a name on the hub"):
        resolve(spelled())
    with pytest.raises(ValueError, match="has no weights, and a image-to-text model needs more than a config"):
        load(spelled(), kind="image-to-text")
