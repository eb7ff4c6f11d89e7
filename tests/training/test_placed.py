"""A task that asks its model something while it prepares batches finds it where it is to run."""

import pytest
from transformers import Trainer

from attn_plugins.core.options import build
from attn_plugins.tasks import get_task
from attn_plugins.training import evaluate
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def order(monkeypatch):
    """What was done, as it is done."""
    done = []

    def note(owner, name, what):
        before = getattr(owner, name)

        def noted(*args, **kwargs):
            done.append(what)
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(evaluate, "place", "placed")
    note(Trainer, "_move_model_to_device", "placed")
    note(get_task("perplexity"), "prepare", "prepared")
    return done


def test_an_evaluation_places_its_model_before_its_tasks_prepare(llama, text, order):
    tree = {"model": llama, "data": {"source": text}, "evaluation": {"length": 16}}
    evaluate.prepare_evaluation(build(EvaluateConfig, tree))
    assert order == ["placed", "prepared"]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_fine_tune_places_its_model_before_its_tasks_prepare(llama, text, tmp_path, order, tune):
    tree = {"model": llama, "data": {"source": text}, "output_dir": str(tmp_path / "out"), "block_size": 16}
    prepare_finetune(build(FinetuneConfig, {**tree, "tune": tune, "evaluation": {"length": 16}}))
    assert order == ["placed", "prepared"]
