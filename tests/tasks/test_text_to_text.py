"""Translation and summarization: examples, figures, Trainer's own evaluation, languages, and what is refused."""

import pytest
import sacrebleu
import torch
from conftest import WORDS, tokenizer, write_rows
from datasets import Dataset
from rouge_score import rouge_scorer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from attn_plugins.core.options import build
from attn_plugins.data.pairs import decoder_examples, encoder_examples
from attn_plugins.data.text import IGNORED
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.arguments import training_arguments
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune, rows_cut

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"max_source_length": 16, "max_target_length": 8}
ENDS = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1}
HALVES = {
    **{"vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16},
    **{"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0},
    **{"max_position_embeddings": 32, "init_std": 0.3, "decoder_start_token_id": 2, **ENDS},
}
ROWS = Dataset.from_dict(
    {
        "source": ["red green blue", "one", "two three cat dog good bad fine poor", "the cat is good"],
        "target": ["cat dog", "poor", "fine the a is .", "the dog is bad . one two three red green"],
    }
)


def saved(folder, model):
    model.save_pretrained(folder)
    tokenizer(encoder=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bart(tmp_path_factory):
    """Folder of a tiny encoder-decoder with its tokenizer."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**HALVES, forced_eos_token_id=None))
    return saved(tmp_path_factory.mktemp("bart"), model)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """JSONL of 60 sources of one or two words, and of a fixed other word for each, nested as hub data has them."""
    two = [(first, second) for first in WORDS[:6] for second in ["", *WORDS[:6]]]
    rows = [
        [" ".join(words).strip(), " ".join(WORDS[WORDS.index(word) + 6] for word in words if word)] for words in two
    ]
    rows = [{"translation": {"en": source, "fr": target}} for source, target in rows]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def data(pairs):
    columns = {"source_column": "translation.en", "target_column": "translation.fr"}
    return {"source": pairs, "eval_source": pairs, **columns}  # what was learnt is what is measured


def settings(folder, pairs, out, **changes):
    training = {"max_steps": 4, "per_device_train_batch_size": 14, "learning_rate": 0.02, "disable_tqdm": True}
    tree = {
        "model": folder,
        "data": data(pairs),
        "output_dir": str(out),
        "task": "translation",
        "options": SHORT,
        "attention": None,
        "tune": "full",
    }
    training |= {"logging_steps": 1, "save_strategy": "no", **changes.pop("training", {})}
    return build(FinetuneConfig, {**tree, "training": training, **changes})


def task(name="translation", **options):
    cls = get_task(name)
    return cls(build(cls.Config, {**SHORT, "batch_size": 4, **options}))


def test_encoder_decoder_and_cross_attention_are_chosen_by_roles_and_learn(bart, pairs, tmp_path):
    rules = [
        {"type": "local", "window_size": 8, "roles": ["encoder", "decoder"]},
        {"type": "softmax_plus_one", "roles": ["cross"]},
    ]
    changes = {"attention": rules, "evaluate_before": True, "training": {"max_steps": 40}}
    metrics = prepare_finetune(settings(bart, pairs, tmp_path, **changes)).run(None)
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["chrf"] > 40 > before["chrf"]
    assert metrics["attention"]["modules"] == {"local": 2, "softmax_plus_one": 1}


def test_trainers_own_evaluation_writes_texts(bart, pairs, tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 4, "predict_with_generate": True}
    run = prepare_finetune(settings(bart, pairs, tmp_path, training=training, options={**SHORT, "num_beams": 2}))
    metrics = run.run(None)
    (own,) = [entry for entry in run.trainer.state.log_history if "eval_loss" in entry]
    after = metrics["evaluation"]["after"]
    assert after["chrf"] > 0
    for name in ("sacrebleu", "chrf"):
        assert own[f"eval_{name}"] == pytest.approx(after[name])
    assert (run.trainer.args.generation_max_length, run.trainer.args.generation_num_beams) == (9, 2)


def test_trainers_own_evaluation_without_generation_is_the_loss_alone(llama, bart, pairs, tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 4}
    run = prepare_finetune(settings(bart, pairs, tmp_path, training=training))
    assert run.trainer.compute_metrics is None
    for generates, best in ((False, "loss"), (True, "sacrebleu")):
        asked = {**training, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4}
        asked["predict_with_generate"] = generates
        config = settings(bart, pairs, tmp_path, training=asked)
        assert training_arguments(config, config.trained()).metric_for_best_model == best
    with pytest.raises(ValueError, match=r"training\.predict_with_generate is for encoder-decoders"):
        prepare_finetune(settings(llama, pairs, tmp_path, training={**training, "predict_with_generate": True}))


def test_examples_of_an_encoder_decoder_are_cut_and_counted():
    rows = encoder_examples(
        ROWS, tokenizer(encoder=True), prompt="the {source}", max_source_length=6, max_target_length=5
    )
    words = tokenizer().batch_decode(rows["input_ids"][:])
    assert words == [
        "<s> the red green blue </s>",
        "<s> the one </s>",
        "<s> the two three cat </s>",
        "<s> the the cat is </s>",
    ]
    assert tokenizer().batch_decode(rows["labels"][:]) == [
        "<s> cat dog </s>",
        "<s> poor </s>",
        "<s> fine the a </s>",
        "<s> the dog is </s>",
    ]
    assert rows["attention_mask"][:] == [[1] * len(ids) for ids in rows["input_ids"]]
    assert rows["sources_cut"][:] == [False, False, True, True]
    assert rows["targets_cut"][:] == [False, False, True, True]


@pytest.mark.parametrize("encoder", [False, True], ids=["", "tokenizer with ends"])
def test_examples_of_a_decoder_keep_the_whole_prompt_and_have_a_loss_on_the_target_alone(encoder):
    start = "<s> " if encoder else ""
    limits = {"max_source_length": 6 + encoder, "max_target_length": 5}
    rows = decoder_examples(ROWS, tokenizer(encoder=encoder), prompt="a {source} is .", **limits)
    assert tokenizer().batch_decode(rows["input_ids"][:]) == [
        f"{start}a red green blue is . cat dog </s>",
        f"{start}a one is . poor </s>",
        f"{start}a two three cat is . fine the a is </s>",
        f"{start}a the cat is is . the dog is bad </s>",
    ]
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        target = labels[labels.count(IGNORED) :]
        assert labels == [IGNORED] * (len(ids) - len(target)) + target
        assert ids[-len(target) :] == target
    targets = [[label for label in labels if label != IGNORED] for labels in rows["labels"]]
    assert tokenizer().batch_decode(targets) == [
        "cat dog </s>",
        "poor </s>",
        "fine the a is </s>",
        "the dog is bad </s>",
    ]
    assert rows["sources_cut"][:] == [False, False, True, True]
    assert rows["targets_cut"][:] == [False, False, True, True]


def test_how_many_rows_reach_the_limits(bart, llama):
    for model, limits, sources, targets, reach in (
        (AutoModelForSeq2SeqLM.from_pretrained(bart), (5, 6), [5, 3, 5, 5], [4, 3, 6, 6], (3, 2)),
        (AutoModelForCausalLM.from_pretrained(llama), (8, 7), [4, 2, 8, 5], [3, 2, 6, 7], (1, 1)),
    ):
        encoder = model.config.is_encoder_decoder
        names = ("max_source_length", "max_target_length")
        made = task(**dict(zip(names, limits, strict=True)), **({} if encoder else {"prompt": "{source} ."}))
        rows = made.examples(ROWS, tokenizer(encoder=encoder), model)
        assert rows.column_names == ["input_ids", "attention_mask", "labels"]
        assert made.lengths(rows) == dict(zip(names, (sources, targets), strict=True))
        assert rows_cut(made, rows) == dict(zip(names, reach, strict=True))


def test_longer_rows_are_left_out_where_that_is_asked(bart):
    model, maker = AutoModelForSeq2SeqLM.from_pretrained(bart), tokenizer(encoder=True)
    made = task(max_source_length=5, max_target_length=6, leave_out_longer=True)
    rows = made.examples(ROWS, maker, model)
    assert rows["input_ids"] == [maker(text)["input_ids"] for text in ROWS["source"][:2]]
    assert rows_cut(made, rows) == {}, "none was cut"
    with pytest.raises(ValueError, match="every row is longer than max_source_length=2 or max_target_length=6 tokens"):
        task(max_source_length=2, max_target_length=6, leave_out_longer=True).examples(ROWS, maker, model)
    measured = task(max_source_length=5, leave_out_longer=True).prepare(ROWS, maker, model)
    assert sum(len(batch["targets"]) for batch in measured) == 4, "all rows are measured"


def test_figures_by_the_words_of_a_source(bart):
    torch.manual_seed(1)
    model, maker = AutoModelForSeq2SeqLM.from_pretrained(bart).eval(), tokenizer(encoder=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        given = [maker(text, return_tensors="pt") for text in ROWS["source"]]
        ids = [model.generate(**one, max_length=8, num_beams=1, do_sample=False) for one in given]
    texts = [maker.decode(one[0], skip_special_tokens=True).strip() for one in ids]
    measure = task(lengths=[3, 4, 6], num_beams=1, batch_size=3)
    parts = run_task(measure, model, measure.prepare(ROWS, maker, model))["by_length"]
    assert [(part["length"], part["rows"]) for part in parts] == [("1-3", 2), ("4-4", 1), ("7-", 1)]
    for part, rows in zip(parts, ([0, 1], [3], [2]), strict=True):
        wanted = [[ROWS["target"][row] for row in rows]]
        assert part["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu([texts[row] for row in rows], wanted).score)


@pytest.mark.parametrize("family", ["bart", "t5", "pegasus"])
def test_figures_of_an_encoder_decoder_are_those_of_its_own_texts(family, bart, tmp_path):
    torch.manual_seed(1)
    t5 = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **ENDS, decoder_start_token_id=3
    )
    model = {
        "bart": lambda: AutoModelForSeq2SeqLM.from_pretrained(bart),
        "t5": lambda: T5ForConditionalGeneration(t5),
        "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**HALVES)),
    }[family]()
    model, maker = model.eval(), tokenizer(encoder=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts, loss, tokens = [], 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            given = maker(row["source"], return_tensors="pt")
            wanted = maker(row["target"], truncation=True, max_length=8, return_tensors="pt")["input_ids"]
            ids = model.generate(**given, max_length=9, num_beams=2, do_sample=False)
            texts += maker.batch_decode(ids, skip_special_tokens=True)
            out = model(**given, labels=wanted)
            loss, tokens = loss + out.loss.item() * wanted.numel(), tokens + wanted.numel()
    for size in (1, 3):
        measure = task(num_beams=2, batch_size=size, metrics=["rouge", "chrf"])
        found = run_task(measure, model, measure.prepare(ROWS, maker, model))
        assert found["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [ROWS["target"][:]]).score)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [ROWS["target"][:]]).score)
        assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert (found["rows"], found["sources_cut"], found["targets_cut"]) == (4, 0, 1)
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        each = [scorer.score(row["target"], text)["rougeL"].fmeasure for row, text in zip(ROWS, texts, strict=True)]
        assert found["rougeL"] == pytest.approx(sum(each) / 4)
    assert any(texts), "nothing was written"


def test_figures_of_a_decoder_are_those_of_its_own_texts(llama):
    torch.manual_seed(1)
    model, maker = AutoModelForCausalLM.from_pretrained(llama).eval(), tokenizer()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts, loss, tokens = [], 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            source = maker(f"{row['source']} is", return_tensors="pt")["input_ids"]
            target = torch.tensor([[*maker(row["target"])["input_ids"][:7], 2]])
            ids = model.generate(
                source, attention_mask=torch.ones_like(source), max_new_tokens=8, do_sample=False, pad_token_id=3
            )
            texts += maker.batch_decode(ids[:, source.shape[1] :], skip_special_tokens=True)
            logits = model(torch.cat([source, target], 1)).logits[:, source.shape[1] - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits[0], target[0], reduction="sum")
            loss, tokens = loss + losses.item(), tokens + target.numel()
    for size in (1, 3):
        measure = task("summarization", batch_size=size, prompt="{source} is", metrics=["chrf"])
        found = run_task(measure, model, measure.prepare(ROWS, maker, model))
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [ROWS["target"][:]]).score)
        assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["rougeL"] >= 0
    assert any(texts), "nothing was written"
    assert task(max_rows=2).prepare(ROWS, maker, model)[-1]["targets"] == ROWS["target"][:2]


@pytest.mark.parametrize(
    ("cls", "languages", "field"),
    [
        (MBart50Tokenizer, ("en_XX", "fr_XX"), "forced_bos_token_id"),
        (NllbTokenizer, ("eng_Latn", "fra_Latn"), "forced_bos_token_id"),
        (MBartTokenizer, ("en_XX", "fr_XX"), "decoder_start_token_id"),
    ],
)
def test_languages_of_a_model_that_knows_many(cls, languages, field):
    maker, config = cls(), BartConfig(**{**HALVES, "vocab_size": 300})
    model = BartForConditionalGeneration(config)
    measure = task(source_lang=languages[0], target_lang=languages[1])
    source, target = (maker.convert_tokens_to_ids(language) for language in languages)
    (batch,) = measure.prepare(ROWS, maker, model)
    assert all(source in row and target not in row for row in batch["input_ids"].tolist())
    assert all(target in row and source not in row for row in batch["labels"].tolist())
    assert getattr(model.generation_config, field) == target
    ids = model.generate(batch["input_ids"], max_length=4)
    assert (ids[:, 1 if field == "forced_bos_token_id" else 0] == target).all()
    with pytest.raises(
        ValueError, match=f"target_lang='{languages[1]}x'.*did you mean {languages[1]}.*allowed by the tok"
    ):
        task(source_lang=languages[0], target_lang=f"{languages[1]}x").prepare(ROWS, maker, model)
    with pytest.raises(ValueError, match="target_lang is null, and the tokenizer is one of many languages; name one"):
        task(source_lang=languages[0]).prepare(ROWS, maker, model)


def test_languages_in_a_prompt(llama):
    model, maker = AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    (batch,) = task(prompt="{source_lang} {source} is", source_lang="red").prepare(ROWS, maker, model)
    assert maker.decode(batch["prompt"][1], skip_special_tokens=True) == "red one is"
    (batch,) = task(source_lang="red", target_lang="blue").prepare(ROWS, maker, model)
    assert maker.decode(batch["prompt"][1], skip_special_tokens=True).split() == ["red", "one", "blue"]
    with pytest.raises(ValueError, match=r"source_lang is null, and the prompt has {source_lang}; name one"):
        task(target_lang="blue").prepare(ROWS, maker, model)
    with pytest.raises(
        ValueError, match="target_lang='blue' is for tokenizers of many languages, or for a prompt with"
    ):
        task(prompt="{source} is", target_lang="blue").prepare(ROWS, maker, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_source_length": 0}, "max_source_length=0; allowed: at least 1"),
        ({"max_target_length": 1}, "max_target_length=1; allowed: at least 2"),
        ({"num_beams": 0}, "num_beams=0; allowed: at least 1, or null"),
        ({"max_rows": 0}, "max_rows=0; allowed: at least 1, or null"),
        ({"lengths": []}, r"lengths=\[\]; allowed: numbers of words from 1 on, each more than the one before, or null"),
        ({"lengths": [5, 5]}, r"lengths=\[5, 5\]; allowed: numbers of words from 1 on"),
        ({"lengths": [0, 5]}, r"lengths=\[0, 5\]; allowed: numbers of words from 1 on"),
        ({"prompt": "Summary:"}, "prompt='Summary:'; allowed: a text with {source} in it, once, or null"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_what_does_not_fit_the_model(bart, llama):
    model, maker = AutoModelForSeq2SeqLM.from_pretrained(bart), tokenizer(encoder=True)
    with pytest.raises(
        ValueError, match="max_target_length=33; allowed: at most 32, the model's max_position_embeddings"
    ):
        task(max_target_length=33).examples(ROWS, maker, model)
    with pytest.raises(ValueError, match=r"prompt='{source} \.'; allowed for a model with an encoder: a text that"):
        task(prompt="{source} .").examples(ROWS, maker, model)
    model, maker = AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    with pytest.raises(ValueError, match=r"max_source_length \+ max_target_length=135; allowed: at most 128"):
        task(max_source_length=127).examples(ROWS, maker, model)
    with pytest.raises(
        ValueError, match=r"prompt='a {source}'; allowed for a model without an encoder: one with text aft"
    ):
        task(prompt="a {source}").examples(ROWS, maker, model)
    with pytest.raises(ValueError, match="max_source_length=3; allowed: at least 4, more than the prompt"):
        task(prompt="a {source} is .", max_source_length=3).examples(ROWS, maker, model)
    maker.eos_token = None
    with pytest.raises(ValueError, match=r"the tokenizer has no end token"):
        task().examples(ROWS, maker, model)
    with pytest.raises(ValueError, match=r"metric 'nowhere/here\.py' cannot be loaded"):
        task(metrics=["nowhere/here.py"]).prepare(ROWS, maker, model)
