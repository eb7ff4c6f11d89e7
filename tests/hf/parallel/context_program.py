"""Models on rows of which processes have a part each, beside one process: a program that forks them.

``python context_program.py FOLDER 2 4`` runs all cases on 2 processes, then on 4. Each process writes a line of JSON
for each case.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel as torchs_own
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.multiprocessing import start_processes

import attn_plugins as ap

LIMIT = datetime.timedelta(seconds=60)
LENGTH, VOCABULARY = 32, 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
LOCAL = {"type": "local", "window_size": 5}
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0},
    ),
    "falcon": (
        tf.FalconForCausalLM,
        tf.FalconConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "longrope": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        {
            **SIZES,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 24},
                **{"short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
            },
        },
    ),
    "dynamic rope": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        {
            **{**SIZES, "max_position_embeddings": 24},
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "esm": (tf.EsmForTokenClassification, tf.EsmConfig, {**SIZES, "mask_token_id": 1, "token_dropout": True}),
    "bert": (tf.BertForTokenClassification, tf.BertConfig, SIZES),
    "pooled bert": (tf.BertForSequenceClassification, tf.BertConfig, SIZES),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, {**SIZES, "num_key_value_heads": 2, "sliding_window": 6}),
    "lfm2": (
        tf.Lfm2ForCausalLM,
        tf.Lfm2Config,
        {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}
EQUAL = {
    "a window with sinks": ("llama", [LOCAL], "whole"),
    "a window without sinks, packed": ("llama", [{**LOCAL, "num_sink_tokens": 0}], "packed"),
    "a window longer than a part, padded": ("llama", [{**LOCAL, "window_size": 20}], "padded"),
    "a window, padded on the left": ("llama", [LOCAL], "left padded"),
    "a window run again in the backward, packed": ("llama", [LOCAL], "packed"),
    "learned positions": ("gpt2", [LOCAL], "padded"),
    "linear attention, packed": ("llama", [{"type": "linear"}], "packed"),
    "a window and sums": ("llama", [{"type": "linear_window", "window_size": 6}], "padded"),
    "gates of hidden states": ("llama", [{"type": "gated_delta", "gate_input": "hidden"}], "packed"),
    "softmax and a window": ("llama", [{**LOCAL, "layers": "0"}, {"type": "softmax", "layers": "1"}], "packed"),
    "a layer of the model's own": ("llama", [{**LOCAL, "layers": "1"}], "left padded"),
    "a layer that computes attention by its own code": ("falcon", [{**LOCAL, "layers": "0"}], "packed"),
    "LongRoPE's short rows": ("longrope", [LOCAL], "packed"),
    "recurrences of two kinds": (
        "llama",
        [{"type": "gated_linear", "layers": "0"}, {"type": "retention", "layers": "1"}],
        "padded",
    ),
    "an encoder with global tokens": ("bert", [{"type": "longformer", "window_size": 4}], "padded"),
}
"""By title: (model, rules, rows)."""


def build(name, rules):
    torch.manual_seed(0)
    cls, config, sizes = MODELS[name]
    model = cls(config(**sizes)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # as they begin, attention adds next to nothing to the residual stream
    return ap.swap_attention(model, rules)


def rows(kind):
    """(input_ids, position_ids, attention_mask or None, labels), 2 rows."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    labels, positions, real = ids.clone(), torch.arange(LENGTH).repeat(2, 1), None
    if kind == "packed":
        texts = [[7, 1, 19, 5], [16, 16]]
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in texts])
        labels[positions == 0] = -100
    elif kind == "padded":
        real = (positions < torch.tensor([[LENGTH], [21]])).long()
    elif kind == "left padded":
        real = (positions >= torch.tensor([[3], [18]])).long()
        positions = (real.cumsum(1) - 1).clamp(min=0)
    if real is not None:
        ids, labels = ids.masked_fill(real == 0, 0), labels.masked_fill(real == 0, -100)
    return ids, positions, real, labels


