"""lm-evaluation-harness as a task: its own numbers on the model as it is, and none that depend on who is in a batch."""

import importlib.util
import json
import math
import random
import sys

import pytest
import torch
from conftest import WORDS, tokenizer, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.tasks import get_task, rows_of, run_task

ROWS = 5
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{text}}}}"
metadata: {{version: 1.0}}
"""
CHOICE = 'doc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
WRITING = """doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 6, until: ["poor"], do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = 'doc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks of the harness and their rows, of very different lengths."""
    made = tmp_path_factory.mktemp("harness")
    chance = random.Random(0)
    rows = []
    for number in range(ROWS):
        text = " ".join(chance.choices(WORDS, k=3 + 9 * number))
        choices = [" ".join(chance.choices(WORDS, k=1 + number % 3)) for _ in range(3)]
        rows.append({"text": text, "choices": choices, "answer": number % 3})
    path = write_rows(made / "rows.jsonl", rows)
    for name, output_type, rest in (
        ("tiny_choice", "multiple_choice", CHOICE),
        ("tiny_writing", "generate_until", WRITING),
        ("tiny_rolling", "loglikelihood_rolling", ROLLING),
    ):
        head = TASK.format(name=name, rows=path, output_type=output_type)
        (made / f"{name}.yaml").write_text(head + rest)
    return made


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), initializer_range=0.3, **sizes, **heads)).eval()


def harness(folder, **options):
    cls = get_task("harness")
    return cls(cls.Config(**{"tasks": [str(folder)], **options}))


def measured(model, folder, **options):
    task = harness(folder, **options)
    return run_task(task, model, task.prepare(None, tokenizer(), model))


@pytest.mark.peers
@needs_lm_eval
def test_of_a_model_as_it_is_the_numbers_are_the_harnesss_own(folder, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    names = ["tiny_choice", "tiny_rolling", "tiny_writing"]
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "device": "cpu"},
        tasks=names,
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]
    state = random.getstate(), torch.get_rng_state()
    found = measured(model, folder, batch_size=4)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert list(found["by_part"]) == names
    for name, its in found["by_part"].items():
        for figure in ("acc", "acc_norm", "exact_match", "word_perplexity", "bits_per_byte"):
            assert its.get(figure) == own[name].get(f"{figure},none")
        assert its["rows"] == ROWS
    choice, writing = found["by_part"]["tiny_choice"], found["by_part"]["tiny_writing"]
    assert found["score"] == pytest.approx((choice["acc"] + writing["exact_match"]) / 2)
    assert rows_of(found, "score")["tiny_choice: acc_norm"] == choice["acc_norm"]
    json.dumps(found)
    (task,) = measured(model, folder / "tiny_rolling.yaml")["by_part"].values()
    assert task["bits_per_byte"] == own["tiny_rolling"]["bits_per_byte,none"]
    few = measured(model, folder / "tiny_rolling.yaml", limit=3)
    assert few["score"] == -few["by_part"]["tiny_rolling"]["word_perplexity"]
    assert few["by_part"]["tiny_rolling"]["rows"] == 3


