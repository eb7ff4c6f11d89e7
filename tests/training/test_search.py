"""A search: the best of what it tries comes first, and it goes on where it was killed."""

import pytest
import yaml
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.core.options import build
from attn_plugins.training import search as searching
from attn_plugins.training.finetune import Finetune
from attn_plugins.training.search import SearchConfig, search

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*experimental"),  # optuna's file storage calls itself that
]


def settings(folder, rows, out):
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    tree = {"model": folder, "data": {"source": rows}, "output_dir": str(out), "attention": {"type": "local"}}
    return tree | {
        "tune": "full",
        "block_size": 16,
        "evaluation": {"length": 16},
        "recall": False,
        "training": training,
    }


SPACE = {"attention.window_size": [2, 8], "training.learning_rate": {"log": [1e-4, 1e-1]}}


def test_a_killed_search_goes_on_and_the_best_is_first(llama, text, tmp_path, monkeypatch):
    tree, runs, run = settings(llama, text, tmp_path / "out"), [], Finetune.run

    def killed_in_the_second(self, progress=None):
        runs.append((self.config.attention["window_size"], self.config.training["learning_rate"]))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(self, progress)

    monkeypatch.setattr(Finetune, "run", killed_in_the_second)
    config = SearchConfig(space=SPACE, trials=3)
    with pytest.raises(KeyboardInterrupt):
        search(tree, config)
    found = search(tree, config)
    assert len(runs) == 4
    assert runs[1] == runs[2], "the one that it was killed in comes again"
    assert len({*runs}) == 3
    assert len(found) == 3
    assert [one["value"] for one in found] == sorted(one["value"] for one in found)
    assert {tuple(one["settings"].values()) for one in found} == {*runs}
    assert search(tree, config) == found
    assert len(runs) == 4, "nothing is left to do"

    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**tree, "search": {"space": SPACE, "trials": 3}}))
    said = CliRunner().invoke(cli.app, ["search", "--config", str(tmp_path / "c.yaml")])
    assert said.exit_code == 0, said.output
    assert f"{found[0]['value']:.4g}" in said.output


def test_settings_that_do_not_fit_are_passed_over(llama, text, tmp_path):
    tree = settings(llama, text, tmp_path / "out")
    with pytest.raises(ValueError, match="none of the settings that were tried fits the model"):
        search(tree, SearchConfig(space={"attention.layers": [9]}, trials=1))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"space": {}}, r"search\.space is empty; allowed: settings by path"),
        ({"space": {"seed": []}}, r"search\.space\.seed=\[\]; allowed: a list of values"),
        ({"space": {"seed": {"log": [0, 1]}}}, r"search\.space\.seed=.*with least above 0"),
        ({"space": {"seed": {"range": [2, 1]}}}, r"search\.space\.seed="),
        ({"space": {"seed": [1]}, "trials": 0}, r"search\.trials=0; allowed: at least 1"),
    ],
)
def test_a_wrong_space_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        build(SearchConfig, tree, "search")


def test_wrong_settings_are_refused_before_anything_is_tried(tmp_path, monkeypatch):
    tree = settings("/no/model", "no.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown key 'learning_rat' in training"):
        search(tree, SearchConfig(space={"training.learning_rat": [1.0]}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a search runs in one process; allowed: finetune over several"):
        searching.search(tree, SearchConfig(space=SPACE))
