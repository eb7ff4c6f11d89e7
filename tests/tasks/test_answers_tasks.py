"""Tasks that make rows of tokens with answers: what is asked follows from the row; held-out rows are never trained."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attn_plugins.data.synthetic.rows import drawn, hashes
from attn_plugins.data.text import IGNORED
from attn_plugins.tasks import get_task, list_tasks, run_task
from attn_plugins.tasks.answers_task import AnswersTask

TASKS = [name for name in list_tasks() if issubclass(get_task(name), AnswersTask)]
FEW = {
    "associative-recall": {"length": 4, "vocab_size": 4, "pairs": [1]},
    "induction": {"length": 5, "vocab_size": 3},
    "selective-copying": {"length": 5, "vocab_size": 4, "tokens": 1},
}
"""Options by which a task has few different rows, so that chance alone would not keep them apart."""


def task(name, **options):
    cls = get_task(name)
    return cls(cls.Config(**options))


class Looking(nn.Module):
    """Names what came after the token when it stood before in its row, within so many tokens; else token 0."""

    def __init__(self, reach, vocab_size=64, length=64):
        super().__init__()
        self.reach, self.weight = reach, nn.Parameter(torch.zeros(1))
        config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=length)
        config.get_text_config = lambda: config
        self.config = config

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., 0] = 1.0
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                before = [past for past in range(max(0, at - self.reach), at) if ids[past] == token]
                if before:
                    logits[row, at, ids[before[0] + 1]] = 9.0
        return SimpleNamespace(logits=logits)


def found(task, model):
    return run_task(task, model, task.prepare(None, None, model))


def test_every_task_of_this_kind_has_a_case():
    assert set(FEW) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_held_out_rows_are_none_of_those_to_train_on_and_the_seed_makes_both(name):
    made = task(name, **FEW[name])
    train, held_out = made.made(200, False), made.made(50, True)
    sides = [{tuple(row) for row in rows["input_ids"].tolist()} for rows in (train, held_out)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert max(map(len, sides)) < 50, "chance would have them share rows"
    assert (len(train["input_ids"]), len(held_out["input_ids"])) == (200, 50)
    for column, value in task(name, **FEW[name]).made(200, False).items():
        assert torch.equal(value, train[column])
    other = task(name, **{**FEW[name], "seed": 1})
    assert not torch.equal(other.made(200, False)["input_ids"], train["input_ids"])
    assert not {tuple(row) for row in other.made(200, False)["input_ids"].tolist()} & sides[1]


def test_the_sides_are_of_equal_size_and_do_not_go_by_one_token():
    ids = torch.randint(0, 50, (4000, 9))
    side = hashes(ids) % 2
    assert 0.45 < side.double().mean() < 0.55
    for token in range(5):
        assert 0.3 < side[ids[:, 0] == token].double().mean() < 0.7
    assert hashes(ids.flip(1)).ne(hashes(ids)).any(), "the order counts"


def test_a_side_without_rows_is_said():
    alone = torch.zeros(1000, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"of \d+ rows that were drawn, 0 may be used; allowed: options with more"):
        drawn(lambda number, chance: {"input_ids": alone}, 1, seed=0, held_out=bool(1 - hashes(alone[:1]) % 2))


def test_questions_of_associative_recall_are_answered_by_the_pairs_alone():
    made = task("associative-recall", length=40, vocab_size=64, pairs=[2, 10], rows=101, batch_size=16)
    rows = made.made(101, True)
    bounds = made.groups()["distance"]
    assert bounds == [4, 8, 16, 32, 64]
    for ids, labels, pairs, distance in zip(
        *(rows[name].tolist() for name in ("input_ids", "labels", "pairs", "distance")), strict=True
    ):
        told = 2 * made.config.pairs[pairs[0]]
        values = dict(zip(ids[:told:2], ids[1:told:2], strict=True))
        assert len(values) == told // 2, "no key twice"
        asked = [at for at, label in enumerate(labels) if label != IGNORED]
        assert sorted(ids[at - 1] for at in asked) == sorted(values), "each key once"
        assert min(asked) > told
        for at in asked:
            assert labels[at] == values[ids[at - 1]]
            apart = at - 1 - ids.index(ids[at - 1])
            assert bounds[distance[at]] >= apart > (0, *bounds)[distance[at]]
        others = [token for at, token in enumerate(ids) if at >= told and at + 1 not in asked]
        assert min([*values.values(), *others]) >= 32 > max(values), "no key stands among values and fillers"
    assert [(rows["pairs"] == number).sum() for number in (0, 1)] == [51, 50]


def test_questions_come_soon_by_the_power_law():
    def mean(power):
        rows = task("associative-recall", length=60, pairs=[2], power=power).made(400, True)
        return (rows["labels"] != IGNORED).nonzero()[:, 1].double().mean()

    assert mean(0.01) < 20 < 28 < mean(1.0) < 36


def test_figures_tell_how_many_pairs_and_how_far_a_model_reaches():
    made = task("associative-recall", length=64, vocab_size=64, pairs=[2, 8], rows=40, batch_size=16)
    all_right = found(made, Looking(64))
    assert (all_right["accuracy"], all_right["exact"], all_right["answers"]) == (1.0, 1.0, 20 * 2 + 20 * 8)
    assert [(part["pairs"], part["answers"]) for part in all_right["by_pairs"]] == [(2, 40), (8, 160)]
    near = found(made, Looking(8))
    shares = {part["distance"]: part["accuracy"] for part in near["by_distance"]}
    assert shares == {4: 1.0, 8: 1.0, 16: 0.0, 32: 0.0, 64: 0.0}
    two, eight = (part["accuracy"] for part in near["by_pairs"])
    assert two > 3 * eight > 0
    assert near["exact"] < near["accuracy"] < 1
    assert sum(part["answers"] for part in near["by_distance"]) == near["answers"]
    others = task("associative-recall", length=64, vocab_size=64, pairs=[2, 8], rows=40, batch_size=7)
    assert found(others, Looking(8))["by_distance"] == [pytest.approx(part) for part in near["by_distance"]]


def test_induction_asks_what_followed_a_token_that_stood_once():
    made = task("induction", length=40, vocab_size=16, rows=60)
    rows = made.made(60, True)
    for ids, labels, distance in zip(
        *(rows[name].tolist() for name in ("input_ids", "labels", "distance")), strict=True
    ):
        assert ids.count(15) == 2
        assert ids[-2] == 15
        place = ids.index(15)
        assert labels == [IGNORED] * 39 + [ids[place + 1]]
        assert ids[-1] == labels[-1]
        bounds = (0, *made.groups()["distance"])
        assert bounds[distance[-1]] < 38 - place <= bounds[distance[-1] + 1]
    whole, near = (found(made, Looking(reach)) for reach in (40, 16))
    assert (whole["accuracy"], whole["answers"]) == (1.0, 60)
    shares = {part["distance"]: part["accuracy"] for part in near["by_distance"]}
    assert (shares[4], shares[8], shares[16]) == (1, 1, 1)
    assert max(shares[32], shares[64]) < 0.3, "token 0 may be right"


def test_selective_copying_asks_for_all_but_the_noise_in_its_order():
    made = task("selective-copying", length=30, vocab_size=12, tokens=6, rows=40)
    rows = made.made(40, True)
    bounds = (0, *made.groups()["distance"])
    places = set()
    for ids, labels, distance in zip(
        *(rows[name].tolist() for name in ("input_ids", "labels", "distance")), strict=True
    ):
        told = [(place, token) for place, token in enumerate(ids[:23]) if token != 11]
        places |= {place for place, _ in told}
        said = [token for _, token in told]
        assert (ids[23], ids[24:]) == (10, said)
        assert labels == [IGNORED] * 24 + said
        assert len(set(said)) == 6
        for number, (place, _) in enumerate(told):
            apart, group = 23 + number - place, distance[24 + number]
            assert bounds[group] < apart <= bounds[group + 1]
    assert places == set(range(23)), "anywhere"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("associative-recall", {"pairs": []}, r"pairs=\[\]; allowed: at least one number, from 1, each once"),
        ("associative-recall", {"pairs": [2, 2]}, "pairs="),
        ("associative-recall", {"pairs": [20]}, "length=64; allowed: at least 80, four times the most pairs"),
        ("associative-recall", {"vocab_size": 31}, "vocab_size=31; allowed: at least 32, twice the most pairs"),
        ("associative-recall", {"power": 0.0}, "power=0.0; allowed: above 0"),
        ("induction", {"length": 3}, "length=3; allowed: at least 4"),
        ("induction", {"vocab_size": 2}, "vocab_size=2; allowed: at least 3"),
        ("selective-copying", {"tokens": 0}, "tokens=0; allowed: at least 1"),
        ("selective-copying", {"tokens": 32}, "length=64; allowed: at least 65, the tokens, a separator and the copy"),
        ("selective-copying", {"vocab_size": 9}, "vocab_size=9; allowed: at least 10, the tokens, separator and noise"),
        ("associative-recall", {"train_rows": 0}, "train_rows=0; allowed: at least 1"),
        ("associative-recall", {"rows": 0}, "rows=0; allowed: at least 1"),
        ("associative-recall", {"seed": -1}, "seed=-1; allowed: 0 to"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        task(name, **options)