@pytest.mark.peers
@needs_lm_eval
def test_evaluate_and_compare_measure_by_it(folder, llama, tmp_path, capsys, monkeypatch):
    from attn_plugins.benchmark.compare.config import CompareConfig
    from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
    from attn_plugins.cli import main

    out, task = tmp_path / "out.json", str(folder / "tiny_choice.yaml")
    flags = ["--model", llama, "--attn", "{type: local, window_size: 2}", "--harness", task, "--output", str(out)]
    monkeypatch.setattr("sys.argv", ["attn-plugins", "evaluate", *flags, "--set", "harness.limit=4", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(out.read_text())
    assert shown["task"] == "harness"
    assert shown["result"]["by_part"]["tiny_choice"]["rows"] == 4
    assert shown["result"]["score"] == shown["result"]["by_part"]["tiny_choice"]["acc"]
    evaluation = {"task": "harness", "tasks": [task], "limit": 4}
    rules = {"dense": None, "local": {"type": "local", "window_size": 2}}
    compared = {"models": {"tiny": llama}, "attentions": rules, "evaluation": evaluation}
    config = build(CompareConfig, {**compared, "output_dir": str(tmp_path / "compared")})
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None)
    values = {record["attention"]: record["result"]["value"] for record in results.records.values()}
    assert set(values) == {"dense", "local"}
    assert values["local"] == shown["result"]["score"]


@pytest.mark.peers
@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["tiny_choise"]},
            r"unknown task 'tiny_choise' of the harness; allowed: a name that .lm_eval ls tasks",
        ),
        ({"tasks": ["{folder}/empty"]}, r"the folder '.*empty' has no task of the harness; allowed: YAML files"),
        ({"tasks": ["{folder}/lost.yaml"]}, r"task '.*lost.yaml' of the harness cannot be loaded: .*nowhere.jsonl"),
        ({"chat": True}, "chat=True, and the tokenizer has no chat template; allowed: chat=False"),
    ],
)
def test_what_the_harness_cannot_measure_is_an_error_before_it_runs(folder, options, message, monkeypatch):
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__
    monkeypatch.setattr(  # its own tasks are 14,000 files
        TaskManager, "__init__", lambda self, **given: plain(self, **{**given, "include_defaults": False})
    )
    (folder / "empty").mkdir(exist_ok=True)
    lost = TASK.format(name="lost", rows=str(folder / "nowhere.jsonl"), output_type="multiple_choice") + CHOICE
    (folder / "lost.yaml").write_text(lost)
    names = [name.format(folder=folder) for name in options.get("tasks", [str(folder / "tiny_choice.yaml")])]
    with pytest.raises(ValueError, match=message):
        measured(tiny(), folder, **{**options, "tasks": names})
    (folder / "lost.yaml").unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"tasks=\[\]; allowed: at least one"),
        ({"tasks": ["a"], "limit": 0}, "limit=0.0; allowed: above 0, or null"),
        ({"tasks": ["a"], "fewshot": -1}, "fewshot=-1; allowed: at least 0, or null"),
        ({"tasks": ["a"], "max_length": 1}, "max_length=1; allowed: at least 2, or null"),
    ],
)
def test_options_out_of_range(options, message):
    cls = get_task("harness")
    with pytest.raises(ValueError, match=message):
        build(cls.Config, options)


def test_tasks_without_a_figure_leave_those_of_others():
    found = {"results": {"a": {"alias": "a", "bypass,none": 1}}, "higher_is_better": {"a": {}}}
    made = harness("somewhere").finish({"found": [{**found, "n-samples": {"a": {"effective": 3}}}]})
    assert math.isnan(made["score"])
    assert made["by_part"] == {"a": {"bypass": 1, "rows": 3}}


def test_without_the_harness_an_error_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"this needs the package 'lm_eval': pip install 'attn-plugins\[harness\]'"):
        measured(tiny(), "tiny_choice")


CAUSAL = [name for name in list_attentions() if get_attention(name).causal]


@pytest.fixture(scope="module")
def batches(folder):
    return harness(folder).prepare(None, tokenizer(), None)


@pytest.mark.peers
@needs_lm_eval
@pytest.mark.parametrize("name", CAUSAL)
def test_what_shares_a_batch_changes_nothing(name, folder, batches, monkeypatch):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # asks pip and others: seconds
    model = tiny()
    ap.swap_attention(model, name)
    answers = {}
    for method in ("_loglikelihood_tokens", "generate_until"):
        plain = getattr(HFLM, method)

        def noted(self, requests, *args, plain=plain, **kwargs):
            found = plain(self, requests, *args, **kwargs)
            answers.setdefault(self.batch_size, []).extend(found)
            return found

        monkeypatch.setattr(HFLM, method, noted)
    for size in (1, 7):
        run_task(harness(folder, batch_size=size), model, batches)
    assert len(answers[1]) == len(answers[7])
    assert len(answers[1]) % (3 * ROWS + ROWS + ROWS) == 0, "several times, where an attention has branches"
    for alone, together in zip(answers[1], answers[7], strict=True):
        if isinstance(alone, str):
            assert alone == together
        else:
            assert alone[0] == pytest.approx(together[0], rel=1e-4)
            assert alone[1] == together[1]
