"""Tables of the leaderboard from records of comparisons, and the guidance that is read off them."""

import json

import pytest

from attn_plugins.benchmark.pages import leaderboard

VERSIONS = {"attn_plugins": "0.1.0", "commit": "abc", "torch": "2.13.0"}
LOCAL = [{"type": "local", "window_size": 8, "num_sink_tokens": 0}]
TOPK = [{"type": "topk", "topk": 4}]
SOME = [{"type": "local", "window_size": 8, "layers": "every:2"}]


def record(attention, rules, task, measure, seed, result, part="", **settings):
    settings = {"rules": rules, "evaluation": {"task": task}, **settings}
    return {
        "key": f"{part} {attention} {task} {measure} {seed}",
        **{"part": part, "model": "m", "attention": attention, "measure": measure, "seed": seed, "status": "ok"},
        **{"settings": settings, "versions": VERSIONS, "result": {"metric": "accuracy", "better": "higher", **result}},
    }


def pairs(attention, rules, seed, few, many):
    by_pairs = [{"pairs": 2, "accuracy": few}, {"pairs": 16, "accuracy": many}]
    result = {"value": (few + many) / 2, "figures": {"by_pairs": by_pairs}}
    return record(attention, rules, "associative-recall", "finetune", seed, result)


@pytest.fixture
def docs(tmp_path):
    """A folder of documentation, and what writes the records of its leaderboard."""
    for folder in ("benchmarks/leaderboard", "benchmarks/tasks", "demo"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "demo" / "results.jsonl").touch()

    def write(*records):
        lines = "".join(json.dumps(one) + "\n" for one in records)
        (tmp_path / "benchmarks" / "leaderboard" / "results.jsonl").write_text(lines)
        return tmp_path

    return write


def test_many_pairs_are_ranked_with_seeds_noise_and_what_the_cache_does(docs):
    own = [pairs("dense", None, seed, 1.0, 0.98 + seed / 100) for seed in (0, 1, 2)]
    window = [pairs("window", LOCAL, seed, 0.5, 0.1) for seed in (0, 1, 2)]
    best = [pairs("best keys", TOPK, seed, 1.0, 0.9) for seed in (0, 1, 2)]
    hybrid = [pairs("some layers", SOME, 0, 0.9, 0.9)]
    induction = record("window", LOCAL, "induction", "finetune", 0, {"value": 0.25})
    both = leaderboard.from_scratch(leaderboard.Board(docs(*window, *own, induction)).scratch)
    assert both[0].endswith("| all, against dense | induction |"), "a column of each task that has been measured"
    assert both[3].endswith("| 0.250 |")
    board = leaderboard.Board(docs(*window, *own, *best, *hybrid))
    lines = leaderboard.from_scratch(board.scratch)
    assert lines[0].startswith("| attention | its cache | 2 pairs | 16 pairs | all, against dense |")
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| dense", "grows"],
        ["| best keys", "grows"],
        ["| some layers", "in part"],
        ["| window", "bounded"],
    ]
    assert "| 0.500 ± 0.000 | 0.100 ± 0.000 | -0.695 ± 0.003 (beyond noise" in lines[5]
    (need,) = leaderboard.needs(board)
    assert "16 pairs" in need
    assert need.endswith("`window` 0.100 ± 0.000; dense 0.990 ± 0.010.")
    assert leaderboard.needs(leaderboard.Board(docs(*own, *best))) == [], "no other has a bounded cache"


def test_what_failed_and_what_another_part_measured_is_not_among_them(docs):
    failed = {**pairs("broken", LOCAL, 0, 0.0, 0.0), "status": "error", "error": "ValueError: no"}
    elsewhere = record("else", LOCAL, "perplexity", "evaluate", 0, {"value": 3.0}, part="untrained")
    board = leaderboard.Board(docs(pairs("dense", None, 0, 1.0, 1.0), failed, elsewhere))
    assert [line.split(" | ")[0] for line in leaderboard.from_scratch(board.scratch)[2:4]] == ["| dense", ""]
    assert [one["attention"] for one in board.zoo.records] == ["else"]


def test_a_pretrained_model_has_its_recall_beside_perplexity(docs):
    recall = {"by_part": {"copy": {"by_distance": [{"distance": 256, "accuracy": 0.75}]}}}
    figures = {"by_position": [{"perplexity": 9.0}, {"perplexity": 7.0}]}
    rows = [
        record(name, rules, "perplexity", "evaluate", 0, result, part="untrained")
        for name, rules, value in (("window", LOCAL, 20.0), ("dense", None, 10.0))
        for result in [{"value": value, "figures": figures, "others": {"recall": recall}}]
    ]
    failed = {**rows[0], "key": "odd", "attention": "pairs of heads", "status": "error", "error": "ValueError: 9 heads"}
    board = leaderboard.Board(docs(*rows, failed))
    lines = leaderboard.untrained(board.zoo)
    assert "Left out: `pairs of heads` (9 heads)." in lines
    assert lines[:4] == [
        "| attention | its cache | perplexity | in the last quarter | copy at 256 |",
        "|---|---|---|---|---|",
        "| dense | grows | 10.00 | 7.00 | 0.750 |",
        "| window | bounded | 20.00 | 7.00 | 0.750 |",
    ]


def test_rows_at_equal_budget_say_what_they_keep(docs):
    quick = []
    for name, rules, value, kept in (("dense", None, 10.0, 400), ("window", LOCAL, 12.0, 100)):
        of = {"rules": rules, "part": "quick: perplexity"}
        quick.append(record(name, rules, "perplexity", "evaluate", 0, {"value": value}, part=of["part"]))
        quick.append(record(name, rules, "perplexity", "cost", 0, {"bytes": kept}, part=of["part"]))
        figures = {"by_distance": [{"distance": 256, "accuracy": 0.5}]}
        result = {"value": 0.5, "figures": figures}
        quick.append(record(name, rules, "recall", "evaluate", 0, result, part="quick: recall"))
    lines = leaderboard.equal_budget(leaderboard.Board(docs(*quick)).quick)
    assert lines[0] == "| attention | bytes kept | perplexity | recall at 256 |"
    assert lines[2:4] == ["| dense | 100.0% | 10.00 | 0.500 |", "| window | 25.0% | 12.00 | 0.500 |"]


def test_a_task_shows_the_best_other_attention_and_whether_it_is_behind(docs):
    folder = docs()
    lines = []
    for name, value in (("dense", 10.0), ("near", 11.0), ("far", 30.0)):
        for seed in (0, 1, 2):
            result = {"better": "lower", "figures": {"perplexity": value + seed / 10, "accuracy": 0.5}}
            lines.append(record(name, None if name == "dense" else LOCAL, "masked-lm", "finetune", seed, result))
    (folder / "benchmarks" / "tasks" / "masked_lm.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "benchmarks" / "tasks" / "one.jsonl").write_text(json.dumps(lines[0]) + "\n")  # with no other beside it
    row = leaderboard.tasks(leaderboard.Board(folder).tasks)[2]
    assert row.startswith("| masked lm | perplexity, lower is better | 10.10 ± 0.100 | near | 11.10 ± 0.100 | +1.00")


def test_a_page_gets_the_tables_that_it_names(docs):
    page = "<!-- from scratch: written by `make docs` -->\nold\n<!-- from scratch: end -->\n"
    assert leaderboard.with_leaderboard(page, docs()) == page.replace("old", "Not measured yet.")
    with pytest.raises(ValueError, match="the table 'from scratch' has no end"):
        leaderboard.with_leaderboard(page.replace("<!-- from scratch: end -->", ""), docs())
