"""Every file under configs/ is what it says: loaded and validated as the command would."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.cost.decode import DecodeConfig
from attn_plugins.benchmark.cost.kernels import BenchConfig, contenders
from attn_plugins.benchmark.pages.attention_page import OWN
from attn_plugins.benchmark.pages.task_tables import FIGURES
from attn_plugins.benchmark.suites import config as suites
from attn_plugins.benchmark.suites import presets
from attn_plugins.config.yaml import read_yaml
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.options import build
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.core.rules import parse_rules
from attn_plugins.data.sources import DataConfig
from attn_plugins.tasks import get_task
from attn_plugins.tasks.answers_task import AnswersTask
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.models import DEMO, read_attention
from attn_plugins.training.new_models import new_model
from attn_plugins.transfer.recipe import RecipeConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SIZES = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)


def files(folder):
    found = sorted((CONFIGS / folder).glob("*.yaml"))
    assert found
    return pytest.mark.parametrize("path", found, ids=[path.stem for path in found])


def test_every_file_is_of_a_kind_that_a_test_here_loads():
    kinds = {
        "attention",
        "train",
        "transfer",
        "compare",
        "tasks",
        "accelerate",
        "bench",
        "suites",
        "presets",
        "scratch",
    }
    stray = [
        path
        for path in CONFIGS.rglob("*")
        if path.is_file() and (path.suffix != ".yaml" or path.parent.name not in kinds)
    ]
    assert stray == []


@files("attention")
def test_attention(path):
    assert parse_rules(read_attention(str(path)))


@files("train")
def test_train(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # rules in files are named from where the command is given
    config = build(FinetuneConfig, read_yaml(path))
    assert config.output_dir == f"runs/{path.stem}"
    trained = config.trained()
    trained.arguments()(output_dir=str(tmp_path), **{"use_cpu": True, **trained.defaults, **config.training})


@files("transfer")
def test_transfer(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = build(RecipeConfig, read_yaml(path))
    assert config.output_dir == f"runs/{path.stem}"


@files("compare")
def test_compare(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = build(CompareConfig, read_yaml(path))
    assert config.output_dir == f"runs/{path.stem}"
    todo = cells(config)
    assert len({cell.key for cell in todo}) == len(todo)


@files("compare/tasks")
def test_compare_tasks(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = build(CompareConfig, read_yaml(path))
    assert config.output_dir == f"runs/tasks/{path.stem}"
    assert config.task.name in FIGURES
    assert config.task.metric in FIGURES[config.task.name], "the table has the figure that stands for the task"


@pytest.mark.of_the_registry
@files("compare/scratch")
def test_compare_scratch(path):
    config = build(CompareConfig, read_yaml(path))
    assert config.output_dir == f"runs/scratch/{path.stem}"
    assert len(config.seeds) == 3
    (model,) = map(new_model, config.models.values())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 2)
    assert config.attentions[config.baseline] is None
    served = {rule["type"] for rules in config.attentions.values() if rules is not None for rule in rules}
    causal = issubclass(get_task(config.task.name), AnswersTask)
    able = {name for name in list_attentions() if getattr(get_attention(name), "causal" if causal else "bidirectional")}
    own = {name for name in able if get_attention(name).__module__.startswith(OWN)}
    assert served <= own
    assert not causal or served == own, "recall is asked of every attention that can be causal"


def stand_in(monkeypatch):
    """A model of SIZES in the place of those that presets look at."""
    with torch.device("meta"):
        model = LlamaForCausalLM(SIZES)
    monkeypatch.setattr(presets, "config_of", lambda source: SIZES)
    monkeypatch.setattr(presets, "skeleton", lambda source: model)


@files("suites")
def test_suites(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(suites, "unfit", lambda *model: None)  # no model is here
    stand_in(monkeypatch)
    tree = suites.suite_tree(path.stem)
    asked = suites.read_suite(tree)
    assert asked.output_dir == f"runs/suites/{path.stem}"
    assert asked.description
    names = [part for part, _ in asked.parts]
    assert names == list(tree["parts"])
    assert asked.left_out == []
    assert all(cells(config, part) for part, config in asked.parts)


def test_the_full_suite_is_all_others():
    paths = (CONFIGS / "suites").glob("*.yaml")
    others = {path.stem for path in paths if "suites" not in read_yaml(path)}
    assert set(read_yaml(CONFIGS / "suites" / "full.yaml")["suites"]) == others
    files = {Path(part.get("file", "")).resolve() for part in suites.suite_tree("full")["parts"].values()}
    wanted = [path for folder in ("tasks", "scratch") for path in (CONFIGS / "compare" / folder).glob("*.yaml")]
    assert {path.resolve() for path in wanted} <= files


@files("presets")
def test_presets(path, monkeypatch):
    stand_in(monkeypatch)
    preset = presets.read_preset(path.stem)
    assert preset.description
    rows = presets.rows_for(preset, "model", "float32", DataConfig(source="text"))
    assert len(rows.attentions) == len(preset.once) + len(preset.budgets) * len(preset.each)
    assert rows.left_out == {}
    assert rows.baseline in rows.attentions


@pytest.mark.of_the_registry
def test_every_attention_whose_cache_is_bounded_has_a_row_at_equal_budget():
    preset = presets.read_preset("equal_budget")
    served = set(re.findall(r"'type': '(\w+)'", str([preset.once, preset.each]))) | {
        *filter(None, map(str, preset.once.values()))
    }
    heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, hidden_size=32, layer=0)
    for name in list_attentions():
        attention = get_attention(name)
        if not attention.causal or not attention.__module__.startswith(OWN):
            continue
        state = attention(attention.Config(), heads).new_state()
        assert state is None or state.grows or name in served | {"longformer"}, name  # whose causal pattern is local's


@pytest.mark.of_the_registry
@files("bench")
def test_bench(path):
    tree = read_yaml(path)
    assert tree["output_dir"] == f"runs/bench/{path.stem}"
    if "contexts" in tree:
        built = build(DecodeConfig, tree)
        assert path.stem != "decode" or built == DecodeConfig(), "the file and the defaults say the same"
        return
    # What is meant for another device is checked on this one, as far as it is there.
    config = build(BenchConfig, tree if tree["device"] == "cpu" else {**tree, "device": "cpu"})
    served = {contender.source["type"] for contender in contenders(config) if "type" in contender.source}
    if path.stem == "compiled":
        compiled = {one.source["type"] for one in contenders(config) if one.source.get("backend") == "cpp"}
        assert {"local", "linear", "block_topk"} <= compiled
        return
    own = {name for name in list_attentions() if get_attention(name).__module__.startswith(OWN)}
    assert own <= served, "every attention of the package is in every other benchmark"


@files("accelerate")
def test_accelerate(path):
    from accelerate.commands import launch

    (line,) = [line for line in path.read_text().splitlines() if "accelerate launch" in line]
    words = line.removeprefix("#").split()[2:]
    assert words[:2] == ["--config_file", f"configs/accelerate/{path.name}"], "its own command"
    asked = launch.launch_command_parser().parse_args([words[0], str(path), *words[2:]])
    config = launch._validate_launch_command(asked)[1]
    assert config.num_processes > 1
    assert config.use_cpu == (path.stem == "cpu")
    sizes = config.parallelism_config or {"none": config.num_processes}
    assert math.prod(sizes.values()) == config.num_processes
    kinds = (asked.multi_gpu, asked.use_fsdp, asked.use_deepspeed, config.use_cpu)
    assert sum(map(bool, kinds)) == 1
    unknown = {*config.fsdp_config, *config.deepspeed_config, *config.parallelism_config} - vars(asked).keys()
    assert unknown == set(), "accelerate reads over names that it does not know"


def test_the_demo_compares_what_it_has_to():
    config = build(CompareConfig, read_yaml(CONFIGS / "compare" / "demo.yaml"))
    assert list(config.models.values()) == [DEMO]
    chosen = [label for label, value in config.attentions.items() if isinstance(value, dict)]
    assert chosen, "no heads that are chosen"
    rules = {label: value or [] for label, value in config.attentions.items() if label not in chosen}
    assert rules[config.baseline] == []
    kinds = {rule["type"] for value in rules.values() for rule in value}
    assert {"local", "linear", "block_topk", "additive"} <= kinds
    (bar,) = rules[config.bar]
    assert bar["type"] == "local"
    assert bar["num_sink_tokens"] > 0
    assert config.untrained
    assert config.finetune is not None
    assert {(cell.attention, cell.measure) for cell in cells(config)} >= {("linear", "transfer")}
    assert any(task.recalls for task in config.tasks), "perplexity alone does not show what is recalled"
    length = config.task.config.length
    for value in rules.values():
        for rule in value:
            if rule["type"] == "local":
                assert rule["window_size"] <= length // 4, "a window as long as the text says nothing"
    assert any(len(value) > 1 or any("layers" in rule for rule in value) for value in rules.values()), "no hybrid"
