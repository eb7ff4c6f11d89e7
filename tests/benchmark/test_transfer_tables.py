"""Tables of what transfer and chosen heads do: means and ranges over seeds, between comments of a page."""

import json

import pytest

from attn_plugins.benchmark.pages.transfer_tables import choices, lengths, stages, taught, trained, with_measured

VERSIONS = {"attn_plugins": "0.1.0", "commit": "abc", "torch": "2.13.0"}


def record(result, seed=0, **told):
    settings = {"seed": seed, **told.pop("settings", {})}
    key = json.dumps([settings, told, result])
    return {"key": key, "status": "ok", "settings": settings, "versions": VERSIONS, "result": result, **told}


def chosen(case, seed, perplexity, passkey):
    figures = {"perplexity": perplexity, "passkey": passkey, "copy": 0.5, "names": 0.25}
    return record(figures, seed, settings={"case": case})


def test_seeds_are_means_with_their_range():
    records = [chosen("dense", 0, 20.0, 1.0), chosen("dense", 1, 22.0, 1.0), chosen("window 256", 0, 30.0, 0.0)]
    lines = choices(records)
    assert lines[0] == "| full attention in | perplexity | pass key | passage | names |"
    assert lines[2] == "| all: the model's own attention | 21.00 (20.00 to 22.00) | 1.00 | 0.50 | 0.25 |"
    assert lines[3] == "| none: window 256 + 4 sinks alone | 30.00 | 0.00 | 0.50 | 0.25 |"
    assert lines[-1].startswith("Seeds 0, 1, mean (least to most) of the seeds; torch 2.13.0")


def test_what_failed_is_no_row():
    failed = {**chosen("window 256", 0, 1.0, 1.0), "status": "failed"}
    assert len(choices([chosen("dense", 0, 20.0, 1.0), failed])) == len(choices([chosen("dense", 0, 20.0, 1.0)]))


def test_stages_stand_in_the_order_in_which_they_were_measured():
    figures = {"perplexity": 2737.3, "passkey": 0.04, "copy": 0.03}
    lines = stages([record(figures, stage="linear, untrained"), record(figures, stage="linear + 50 transfer")])
    assert lines[2] == "| linear, untrained | 2737 | 0.04 | 0.03 |"
    assert lines[3].startswith("| linear + 50 transfer |")


def test_fine_tuning_is_told_before_and_after():
    def figures(value):
        return {"perplexity": 10 * value, "passkey": value, "copy": value, "recall loss": value}

    one = record({"before": figures(2.0), "after": figures(1.0)}, attention="window", targets="v, o")
    assert trained([one])[2] == ("| window | v, o | 20.00 to 10.00 | 2.00 to 1.00 | 2.00 to 1.00 | 2.00 to 1.00 |")


def test_what_was_taught_is_told_part_by_part():
    figures = {"error before": 1.2, "error": 0.5, "cosine before": 0.46, "cosine": 0.9}
    lines = taught([record(figures, seed, settings={"part": "encoder"}) for seed in (0, 1)])
    assert lines[2:6] == [
        "| encoder | error of outputs, untrained | 1.20 |",
        "| encoder | error of outputs | 0.50 |",
        "| encoder | cosine of embeddings to the model's own, untrained | 0.46 |",
        "| encoder | cosine of embeddings to the model's own | 0.90 |",
    ]


def test_lengths_are_columns():
    lines = lengths([record({"512": 40.0, "1536": 29.5}, settings={"case": "dense"})])
    assert lines[0] == "| attention | 512 tokens | 1,536 tokens |"
    assert lines[2] == "| dense | 40.00 | 29.50 |"


def test_a_page_gets_the_tables_that_it_asks_for(tmp_path):
    (tmp_path / "choice.jsonl").write_text(json.dumps(chosen("dense", 0, 20.0, 1.0)) + "\n", encoding="utf8")
    page = "Before.\n<!-- choices: written by `make docs` -->\n<!-- choices: end -->\nAfter.\n"
    written = with_measured(page, tmp_path)
    assert "| all: the model's own attention | 20.00 |" in written
    assert with_measured(written, tmp_path) == written
    assert with_measured("Nothing.\n", tmp_path) == "Nothing.\n"
    with pytest.raises(ValueError, match="'choices' has no end"):
        with_measured(page.replace("choices: end", "end"), tmp_path)
