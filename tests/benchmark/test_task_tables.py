"""Tables of tasks from the results of comparisons: a row an attention and stage, between comments of a page."""

import json

import pytest

from attn_plugins.benchmark.pages.task_tables import task_table, with_tasks

VERSIONS = {"attn_plugins": "0.1.0", "commit": "abc", "torch": "2.13.0"}


def record(attention, measure, seed, figures, evaluation=None, status="ok"):
    settings = {"evaluation": evaluation or {}}
    if measure == "finetune":
        settings["finetune"] = {"task": "translation"}
    told = {"key": f"{attention} {measure} {seed}", "status": status, "settings": settings, "versions": VERSIONS}
    return {**told, "attention": attention, "measure": measure, "seed": seed, "result": {"figures": figures}}


def test_each_attention_and_stage_is_a_row_with_the_figures_of_the_task():
    figures = {"sacrebleu": 10.0, "chrf": 30.0, "loss": 2.0, "rows": 64}
    records = [record("dense", "finetune", seed, {**figures, "chrf": 30.0 + seed}) for seed in (0, 1)]
    records.append(record("window", "evaluate", 0, figures))
    assert task_table(records)[:4] == [
        "| attention | BLEU | chrF | loss |",
        "|---|---|---|---|",
        "| dense, fine-tuned | 10.00 | 30.50 (30.00 to 31.00) | 2.00 |",
        "| window, untrained | 10.00 | 30.00 | 2.00 |",
    ]


def test_the_task_is_that_of_the_evaluation_where_it_names_one():
    for told in ({"task": "perplexity"}, [{"task": "perplexity"}, {"task": "recall"}]):
        lines = task_table([record("dense", "finetune", 0, {"perplexity": 20.0}, told)])
        assert lines[0] == "| attention | perplexity |"


def test_what_failed_is_no_row():
    ok, failed = (record("dense", "finetune", seed, {}, status=status) for seed, status in ((0, "ok"), (1, "error")))
    ok["result"] = {"figures": {"sacrebleu": 1.0, "chrf": 1.0, "loss": 1.0}}
    del failed["result"]
    assert "| dense, fine-tuned | 1.00 | 1.00 | 1.00 |" in task_table([ok, failed])


def test_a_page_has_the_table_of_each_file(tmp_path):
    figures = {"sacrebleu": 10.0, "chrf": 30.0, "loss": 2.0}
    (tmp_path / "small.jsonl").write_text(json.dumps(record("dense", "finetune", 0, figures)) + "\n")
    page = "before\n<!-- small: written by `make docs` -->\nold\n<!-- small: end -->\nafter\n"
    written = with_tasks(page, tmp_path)
    assert "old" not in written
    assert "| dense, fine-tuned | 10.00 | 30.00 | 2.00 |\n" in written
    assert with_tasks("no table", tmp_path) == "no table"
    with pytest.raises(ValueError, match="the table 'small' has no end"):
        with_tasks(page.replace("<!-- small: end -->", ""), tmp_path)