def equal(mesh, title, name, rules, kind):
    """What differs from one process, what would without an exchange, and what was sent in the forward."""
    ids, positions, real, labels = rows(kind)
    causal = name in ("llama", "gpt2", "falcon", "longrope")
    moved = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    number = (moved if causal else labels).ne(-100).sum()
    model = build(name, rules)
    if "run again" in title:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    told = {} if real is None else {"attention_mask": real}
    batch = {"input_ids": ids, "position_ids": positions, **told}
    whole = model(**batch, labels=labels, num_items_in_batch=number) if causal else model(**batch)
    weights = dict(model.named_parameters())
    direction = torch.randn(whole.logits.shape, dtype=torch.float64)
    direction = direction if real is None else direction * real.unsqueeze(2)
    expected = torch.autograd.grad((whole.logits * direction).sum(), list(weights.values()))

    number_of_parts, index = mesh.size(), mesh.get_local_rank()
    own = slice(index * LENGTH // number_of_parts, (index + 1) * LENGTH // number_of_parts)
    alone = model(**{key: x[:, own] for key, x in batch.items()}).logits
    seen = direction[:, own] != 0
    buffers = [*batch.values(), moved]
    later = set(buffers) if "run again" in title else None  # else tensors that the backward reads are put back

    def gradients_of(part):
        return torch.autograd.grad((part.logits * direction[:, own]).sum(), list(weights.values()))

    with ap.context_parallel(
        mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=later
    ) as exchange:
        given = {"labels": moved, "shift_labels": moved, "num_items_in_batch": number} if causal else {}
        part = model(**batch, **given)
        sent = exchange.bytes_sent
        found = None if later else gradients_of(part)
        if name == "llama":
            (logits,) = context_parallel_unshard(mesh, [part.logits.detach()], [1])
            assert (logits[direction != 0] - whole.logits[direction != 0]).abs().max() < 1e-9
    found = found or gradients_of(part)
    gradients = [(exchange.add_up(got) - want).abs().max() for got, want in zip(found, expected, strict=True)]
    return {
        "logits": float(((part.logits - whole.logits[:, own]) * seen).detach().abs().max()),
        "gradients": float(torch.stack(gradients).max()),
        "loss": float((exchange.add_up(part.loss.detach()) - whole.loss.detach()).abs()) if causal else 0.0,
        "alone": float(((alone - whole.logits[:, own]) * seen).detach().abs().max()),
        "restored": bool(later) or ids.shape[1] == LENGTH,
        "sent": sent,
    }


def refused(mesh, name, rules, change, kind="whole", enter=ap.context_parallel):
    """The message of the error that a model raises, and whether it answers again afterwards."""
    ids, positions, real, labels = rows(kind)
    model = build(name, rules)
    batch = {"input_ids": ids, "position_ids": positions}
    if real is not None:
        batch["attention_mask"] = real
    whole = model(**batch).logits if name == "llama" else None
    try:
        buffers = list(batch.values())
        with enter(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
            model(**change({**batch, "labels": labels}, model))
    except ValueError as error:
        answers = whole is None or torch.equal(model(**batch).logits, whole)
        return {"refused": str(error), "answers": answers}
    return {"refused": None}


def plain(batch, model):
    """Without labels."""
    return {key: x for key, x in batch.items() if key != "labels"}


REFUSED = {
    "another attention": ("llama", [{"type": "topk", "topk": 4}], plain),
    "an option": ("llama", [{**LOCAL, "positions": "cache"}], plain),
    "heads of two kinds": ("llama", [{**LOCAL, "kv_heads": [0]}], plain),
    "a backend": ("llama", [{**LOCAL, "backend": "reference"}], plain),
    "labels that are not moved": ("llama", [LOCAL], lambda batch, model: batch),
    "no positions": ("llama", [LOCAL], lambda batch, model: {"input_ids": batch["input_ids"]}),
    "positions of whole rows": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "position_ids": torch.arange(LENGTH + 1).unsqueeze(0)},
    ),
    "a dense mask": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)},
    ),
    "a cache": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "past_key_values": tf.DynamicCache(config=model.config)},
    ),
    "a head that pools": ("pooled bert", [LOCAL], plain),
    "a window of the model's own": ("mistral", [LOCAL], plain),
    "a convolution beside attention": ("lfm2", [LOCAL], plain),
    "a tuple of a head that pools": (
        "pooled bert",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "return_dict": False},
    ),
    "an encoder and a decoder": ("t5", [{"type": "softmax"}], plain),
    "rotary angles of long rows": ("longrope", [LOCAL], plain),
    "rotary angles of the longest row": ("dynamic rope", [LOCAL], plain),
    "positions that leave some out": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "position_ids": 2 * batch["position_ids"]},
    ),
    "a span in whole rows": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "start_positions": torch.tensor([3, 20])},
    ),
    "a loss of experts": (
        "llama",
        [LOCAL],
        lambda batch, model: {**plain(batch, model), "output_router_logits": True},
    ),
    "masked tokens that are counted": ("esm", [LOCAL], plain),
    "labels of a forward that is called as such": ("llama", [LOCAL], lambda batch, model: model.forward(**batch)),
}
"""By title: (model, rules, what the model is called with)."""


def interrupted(mesh):
    """Whether a model answers as before once it was interrupted in the context, as Ctrl-C in a notebook does."""

    def stop(*given):
        raise KeyboardInterrupt

    ids, positions, _, _ = rows("whole")
    model, buffers = build("llama", [LOCAL]), [ids, positions]
    whole, hook = model(ids, position_ids=positions).logits, model.model.layers[1].register_forward_pre_hook(stop)
    try:
        with ap.context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1]):
            model(ids, position_ids=positions)
    except KeyboardInterrupt:
        hook.remove()
        return {"answers": torch.equal(model(ids, position_ids=positions).logits, whole)}


def without_buffers(mesh):
    """Whether torch's own attention is on where a user has cut the tensors, for models that are not swapped."""
    with ap.context_parallel(mesh):
        return {"served": torch.nn.functional.scaled_dot_product_attention.__module__.startswith("torch.distributed")}


def process(rank, number, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{number}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number, timeout=LIMIT)
    mesh = init_device_mesh("cpu", (number,))
    with open(Path(folder, f"{rank}-{number}.jsonl"), "w") as out:
        for title, case in EQUAL.items():
            print(json.dumps({"title": title, **equal(mesh, title, *case)}), file=out, flush=True)
        for title, case in REFUSED.items():
            print(json.dumps({"title": title, **refused(mesh, *case)}), file=out, flush=True)
        found = refused(mesh, "llama", [LOCAL], plain, enter=torchs_own)
        print(json.dumps({"title": "torch's own", **found}), file=out, flush=True)
        for title, found in (("interrupted", interrupted(mesh)), ("without buffers", without_buffers(mesh))):
            print(json.dumps({"title": title, **found}), file=out, flush=True)
        try:
            with ap.context_parallel(mesh, buffers=[torch.zeros(2, LENGTH + 1)], buffer_seq_dims=[1]):
                pass
        except ValueError as error:
            print(json.dumps({"title": "rows that cannot be cut", "refused": str(error)}), file=out, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    for number in map(int, numbers):
        start_processes(process, args=(number, folder), nprocs=number, start_method="fork")
