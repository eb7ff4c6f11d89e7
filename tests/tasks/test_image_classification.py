"""Classes of pictures: figures by hand, sizes that a model was not trained on, heads with other classes."""

import json
import shutil
from pathlib import Path

import pictured
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file

from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = get_task("image-classification")
NEAR = {"type": "neighborhood_2d", "kernel_size": 3}
SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return pictured.pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A classifier of five classes, which no table here has."""
    return pictured.vit(tmp_path_factory.mktemp("vit"), tf.ViTForImageClassification, num_labels=5)


def settings(model, table, out, **changes):
    tree = {"model": model, "data": {"source": table}, "output_dir": str(out), "attention": NEAR, "training": SMALL}
    return build(FinetuneConfig, {**tree, "task": "image-classification", **changes})


def evaluated(model, table, **changes):
    tree = {"model": str(model), "data": {"source": table}, "evaluation": {"task": "image-classification"}}
    return prepare_evaluation(build(EvaluateConfig, {**tree, **changes})).run()


def test_accuracy_is_that_of_pictures_one_by_one(table, tmp_path):
    labels = {0: "blue", 1: "green", 2: "red"}
    changes = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    folder = pictured.vit(tmp_path / "vit", tf.ViTForImageClassification, **changes)
    loaded = load(folder, kind="image-classification")
    train, _ = load_data(DataConfig(source=table), TASK.columns)
    data = train.select(range(11))
    right = loss = 0
    for row in data:
        with Image.open(row["image"]["path"]) as file, torch.no_grad():
            logits = loaded.model(**loaded.processing(file.convert("RGB"), return_tensors="pt")).logits[0]
        number = loaded.model.config.label2id[row["label"]]
        right += int(logits.argmax() == number)
        loss -= logits.log_softmax(-1)[number].item()
    for size in (1, 4):
        task = TASK(TASK.Config(batch_size=size))
        found = run_task(task, loaded.model, task.prepare(data, loaded.processing, loaded.model))
        assert found["accuracy"] == pytest.approx(right / 11)
        assert found["loss"] == pytest.approx(loss / 11, rel=1e-5)
        assert (found["rows"], found["majority"]) == (11, max(map(data["label"][:].count, labels.values())) / 11)
    few = TASK(TASK.Config(max_rows=5, batch_size=2)).prepare(data, loaded.processing, loaded.model)
    assert [len(batch["labels"]) for batch in few] == [2, 2, 1]


def test_a_swapped_classifier_learns_at_a_size_above_its_own(vit, table, tmp_path):
    training = {**SMALL, "max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 0.003}
    training |= {"eval_strategy": "steps", "eval_steps": 40}
    changes = {"tune": "full", "options": {"image_size": 24}, "training": training, "evaluate_before": True}
    run = prepare_finetune(settings(vit, table, tmp_path / "out", **changes))
    metrics = run.run(None)
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    assert after["accuracy"] == 1.0 > before["accuracy"]
    losses = [entry["loss"] for entry in metrics["train"]["losses"]]
    assert losses[-1] < losses[0] / 2
    assert metrics["train"]["row"] == "picture"
    (told,) = (entry for entry in run.trainer.state.log_history if "eval_accuracy" in entry)
    assert (told["eval_accuracy"], told["eval_loss"]) == pytest.approx((after["accuracy"], after["loss"]), rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    again = evaluated(tmp_path / "out", table)  # at the size that was saved, without a word on it
    assert again["result"] == pytest.approx(after, rel=1e-5)
    assert again["attention"]["modules"] == {"neighborhood_2d": 2}
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]["height"] == 24
    smaller = evaluated(tmp_path / "out", table, evaluation={"task": "image-classification", "image_size": 16})
    assert smaller["result"]["loss"] != pytest.approx(after["loss"], rel=1e-5)


@pytest.mark.parametrize("attention", [NEAR, None], ids=["swapped", "own"])
def test_lora_trains_the_head_whole_and_brings_it(vit, table, tmp_path, attention):
    changes = {"attention": attention, "lora": {"r": 2}, "options": {"image_size": 24}}
    metrics = prepare_finetune(settings(vit, table, tmp_path / "out", **changes)).run(None)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved["base_model.model.classifier.weight"].shape == (3, 32)
    assert not any("classifier" in name and "lora" in name for name in saved)
    adapted = {name.split(".")[-3] for name in saved if "lora_B" in name and saved[name].any()}
    assert adapted >= {"v_proj", "o_proj"} if attention else adapted >= {"q_proj", "v_proj", "fc1"}
    again = evaluated(tmp_path / "out", table)
    assert again["result"] == pytest.approx(metrics["evaluation"]["after"], rel=1e-5)


def test_a_head_of_other_classes_of_the_same_number_trains_under_lora(table, tmp_path):
    folder = pictured.vit(tmp_path / "vit", tf.ViTForImageClassification, num_labels=3)
    before = load_file(tmp_path / "vit" / "model.safetensors")["classifier.weight"]
    prepare_finetune(settings(folder, table, tmp_path / "out")).run(None)
    head = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert not torch.equal(head, before)


def test_a_mirror_image_is_a_row_of_its_own(vit, table, tmp_path):
    train, _ = load_data(DataConfig(source=table), TASK.columns)
    picture = Image.new("RGB", (16, 16))
    picture.putpixel((2, 5), (255, 255, 255))
    picture.save(tmp_path / "one.png")
    data = train.select([0]).map(lambda row: {"image": {"path": str(tmp_path / "one.png"), "bytes": None}})
    data = data.cast(train.features)
    loaded = load(vit, kind="image-classification", labels=["blue", "green", "red"])
    made = TASK(TASK.Config(mirrored=True)).examples(data, loaded.processing, loaded.model)
    assert len(made) == 2
    assert torch.equal(made[1]["pixel_values"], made[0]["pixel_values"].flip(-1))
    assert not torch.equal(made[1]["pixel_values"], made[0]["pixel_values"])
    assert len(TASK().examples(data, loaded.processing, loaded.model)) == 1


def test_pictures_come_in_the_models_dtype(vit, table):
    loaded = load(vit, kind="image-classification", labels=["blue", "green", "red"], dtype="bfloat16")
    data, _ = load_data(DataConfig(source=table), TASK.columns)
    task = TASK(TASK.Config(batch_size=3, max_rows=4))
    rows = task.examples(data, loaded.processing, loaded.model)
    collate = task.collator(loaded.processing, loaded.model)
    measured = task.prepare(data, loaded.processing, loaded.model)
    batches = [collate([rows[0], rows[1]]), *measured]
    assert [batch["pixel_values"].dtype for batch in batches] == [torch.bfloat16] * 3
    assert run_task(task, loaded.model, measured)["rows"] == 4


def dinov2():
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**pictured.SIZES, num_labels=3))


def swin():
    sizes = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1]}
    return tf.SwinForImageClassification(tf.SwinConfig(**sizes, num_heads=[2, 4], num_labels=3))


@pytest.mark.parametrize("make", [dinov2, swin])
def test_families_take_other_sizes(make, table):
    processor = tf.BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    train, _ = load_data(DataConfig(source=table), TASK.columns)
    model = make().eval()
    model.config.label2id = {"blue": 0, "green": 1, "red": 2}
    task = TASK(TASK.Config(image_size=32, batch_size=3, max_rows=4))
    batches = task.prepare(train, processor, model)
    assert [batch["pixel_values"].shape for batch in batches] == [(3, 3, 32, 32), (1, 3, 32, 32)]
    assert run_task(task, model, batches)["rows"] == 4
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (20, 16), (
        "measuring changes no processor"
    )
    task.examples(train, processor, model)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (40, 32)


def test_a_family_of_one_size_says_so(table, tmp_path):
    vision = {**pictured.SIZES, "intermediate_size": 48}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tf.CLIPForImageClassification(tf.CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "m")
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="trained on pictures of 16 px, takes none of 24 x 24 px: Input image size"):
        prepare_finetune(settings(str(tmp_path / "m"), table, tmp_path, attention=None, options={"image_size": 24}))
    run = prepare_finetune(settings(str(tmp_path / "m"), table, tmp_path / "out", attention=None))
    trained = {name for name, weight in run.trainer.model.named_parameters() if weight.requires_grad}
    assert any("vision_model" in name and "lora_" in name for name in trained)
    assert {name.rpartition(".default.")[0] for name in trained if "lora_" not in name} == {
        "base_model.model.classifier.modules_to_save"
    }


def test_a_weight_that_does_not_fit_is_no_head(vit, tmp_path, table):
    broken = shutil.copytree(vit, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"holds vit\.\S+ as \(.*48.*\), and its config asks for \(.*40"):
        prepare_finetune(settings(str(broken), table, tmp_path / "out"))


def test_what_is_wrong_with_pictures_shows_before_a_model_is_loaded(table, tmp_path):
    rows = [json.loads(line) for line in Path(table).read_text().splitlines()]
    rows[1]["image"] = "files/none.png"
    other = Path(table).with_name("other.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": table, "eval_source": [str(other)]}
    with pytest.raises(
        ValueError, match=r"other\.jsonl: column 'image' \(image_column\): row 2 of 48, .*none\.png, is"
    ):
        prepare_finetune(settings(str(tmp_path / "no model"), table, tmp_path / "out", data=data))
    data = {"source": table, "image_column": "picture"}
    with pytest.raises(ValueError, match=r"has no column 'picture' \(image_column\); it has: image, label, text"):
        prepare_finetune(settings(str(tmp_path / "no model"), table, tmp_path / "out", data=data))
