"""Fine-tunes on 2 and 4 processes of a CPU, from the files of configs/accelerate: what one process does on its own."""

import json
import random
import subprocess
import sys

import fleet
import pytest
import torch
import yaml
from conftest import WORDS, tokenizer, write_rows
from fleet import Launch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attn_plugins as ap

FLAG = [
    {"type": "local", "window_size": 6, "layers": 0},
    {"type": "linear", "feature_map": "hedgehog", "layers": 1},
    {"type": "linear", "feature_map": "favor", "num_features": 8, "layers": 2},
    {"type": "lsh", "num_hashes": 2, "num_buckets": 4, "bucket_size": 4, "layers": 3},
    {"type": "gated_delta", "layers": 4},
    {"type": "local", "window_size": 4, "kv_heads": [0], "layers": 5},
    {"type": "linear", "feature_map": "hedgehog", "kv_heads": [1], "layers": 5},
]
"""Without weights, with weights, with buffers that are drawn and saved, and with two attentions in one module."""

BATCH = 4
"""Rows a step, in all processes together."""

KEPT = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder of a tiny decoder, and a file of texts beside it."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": len(FLAG) - 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    chance = random.Random(0)
    write_rows(folder / "text.jsonl", [{"text": " ".join(chance.choices(WORDS, k=24))} for _ in range(32)])
    return folder


@pytest.fixture
def finetune(pretrained, tmp_path):
    """A launch of a fine-tune whose step is one of BATCH rows, into a folder of its own name."""

    def made(name, processes=1, file=None, *, again=False, training=None, options=(), killed_at=None, **changes):
        batch = BATCH // processes
        if again:  # with the file of the run that it goes on with
            more = ["--resume", "--set", f"training.per_device_train_batch_size={batch}"]
        else:
            tree = {
                "model": str(pretrained),
                "data": {"source": str(pretrained / "text.jsonl")},
                "output_dir": str(tmp_path / name),
                "attention": FLAG,
                "tune": "full",
                "block_size": 16,
                "recall": False,
                "evaluation": {"length": 16, "max_tokens": 48},
            }
            fixed = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.03}
            # Where a gradient is next to nothing, Adam would make a step of what is left to rounding.
            fixed |= {"adam_epsilon": 1e-3, "disable_tqdm": True, "per_device_train_batch_size": batch}
            (tmp_path / f"{name}.yaml").write_text(
                yaml.safe_dump({**tree, **changes, "training": {**fixed, **(training or {})}})
            )
            more = []
        return Launch(
            name=name,
            arguments=["finetune", "--config", str(tmp_path / f"{name}.yaml"), *more],
            processes=processes,
            file=f"configs/accelerate/{file}.yaml" if isinstance(file, str) else file and str(file),
            options=list(options),
            killed_at=killed_at,
        )

    return made


