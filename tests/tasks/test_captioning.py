"""Captions: what is written is what generate() writes, by each family, and what cannot be captioned says so."""

import json
import runpy
import sys
from pathlib import Path

import pictured
import pytest
import torch
import transformers as tf
from conftest import tokenizer
from transformers.utils.import_utils import is_torchvision_available

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.data.pictures import pixels, rgb
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import get_task, run_task
from attn_plugins.tasks.metrics import compute_metrics
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        type(tf.AutoImageProcessor) is not type and not is_torchvision_available(),
        reason="this transformers reads processors of pictures with torchvision alone",
    ),
]

TASK = get_task("captioning")
JOIN = Path(__file__).parents[2] / "examples" / "training" / "join_captioner.py"
TRAINING = {
    "max_steps": 60,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.005,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return pictured.pictures(tmp_path_factory.mktemp("pictures") / "data", rows=24)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A ViT and a GPT-2 that the example has joined."""
    folder = tmp_path_factory.mktemp("captioner")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=20, **sizes, **pictured.GPT2_IDS)).save_pretrained(folder / "gpt2")
    tokenizer().save_pretrained(folder / "gpt2")
    given = ["--encoder", pictured.vit(folder / "vit"), "--decoder", str(folder / "gpt2")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(JOIN), *given, "--out", str(folder / "joined")])
        runpy.run_path(str(JOIN), run_name="__main__")
    return str(folder / "joined")


def test_a_swapped_captioner_learns_what_it_sees(captioner, table, tmp_path):
    attention = [
        {"type": "neighborhood_2d", "kernel_size": 3, "roles": "encoder"},
        {"type": "local", "window_size": 4, "roles": "decoder"},
    ]
    tree = {"model": captioner, "data": {"source": table}, "output_dir": str(tmp_path / "out"), "attention": attention}
    tree |= {"task": "captioning", "tune": "full", "training": TRAINING, "evaluate_before": True}
    options = {"image_size": 24, "max_length": 12, "batch_size": 3}
    metrics = prepare_finetune(build(FinetuneConfig, {**tree, "options": options})).run(None)
    losses = [entry["loss"] for entry in metrics["train"]["losses"]]
    assert losses[-1] < losses[0] / 5
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    assert after["chrf"] > 90 > before["chrf"]
    assert metrics["attention"]["modules"] == {"local": 2, "neighborhood_2d": 2, "own (sdpa)": 2}
    data = {"source": table}
    evaluation = {"task": "captioning", "max_length": 12}
    again = {"model": str(tmp_path / "out"), "data": data, "evaluation": evaluation}
    found = prepare_evaluation(build(EvaluateConfig, again)).run()
    assert found["result"] == pytest.approx(after)
    assert found["attention"] == metrics["attention"]
    rows = ap.describe_attention(load(str(tmp_path / "out"), kind="image-to-text").model)
    served = {(row.path.partition(".")[0], row.role, row.plugin) for row in rows}
    own = ("decoder", "cross", None)
    assert served == {("encoder", "encoder", "neighborhood_2d"), ("decoder", "decoder", "local"), own}


def git():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return tf.GitForCausalLM(tf.GitConfig(vision_config=vision, vocab_size=20, **sizes, **ids))


def blip():
    vision = {**pictured.SIZES, "intermediate_size": 48}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 3}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"encoder_hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 64}
    config = tf.BlipConfig(vision_config=vision, text_config={**text, **ids})
    return tf.BlipForConditionalGeneration(config)


def processor(kind=tf.TrOCRProcessor):
    return kind(image_processor=tf.ViTImageProcessorPil(size={"height": 16, "width": 16}), tokenizer=tokenizer())


@pytest.mark.parametrize("make", [git, blip])
def test_families_write_from_a_picture_alone_and_learn(make, table):
    torch.manual_seed(0)
    model, made = make().eval(), processor()
    train, _ = load_data(DataConfig(source=table), TASK.columns)
    train = train.select(range(7))
    task = TASK(TASK.Config(max_length=8, batch_size=3))
    rows, collate = task.examples(train, made, model), task.collator(made, model)
    batch = collate([rows[number] for number in range(7)])
    expected = [1, *made.tokenizer(train[0]["text"], add_special_tokens=False)["input_ids"], 2]
    assert batch["input_ids"][0].tolist() == batch["labels"][0].tolist() == expected
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    found = run_task(task, model, task.prepare(train, made, model))
    assert found["chrf"] > 90
    assert found["rows"] == 7


@pytest.mark.parametrize("make", [None, git, blip], ids=["joined", "git", "blip"])
def test_padding_has_no_loss_and_each_picture_its_own_caption(make, captioner, table):
    torch.manual_seed(0)
    loaded = load(captioner, kind="image-to-text") if make is None else None
    model, made = (make().eval(), processor()) if loaded is None else (loaded.model.eval(), loaded.processing)
    texts = ["the cat", "a dog is", "the red cat is good ."]
    data, _ = load_data(DataConfig(source=table), TASK.columns)
    data = data.select(range(3)).remove_columns("text").add_column("text", texts)
    task = TASK(TASK.Config(max_length=8))
    rows, collate = task.examples(data, made, model), task.collator(made, model)
    batch = collate([rows[number] for number in range(3)])
    start = [] if model.config.is_encoder_decoder else [1]  # an encoder-decoder puts it there itself
    wanted = [[*start, *made.tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in texts]
    longest = max(map(len, wanted))
    assert batch["labels"].tolist() == [[*its, *[-100] * (longest - len(its))] for its in wanted]
    counts = [len(its) - len(start) for its in wanted]
    with torch.no_grad():
        alone = [model(**collate([rows[number]])).loss.item() * count for number, count in enumerate(counts)]
        assert model(**batch).loss.item() == pytest.approx(sum(alone) / sum(counts), rel=1e-5)
    shorter = TASK(TASK.Config(max_length=5)).examples(data, made, model)
    assert [len(shorter[number]["labels"]) for number in range(3)] == [len(start) + 3, len(start) + 4, 5]
    (measured,) = task.prepare(data, made, model)
    for number, row in enumerate(data):
        picture = pixels(made, [rgb(row["image"])])[0]
        assert torch.equal(batch["pixel_values"][number], picture)
        assert torch.equal(measured["pixel_values"][number], picture)
    assert measured["captions"] == texts


def test_figures_are_those_of_what_generate_writes(captioner, table):
    loaded = load(captioner, kind="image-to-text")
    _, held_out = load_data(DataConfig(source=table), TASK.columns)
    task = TASK(TASK.Config(max_length=5, num_beams=2))
    batches = task.prepare(held_out, loaded.processing, loaded.model)
    written = []
    for picture in batches[0]["pixel_values"]:
        ids = loaded.model.generate(pixel_values=picture[None], max_new_tokens=4, num_beams=2, do_sample=False)
        written.append(loaded.processing.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    expected = compute_metrics(("chrf", "sacrebleu", "rouge"), written, held_out["text"][: len(written)])
    assert len(written) == len(held_out)
    assert run_task(task, loaded.model, batches) == pytest.approx({**expected, "rows": len(written)})
    few = TASK(TASK.Config(max_rows=1)).prepare(held_out, loaded.processing, loaded.model)
    assert [batch["captions"] for batch in few] == [held_out["text"][:1]]


def test_what_writes_no_captions_says_so(captioner, table):
    train, _ = load_data(DataConfig(source=table), TASK.columns)
    loaded = load(captioner, kind="image-to-text")
    with pytest.raises(ValueError, match=r"came with a ViTImageProcessor.*; allowed: a processor that holds"):
        TASK().examples(train, loaded.processing.image_processor, loaded.model)
    loaded.processing.image_token = "<image>"
    with pytest.raises(ValueError, match="VisionEncoderDecoderModel has its pictures among the tokens of a text"):
        TASK().prepare(train, loaded.processing, loaded.model)
    del loaded.processing.image_token
    loaded.model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="config has no decoder_start_token_id"):
        TASK().examples(train, loaded.processing, loaded.model)


def test_a_joined_captioner_saves_what_it_needs(captioner):
    config = json.loads((Path(captioner) / "config.json").read_text())
    assert (config["decoder_start_token_id"], config["pad_token_id"], config["eos_token_id"]) == (1, 3, 2)
    made = tf.AutoProcessor.from_pretrained(captioner)
    assert type(made) is tf.TrOCRProcessor
    assert made.image_processor.size["height"] == 16
