"""Speech recognition: what models write of recordings, whatever the batches, and which of them are left out."""

import jiwer
import pytest
import soundfile
import torch
from sounding import RATE, ctc, recordings, tone, whisper
from torch.nn.functional import cross_entropy, ctc_loss
from transformers.models.whisper.tokenization_whisper import LANGUAGES, WhisperTokenizer

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.data.sound import waveform
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load

CLS = get_task("speech-recognition")
SMALL = {"max_seconds": 1.0, "max_target_length": 12}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    source = recordings(tmp_path_factory.mktemp("sound"), 5)
    return load_data(DataConfig(source=source, eval_source=source), ("audio", "text"))[0]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    return {
        make.__name__: load(make(tmp_path_factory.mktemp("models") / make.__name__), kind="speech-to-text")
        for make in (whisper, ctc)
    }


def measured(loaded, rows, **options):
    task = CLS(CLS.Config(**{**SMALL, **options}))
    return run_task(task, loaded.model, task.prepare(rows, loaded.processing, loaded.model))


@pytest.mark.parametrize("rule", [None, {"type": "local", "window_size": 8, "roles": ["encoder"]}, "all roles"])
def test_whisper_is_measured_by_what_it_writes(hearing, rows, rule):
    loaded = hearing["whisper"]
    model, processing = loaded.model.eval(), loaded.processing
    if rule == "all roles":
        rule = [
            {"type": "local", "window_size": 8, "num_sink_tokens": 0, "roles": ["encoder", "decoder"]},
            {"type": "topk", "topk": 8, "roles": ["cross"]},
        ]
    if rule is not None:
        ap.swap_attention(model, rule)
    try:
        one, three = (measured(loaded, rows, batch_size=size, normalize="none") for size in (1, 3))
        said, losses = [], []
        for row in rows:
            sound = processing.feature_extractor(waveform(row["audio"], RATE), sampling_rate=RATE, return_tensors="pt")
            features = sound["input_features"]
            ids = model.generate(features, do_sample=False, max_new_tokens=12)
            said.append(processing.tokenizer.decode(ids[0], skip_special_tokens=True))
            labels = torch.tensor([processing.tokenizer(row["text"])["input_ids"]])
            with torch.no_grad():
                logits = model(input_features=features, decoder_input_ids=labels[:, :-1]).logits[0]
            losses += cross_entropy(logits, labels[0, 1:], reduction="none").tolist()
    finally:
        ap.restore_attention(model)
    assert any(said)
    assert one["wer"] == three["wer"] == jiwer.wer(rows["text"][:], said)
    assert (one["rows"], one["left_out"]) == (5, 0)
    assert one["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_attentions_of_all_roles_show(hearing, rows):
    loaded = hearing["whisper"]
    found = {None: measured(loaded, rows)["loss"]}
    for role in ("encoder", "decoder", "cross"):
        narrow = (
            {"type": "topk", "topk": 1}
            if role == "cross"
            else {"type": "local", "window_size": 1, "num_sink_tokens": 0}
        )
        ap.swap_attention(loaded.model, {**narrow, "roles": [role]})
        found[role] = measured(loaded, rows)["loss"]
        ap.restore_attention(loaded.model)
    assert len({round(loss, 6) for loss in found.values()}) == 4
    assert measured(loaded, rows)["loss"] == found[None]


def test_ctc_is_measured_by_the_likeliest_letter_of_each_frame(hearing, rows):
    loaded = hearing["ctc"]
    model, processing = loaded.model.eval(), loaded.processing
    options = {"normalize": "none", "max_target_length": 30}
    one, three = (measured(loaded, rows, batch_size=size, **options) for size in (1, 3))
    task = CLS(CLS.Config(**{**SMALL, **options, "batch_size": 5}))
    (padded,) = task.prepare(rows, processing, model)
    said, loss, letters = [], 0.0, 0
    for row in rows:
        inputs = processing(waveform(row["audio"], RATE), sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        said.append(processing.batch_decode(logits.argmax(-1))[0])
        labels = torch.tensor(processing.tokenizer(row["text"].upper())["input_ids"])
        scores = logits.log_softmax(-1)[0]
        loss += float(ctc_loss(scores, labels, torch.tensor(len(scores)), torch.tensor(len(labels)), reduction="sum"))
        letters += len(labels)
    assert any(said)
    with torch.no_grad():
        assert task.score(model, padded)["written"] == said, "padding says nothing"
    assert one["wer"] == three["wer"] == jiwer.wer(rows["text"][:], said)
    assert one["loss"] == pytest.approx(loss / letters, rel=1e-4)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-4)


def generating(model, folder):
    """A fine-tune whose Trainer has the model write while it trains."""
    source = recordings(folder, 4)
    training = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    tree = {
        "model": model,
        "data": {"source": source, "eval_source": source},
        "output_dir": str(folder / "out"),
        "task": "speech-recognition",
        "options": SMALL,
        "tune": "full",
        "training": {**training, "predict_with_generate": True},
    }
    return prepare_finetune(build(FinetuneConfig, tree))


def test_trainer_measures_what_is_written_as_the_task_does(tmp_path):
    run = generating(whisper(tmp_path / "whisper"), tmp_path)
    after = run.run(None)["evaluation"]["after"]
    (told,) = (entry for entry in run.trainer.state.log_history if "eval_wer" in entry)
    assert (told["eval_wer"], told["eval_loss"]) == pytest.approx((after["wer"], after["loss"]), rel=1e-4)


def test_what_names_letters_does_not_generate_while_it_trains(tmp_path):
    with pytest.raises(ValueError, match=r"training\.predict_with_generate is for encoder-decoders; other models are"):
        generating(ctc(tmp_path / "ctc"), tmp_path)


def test_transcripts_are_spelled_in_the_letters_that_a_model_knows(hearing, rows):
    loaded = hearing["ctc"]
    task = CLS(CLS.Config(**{**SMALL, "max_target_length": 30}))
    data = rows.map(lambda row: {"text": f"{row['text']}, é!"})
    labels = task.examples(data, loaded.processing, loaded.model)[0]["labels"]
    assert loaded.processing.tokenizer.decode(labels, group_tokens=False) == f"{rows[0]['text'].upper()} ".strip()


def test_both_texts_are_made_alike_as_asked(hearing):
    tokenizer = hearing["whisper"].processing
    texts = ["  Mr. Brown's colour, twenty-one! "]

    def alike(normalize):
        return CLS(CLS.Config(normalize=normalize))._alike(texts, tokenizer)

    assert alike("none") == ["Mr. Brown's colour, twenty-one!"]
    assert alike("basic") == ["mr brown s colour twenty one"]
    assert alike("english") == ["mister brown is colour 21"]


def test_recordings_and_transcripts_that_are_too_long_are_left_out_and_counted(
    hearing, rows, tmp_path, transformers_log
):
    loaded = hearing["whisper"]
    soundfile.write(tmp_path / "long.wav", tone(440, 0.65), RATE)
    found = measured(loaded, rows, max_seconds=0.55)  # of 0.3, 0.4, 0.5, 0.6, 0.7 seconds
    assert (found["rows"], found["left_out"]) == (3, 2)
    assert "2 of 5 recordings are longer than max_seconds=0.55: left out" in transformers_log.text
    task = CLS(CLS.Config(max_seconds=0.55, max_target_length=12))
    assert len(task.examples(rows, loaded.processing, loaded.model)) == 3
    texts = rows.map(lambda row, at: {"text": " ".join(["red"] * (at + 1))}, with_indices=True)
    kept = CLS(CLS.Config(max_seconds=1, max_target_length=5)).examples(texts, loaded.processing, loaded.model)
    assert [len(row["labels"]) for row in kept] == [3, 4, 5]
    assert "2 of 5 transcripts have more than max_target_length=5: left out" in transformers_log.text


def test_a_model_of_many_languages_writes_the_one_that_is_asked_for(hearing, rows):
    loaded = hearing["whisper"]
    with pytest.raises(ValueError, match="language='french' is for models of many languages, and this one knows one"):
        measured(loaded, rows, language="french")
    with pytest.raises(ValueError, match="translate=true is for models of many languages"):
        measured(loaded, rows, translate=True)
    languages = [f"<|{name}|>" for name in LANGUAGES]
    names = ["<|endoftext|>", "<|startoftranscript|>", *languages]
    names += ["<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = [chr(number) for number in range(33, 127)] + ["Ġ"]
    made = WhisperTokenizer(vocab={name: at for at, name in enumerate([*names, *letters])}, merges=[])
    model, before = loaded.model, loaded.processing.tokenizer
    loaded.processing.tokenizer, model.generation_config.is_multilingual = made, True
    try:
        with pytest.raises(
            ValueError, match=r"language=null; allowed for a model of many languages: one to train, such as"
        ):
            CLS(CLS.Config(**SMALL)).examples(rows, loaded.processing, model)
        CLS(CLS.Config(**SMALL, language="french"))._fit(loaded.processing, model)
        written = made.convert_ids_to_tokens(made("a")["input_ids"])
        assert written == [
            "<|startoftranscript|>",
            "<|fr|>",
            "<|transcribe|>",
            "<|notimestamps|>",
            "a",
            "<|endoftext|>",
        ]
        assert (model.generation_config.language, model.generation_config.task) == ("french", "transcribe")
        CLS(CLS.Config(**SMALL, language="french", translate=True))._fit(loaded.processing, model)
        assert model.generation_config.task == "translate"
    finally:
        loaded.processing.tokenizer, model.generation_config.is_multilingual = before, False
        del model.generation_config.language, model.generation_config.task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 0.0}, r"max_seconds=0\.0; allowed: greater than 0"),
        ({"max_target_length": 0}, "max_target_length=0; allowed: at least 1"),
        ({"num_beams": 0}, "num_beams=0; allowed: at least 1, or null"),
        ({"max_rows": 0}, "max_rows=0; allowed: at least 1, or null"),
        ({"max_seconds": 2.0}, "max_seconds=2; allowed: at most 1, what it hears"),
        ({"max_seconds": 0.1}, r"all 5 recordings are longer than max_seconds=0\.1"),
        ({"max_target_length": 21}, "max_target_length=21; allowed: at most 20, what the model writes"),
    ],
)
def test_options_that_do_not_fit(hearing, rows, options, message):
    with pytest.raises(ValueError, match=message):
        measured(hearing["whisper"], rows, **options)


def test_transcripts_and_processors_that_do_not_fit(hearing, rows):
    loaded = hearing["whisper"]
    with pytest.raises(ValueError, match="the transcripts of 5 rows to measure have no word"):
        measured(loaded, rows.map(lambda row: {"text": " . "}))
    task = CLS(CLS.Config(**{**SMALL, "max_target_length": 2}))
    with pytest.raises(ValueError, match="max_target_length=2, and all 5 transcripts have more tokens"):
        task.examples(rows, loaded.processing, loaded.model)
    with pytest.raises(
        ValueError, match=r"comes with .* alone; speech-recognition needs a feature extractor and a tok"
    ):
        task.prepare(rows, loaded.processing.tokenizer, loaded.model)
