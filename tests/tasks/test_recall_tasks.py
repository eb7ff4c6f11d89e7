"""The tasks of recall: 1 for a model that copies, 0 for one that cannot, by distance; generated is as in one pass."""

import math
import random

import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from recalling import Copier, spelling, tiny

import attn_plugins as ap
from attn_plugins.tasks import get_task, list_tasks, run_task
from attn_plugins.tasks.recall_task import RecallConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CHANCE = random.Random(0)
DATA = Dataset.from_dict({"text": [" ".join(CHANCE.choices(WORDS, k=300)) for _ in range(6)]})
TASKS = [name for name in list_tasks() if get_task(name).Config is RecallConfig]
LENGTHS = {"distances": [110, 260], "rows": 2, "passage": 30}


def measured(name, model, **options):
    task = get_task(name)(get_task(name).Config(**{**LENGTHS, **options}))
    return run_task(task, model, task.prepare(DATA, spelling(), model))


def test_these_are_the_tasks_of_recall():
    assert TASKS == ["codes", "copy", "names", "passkey", "recall"]
    assert all(get_task(name).recalls for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_copies_has_1_and_one_that_forgets_has_0(name):
    found = measured(name, Copier())
    assert (found["accuracy"], found["exact"], found["rows"]) == (1, 1, 4)
    assert found["loss"] == pytest.approx(math.log1p((len(spelling()) - 1) * math.exp(-8)), rel=1e-4)
    none = measured(name, Copier(reach=1))
    assert (none["accuracy"], none["exact"]) == (0, 0)
    assert none["loss"] == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("name", TASKS)
def test_figures_by_distance_tell_how_far_a_model_reaches(name):
    found = measured(name, Copier(reach=120))
    near, far = found["by_distance"]
    assert (near["distance"], near["accuracy"], near["exact"], near["rows"]) == (110, 1, 1, 2)
    assert (far["distance"], far["exact"], far["rows"]) == (260, 0, 2)
    assert far["accuracy"] < 0.5
    assert far["loss"] > 2
    assert found["accuracy"] == pytest.approx((near["accuracy"] + far["accuracy"]) / 2)


def test_recall_is_the_mean_of_its_parts():
    found = measured("recall", Copier(reach=120))
    assert set(found["by_part"]) == {"passkey", "copy"}
    for name in ("accuracy", "exact", "loss"):
        assert found[name] == pytest.approx(sum(part[name] for part in found["by_part"].values()) / 2)
        for number, distance in enumerate(found["by_distance"]):
            parts = [part["by_distance"][number] for part in found["by_part"].values()]
            assert distance[name] == pytest.approx(sum(part[name] for part in parts) / 2)


@pytest.mark.parametrize("rule", [None, {"type": "local", "window_size": 8, "num_sink_tokens": 2}, "linear", "topk"])
def test_generated_through_the_cache_it_is_what_a_pass_over_all_that_is_generated_gives(rule):
    model = tiny()
    if rule is not None:
        ap.swap_attention(model, rule)
    by = {}
    for batch_size in (1, 2):
        options = {**LENGTHS, "distances": [110], "by": "generate", "batch_size": batch_size}
        by[batch_size] = measured("recall", model, **options)
    for figure in ("accuracy", "exact", "loss"):
        assert by[1][figure] == pytest.approx(by[2][figure], rel=1e-4)
    task = get_task("recall")(get_task("recall").Config(**options))
    right = total = loss = 0.0
    for batch in task.prepare(DATA, spelling(), model):
        for ids, asked in zip(batch["input_ids"], batch["asked"], strict=True):
            truth = ids.clone()
            for at in range(len(ids)):
                if asked[at]:
                    with torch.no_grad():
                        logits = model(input_ids=ids[None, :at], use_cache=False).logits[0, -1]
                    ids[at] = logits.argmax()
                    if asked[at] == 1:
                        right, total = right + bool(ids[at] == truth[at]), total + 1
                        loss -= float(logits.log_softmax(-1)[truth[at]])
    first = by[2]["by_part"]["passkey"]
    assert first["accuracy"] == pytest.approx(right / total)
    assert first["loss"] == pytest.approx(loss / total, rel=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_in_one_pass_all_logits_or_the_last_alone_give_the_same(kept, monkeypatch):
    model = tiny()
    task = get_task("recall")(get_task("recall").Config(**LENGTHS))
    right = loss = total = 0.0
    for batch in task.prepare(DATA, spelling(), model):
        ids, asked = batch["input_ids"], batch["asked"]
        with torch.no_grad():
            scores = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        copied = asked[:, 1:] == 2
        right += float((scores.argmax(-1) == ids[:, 1:])[copied].sum())
        loss -= float(scores.gather(2, ids[:, 1:, None])[..., 0][copied].sum())
        total += float(copied.sum())
    if not kept:
        whole = type(model).forward
        monkeypatch.setattr(type(model), "forward", lambda self, input_ids, use_cache: whole(self, input_ids))
    found = measured("recall", model)["by_part"]["copy"]
    assert (found["accuracy"], found["loss"]) == (pytest.approx(right / total), pytest.approx(loss / total, rel=1e-5))


def test_settings_of_the_model_do_not_change_what_is_generated():
    model = tiny(eos_token_id=2)
    plain = measured("copy", model, by="generate")
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=3)
    model.generation_config.eos_token_id = list(range(40))
    assert measured("copy", model, by="generate") == plain


def test_only_as_much_text_is_read_as_the_rows_need():
    class Counting(list):
        def __iter__(self):
            for text in super().__iter__():
                read.append(text)
                yield text

    read = []
    task = get_task("copy")(get_task("copy").Config(**LENGTHS))
    task.prepare({"text": Counting(DATA["text"][:] * 50)}, spelling(), Copier())
    assert 4 <= len(read) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": []}, r"distances=\[\]; allowed: at least one, from 1, each once"),
        ({"distances": [64, 64]}, "each once"),
        ({"distances": [0]}, "from 1"),
        ({"rows": 0}, "rows=0; allowed: at least 1"),
        ({"distances": [513]}, "distances=513; allowed: at most 512, the model's max_position_embeddings"),
        ({"distances": [20]}, "length=20; allowed: at least .* for copy"),
        ({"passage": 3}, "passage=3; allowed: more than the 8 tokens"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        measured("copy", tiny(), **options)
