"""Metrics of this package give the figures of the libraries that they stand on, without a network, and so do others."""

import builtins
import os
import subprocess
import sys

import evaluate
import jiwer
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from attn_plugins.tasks.metrics import LOCAL, compute_metrics, load_metric, local_metrics

GOT = ["the cat sat on the mat .", "a dog is good", "", "one two three"]
WANTED = ["the cat is on the mat .", "the dog is fine", "poor cat", "one two three"]
OTHERS = ["a cat sat on a mat .", "a dog is good .", "bad cat", "three two one"]

LIBRARIES = {
    "sacrebleu": lambda: {"sacrebleu": sacrebleu.corpus_bleu(GOT, [WANTED]).score},
    "chrf": lambda: {"chrf": sacrebleu.corpus_chrf(GOT, [WANTED]).score},
    "rouge": lambda: {
        kind: sum(scorer.score(wanted, got)[kind].fmeasure for got, wanted in zip(GOT, WANTED, strict=True)) / 4
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
        for scorer in [rouge_scorer.RougeScorer([kind])]
    },
    "wer": lambda: {"wer": jiwer.wer(WANTED, GOT)},
}


def test_each_has_a_case_here():
    assert local_metrics() == sorted(LIBRARIES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_figures_are_the_librarys_own(name):
    wanted = LIBRARIES[name]()
    assert compute_metrics([name], GOT, WANTED) == pytest.approx(wanted, abs=1e-12)
    assert all(0 < value < 100 for value in wanted.values())


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("sacrebleu", lambda: sacrebleu.corpus_bleu(GOT, [WANTED, OTHERS]).score),
        ("chrf", lambda: sacrebleu.corpus_chrf(GOT, [WANTED, OTHERS]).score),
    ],
)
def test_several_references_a_row(name, whole):
    references = [list(pair) for pair in zip(WANTED, OTHERS, strict=True)]
    assert load_metric(name).compute(predictions=GOT, references=references)["score"] == whole()
    with pytest.raises(ValueError, match="the same number of references"):
        load_metric(name).compute(predictions=GOT, references=[["a"], ["a", "b"], ["a"], ["a"]])


def test_rouge_takes_the_best_of_several_references_and_tells_rows():
    references = [list(pair) for pair in zip(WANTED, OTHERS, strict=True)]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    best = [scorer.score_multi(both, got)["rougeL"].fmeasure for got, both in zip(GOT, references, strict=True)]
    found = load_metric("rouge").compute(
        predictions=GOT, references=references, rouge_types=["rougeL"], use_aggregator=False
    )
    assert found == {"rougeL": best}


def test_options_reach_the_library():
    upper = [text.upper() for text in GOT]
    assert load_metric("sacrebleu").compute(predictions=upper, references=WANTED, lowercase=True)["score"] == (
        sacrebleu.corpus_bleu(upper, [WANTED], lowercase=True).score
    )
    assert load_metric("chrf").compute(predictions=GOT, references=WANTED, word_order=2)["score"] == (
        sacrebleu.corpus_chrf(GOT, [WANTED], word_order=2).score
    )


def test_evaluate_loads_them_by_path():
    assert evaluate.load(str(LOCAL / "wer.py")).compute(predictions=["a b"], references=["a c"]) == 0.5


@pytest.mark.slow
def test_processes_without_a_network_load_them_at_once(tmp_path):
    """Two of them with no cache yet, warnings being errors."""
    program = (
        "from attn_plugins.tasks.metrics import compute_metrics;"
        "print(compute_metrics(['sacrebleu', 'rouge'], ['a b c d'], ['a b c d']))"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    environment = os.environ | offline | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert {out for out, _ in ended} == {
        "{'sacrebleu': 100.00000000000004, 'rouge1': 1.0, 'rouge2': 1.0, 'rougeL': 1.0, 'rougeLsum': 1.0}\n"
    }


def test_a_module_of_a_users_own(tmp_path):
    path = tmp_path / "letters.py"
    path.write_text(
        """
import datasets
import evaluate
class Letters(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": text, "references": text}))
    def _compute(self, predictions, references):
        return {"letters": sum(map(len, predictions)), "rows": [1, 2]}
""",
        encoding="utf-8",
    )
    assert compute_metrics([str(path)], ["ab", "c"], ["", ""]) == {"letters": 3.0}


@pytest.mark.parametrize("name", ["rogue", "someone/theirs"])
def test_a_metric_that_cannot_be_reached(monkeypatch, name):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    with pytest.raises(
        ValueError, match=f"metric '{name}' cannot be loaded; allowed without a download: chrf, rouge, sacrebleu, wer"
    ):
        load_metric(name)


def test_a_metric_whose_package_is_not_installed(monkeypatch):
    imported = builtins.__import__

    def absent(name, *rest):
        if name.partition(".")[0] == "rouge_score":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *rest)

    for module in [module for module in sys.modules if module.partition(".")[0] == "rouge_score"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: absent(name))
    with pytest.raises(ValueError, match=r"metric 'rouge' cannot be loaded.*pip install rouge_score"):
        load_metric("rouge")
