"""Trainer on rows that processes have a part each of, beside one process: a program that forks them.

``python context_trainer_program.py FOLDER 1 2 2x2`` trains in one process, on 2 with a part each, and on 2 pairs of
them that have other rows. Each process writes a line of JSON: losses, norms of gradients, and an evaluation's loss.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch.multiprocessing import start_processes

import attn_plugins as ap

LENGTH, STEPS = 32, 3
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
RULES = [{"type": "local", "window_size": 9, "layers": 0}, {"type": "linear", "layers": 1}]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def rows():
    """Two texts a row, of other lengths in each, the last row padded."""
    torch.manual_seed(0)
    made = []
    for number in range(4):
        first = 9 + 3 * number
        ids = torch.randint(3, SIZES["vocab_size"], (LENGTH,))
        positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])
        labels = ids.masked_fill(positions == 0, -100)
        real = torch.ones_like(ids)
        if number == 3:
            real[27:] = 0
            ids, labels = ids * real, labels.masked_fill(real == 0, -100)
        made.append({"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": real})
    return made


def train(folder, batch_size, **parallel):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6)  # as they begin, attention adds next to nothing
    ap.swap_attention(model, RULES)
    arguments = tf.TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **parallel,
    )  # fmt: skip
    if parallel:
        # On a CPU accelerate leaves FSDP out, without which it has no context parallelism.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    trainer = tf.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    log = trainer.state.log_history
    figures = {name: [step[name] for step in log if name in step] for name in ("loss", "grad_norm")}
    return {**figures, "eval_loss": trainer.evaluate()["eval_loss"], "kind": type(trainer.model).__name__}


def process(rank, folder, parts, copies):
    number = parts * copies
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    os.environ.update({name: str(value) for name, value in place.items()}, **SHARDED)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{number}", rank=rank, world_size=number)
    figures = train(folder, 4 // copies, parallelism_config=ParallelismConfig(cp_size=parts, dp_shard_size=copies))
    Path(folder, f"{parts}x{copies}-{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, *asked = sys.argv[1:]
    for one in asked:
        parts, copies = map(int, (*one.split("x"), 1)[:2])
        if parts == copies == 1:
            Path(folder, "1x1-0.json").write_text(json.dumps(train(folder, 4)))
        else:
            start_processes(process, args=(folder, parts, copies), nprocs=parts * copies, start_method="fork")