def trained(folder, *launches):
    """Launches that are to end well, or to be killed, when they have."""
    for done in fleet.train(folder, list(launches)):
        if done.killed_at is None:
            assert done.statuses == [0] * done.processes, f"{done.name}: {done.said}"
        else:
            assert done.statuses[-1] == -9, f"{done.name}: {done.said}"


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def same(one, other, processes):
    """Whether two runs have the same losses, weights and figures, and the model of the second can be loaded."""
    first, second = metrics(one), metrics(other)
    assert second["parameters"] == first["parameters"]
    assert (first["train"]["processes"], second["train"]["processes"]) == (1, processes)
    for before, after in zip(first["train"]["losses"], second["train"]["losses"], strict=True):
        assert after["step"] == before["step"]
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=lambda said, n=name: f"{n}: {said}")
    figures = [run["evaluation"]["after"]["perplexity"] for run in (first, second)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    return expected


def loads(folder, expected, pretrained):
    """Whether a whole model loads as it was trained, in a process of its own as others do; and whether it was."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert [row.plugin for row in ap.describe_attention(model)] == [row["type"] for row in FLAG]
    held = model.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(held[name], weight, atol=1e-5, rtol=1e-5)
    begun = weights(pretrained)
    assert max((held[name] - weight).abs().max() for name, weight in begun.items()) > 0.01
    projection = "model.layers.2.self_attn.attn_plugin.projection"
    assert torch.equal(held[projection], expected[projection])
    assert held[projection].abs().max() > 0


def test_two_processes_with_copies_or_shards_train_what_one_does(finetune, pretrained, tmp_path):
    trained(
        tmp_path,
        finetune("one"),
        finetune("ddp", 2, "ddp"),
        finetune("fsdp2", 2, "fsdp2", training=KEPT),
    )
    for name in ("ddp", "fsdp2"):
        loads(tmp_path / name, same(tmp_path / "one", tmp_path / name, 2), pretrained)
    assert (tmp_path / "fsdp2" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists(), "it was not FSDP"


def test_what_two_processes_were_killed_at_four_in_a_mesh_go_on_with(finetune, pretrained, tmp_path):
    trained(
        tmp_path,
        finetune("one"),
        finetune("killed", 2, "fsdp2_sharded", training=KEPT, killed_at=3),
        finetune("killed", 4, "hsdp", again=True),
    )
    loads(tmp_path / "killed", same(tmp_path / "one", tmp_path / "killed", 4), pretrained)
    resumed = metrics(tmp_path / "killed")["train"]["resumed_from"]
    assert resumed == str(tmp_path / "killed" / "checkpoint-2")
    kept = [tmp_path / "killed" / f"checkpoint-{step}" / "pytorch_model_fsdp_0" for step in (2, 4)]
    assert [len(list(folder.glob("*.distcp"))) for folder in kept] == [2, 4], "each process writes what it has"
    held = [FileSystemReader(folder).read_metadata().state_dict_metadata["model.lm_head.weight"] for folder in kept]
    assert [len(weight.chunks) for weight in held] == [2, 2], "two shards: of two processes, of each group of two"


FLOAT32 = ("--mixed_precision", "no")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "fsdp2", "fsdp2_sharded", "fsdp2_memory"])
def test_adapters_and_slots_go_on_on_four_processes(finetune, tmp_path, file):
    options = FLOAT32 if file == "fsdp2_memory" else ()
    trained(
        tmp_path,
        finetune("one", tune="lora"),
        finetune("killed", 2, file, tune="lora", training=KEPT, killed_at=3, options=options),
        finetune("killed", 4, file, again=True, options=options),
    )
    same(tmp_path / "one", tmp_path / "killed", 4)
    assert any("attn_plugin.projection" in name for name in weights(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "fsdp2"])
def test_what_two_processes_keep_whole_four_go_on_with(finetune, pretrained, tmp_path, file):
    trained(
        tmp_path,
        finetune("one"),
        finetune("killed", 2, file, training=KEPT, killed_at=3),
        finetune("killed", 4, file, again=True),
    )
    loads(tmp_path / "killed", same(tmp_path / "one", tmp_path / "killed", 4), pretrained)


@pytest.mark.slow
def test_weights_that_one_process_reads_train_in_all(finetune, pretrained, tmp_path):
    """And layers are computed again; what is measured before training is measured of the weights that are read."""
    measured = {"evaluate_before": True}
    trained(
        tmp_path,
        finetune("one", **measured),
        finetune("two", 2, "fsdp2_memory", training=KEPT, options=FLOAT32, **measured),
        finetune("four", 4, "fsdp2_memory", options=FLOAT32, **measured),
        finetune("short", 2, "fsdp2_memory"),
    )
    begun = metrics(tmp_path / "one")
    for name, processes in (("two", 2), ("four", 4)):
        loads(tmp_path / name, same(tmp_path / "one", tmp_path / name, processes), pretrained)
        before = metrics(tmp_path / name)["evaluation"]["before"]
        assert before["perplexity"] == pytest.approx(begun["evaluation"]["before"]["perplexity"], rel=1e-5)
    short = metrics(tmp_path / "short")  # bfloat16 has three digits
    for loss, expected in zip(short["train"]["losses"], begun["train"]["losses"], strict=True):
        assert loss["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"loss": "kl", "tune": "lora"}, {"loss": "hidden", "tune": "new"}], ids=["kl", "hidden"]
)
def test_a_model_is_held_to_itself_in_two_processes(finetune, tmp_path, how):
    trained(
        tmp_path,
        finetune("one", **how),
        finetune("ddp", 2, "ddp", **how),
        finetune("fsdp2", 2, "fsdp2", **how),
        finetune("memory", 2, "fsdp2_memory", options=FLOAT32, **how),
    )
    for name in ("ddp", "fsdp2", "memory"):
        same(tmp_path / "one", tmp_path / name, 2)


@pytest.mark.slow
def test_the_best_checkpoint_comes_back_from_its_shards(finetune, pretrained, tmp_path):
    best = {**KEPT, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}
    trained(tmp_path, finetune("one", training=best), finetune("two", 2, "fsdp2_sharded", training=best))
    chosen = [metrics(tmp_path / name)["train"]["best"] for name in ("one", "two")]
    assert chosen[0]["step"] == chosen[1]["step"] == 2, "with such a learning rate the last is not the best"
    loads(tmp_path / "two", same(tmp_path / "one", tmp_path / "two", 2), pretrained)


@pytest.mark.slow
def test_a_classifiers_new_head_trains_where_one_process_has_read_the_rest(finetune, bert, labelled, tmp_path):
    how = {"model": bert, "data": {"source": labelled, "label_column": "label"}, "task": "classification"}
    layers = ("--fsdp_transformer_layer_cls_to_wrap", "BertLayer")  # its embeddings would be sharded twice
    how |= {"attention": "sigmoid", "evaluation": {}, "block_size": 1024, "max_length": 16}
    trained(
        tmp_path,
        finetune("one", **how),
        finetune("two", 2, "fsdp2_memory", training=KEPT, options=(*FLOAT32, *layers), **how),
    )
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert {"classifier.weight", "classifier.bias"} <= found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["deepspeed_zero2", "deepspeed_zero3", "small"])
def test_deepspeed_trains_what_one_process_does(finetune, pretrained, tmp_path, file):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    if file == "small":  # which it would leave whole in each process
        shards = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        sizes = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        small = {"zero_optimization": shards, **dict.fromkeys(sizes, "auto")}
        (tmp_path / "small.json").write_text(json.dumps(small))
        tree = yaml.safe_load((fleet.ROOT / "configs/accelerate/deepspeed_zero3.yaml").read_text())
        tree["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "small.json"), "zero3_init_flag": True}
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in tree.items() if name != "mixed_precision"}))
    trained(
        tmp_path,
        finetune("one"),
        finetune("killed", 2, file, training=KEPT, killed_at=3),
        finetune("killed", 2, file, again=True),
    )
    loads(tmp_path / "killed", same(tmp_path / "one", tmp_path / "killed", 2), pretrained)
    (kept,) = (tmp_path / "killed" / "checkpoint-4").glob("global_step*")
    assert len(list(kept.glob("*optim_states.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        ["accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml", "--num_processes", "2"],
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers_start_it(finetune, tmp_path, launch):
    """As they are, on a machine that may have no accelerator."""
    command = finetune("two", 2, training=KEPT).arguments
    trained(tmp_path, finetune("one"))
    words = [sys.executable, "-m", *launch, "-m", "attn_plugins", *command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=fleet.ROOT)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "two", 2)
    sharded = (tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()
    assert sharded == ("accelerate.commands.launch" in launch)
