"""Attentions on rows of which processes have a part each, beside one process: a program that forks them.

``python parts_program.py FOLDER 4 auto 2 batched`` runs the cases on 4 processes with one backend, on 2 with another.
Each process writes a line of JSON for each case: the largest difference of outputs and gradients in float64, and the
bytes that it sent forward.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from attn_plugins.core.attention import Attention
from attn_plugins.core.heads import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Exchange, Part
from attn_plugins.core.registry import get_attention, register_attention
from attn_plugins.ops.reference import expand_heads

LIMIT = datetime.timedelta(seconds=60)
LENGTH, HEADS, GROUPS, SIZE, HIDDEN = 48, 4, 2, 6, 10
ROWS = {
    "whole": {},
    "right padded": {"padding": [[0, 48], [0, 29]]},
    "left padded": {"padding": [[0, 48], [19, 48]]},
    "far left padded": {"padding": [[5, 48], [38, 48]]},
    "packed": {"texts": [[11, 2, 24], [13, 12, 12, 11]]},
    "packed and padded": {"texts": [[40, 8], [12, 15, 10]], "padding": [[0, 48], [0, 37]]},
}
CAUSAL = {
    "local": [
        {"window_size": 5, "num_sink_tokens": 0},
        {"window_size": 7, "num_sink_tokens": 4},
        {"window_size": 30, "num_sink_tokens": 2},
        {"window_size": 60, "num_sink_tokens": 4},
        {"window_size": 3, "num_sink_tokens": 14, "dilation": 3},
        {"window_size": 1, "num_sink_tokens": 1},
    ],
    "block_local": [
        {"block_size": 5, "num_sink_tokens": 0},
        {"block_size": 4, "look_backward": 4, "num_sink_tokens": 3},
    ],
    "longformer": [{"window_size": 6, "num_global_tokens": 2}],
    "softmax": [{}],
    "linear": [
        {"feature_map": "elu", "chunk_size": 8},
        {"feature_map": "hedgehog", "chunk_size": 64},
        {"feature_map": "taylor", "feature_dim": 3, "chunk_size": 5},
    ],
    "linear_window": [
        {"window_size": 5, "num_sink_tokens": 4, "chunk_size": 8},
        {"window_size": 20, "num_sink_tokens": 0, "chunk_size": 4, "feature_map": "elu"},
        {"window_size": 40, "num_sink_tokens": 2, "chunk_size": 8},
        {"window_size": 7, "num_sink_tokens": 3, "branch": "linear"},
        {"window_size": 7, "num_sink_tokens": 3, "branch": "window"},
    ],
    "retention": [{"chunk_size": 4}],
    "gated_linear": [{"chunk_size": 4}],
    "delta": [{"chunk_size": 4, "initial_beta": 0.6}, {"chunk_size": 8, "gate_input": "hidden"}],
    "gated_delta": [{"chunk_size": 4, "initial_beta": 0.6, "initial_memory": 9.0}],
    "kimi_delta": [{"chunk_size": 4, "initial_beta": 0.6, "initial_memory": 9.0, "gate_low_rank_dim": 2}],
    "with_the_one_before": [{}],
}
BIDIRECTIONAL = {
    "local": [{"window_size": 5, "look_forward": 9, "num_sink_tokens": 2}, {"window_size": 20, "num_sink_tokens": 0}],
    "block_local": [{"block_size": 5, "num_sink_tokens": 1}],
    "longformer": [{"window_size": 4, "num_global_tokens": 3}],
    "softmax": [{}],
    "linear": [{"feature_map": "hedgehog"}],
}


class WithTheOneBefore(Attention):
    """A third party's: each value and the one before it in the row."""

    cost, paper = "O(N D)", "none"
    causal = segments = in_parts = True

    def reference(self, *tokens, **options):
        return self.attend(*tokens, **options), None

    def attend(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return self._joined(q_BHQD, v_BGKV, torch.zeros_like(v_BGKV[:, :, :1]))

    attend_batched = attend

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, **options):
        return self._joined(q_BHTD, v_BGTV, part.exchange.shifted(v_BGTV[:, :, -1:], 1))

    def _joined(self, q, v, before):
        v = expand_heads(v + torch.cat([before, v[:, :, :-1]], dim=2), q.shape[1])
        return v * q


def cases():
    for causal, attentions in ((True, CAUSAL), (False, BIDIRECTIONAL)):
        for name, many in attentions.items():
            for options in many:
                for rows in ROWS:
                    yield name, options, rows, causal


def title(name, options, rows, causal):
    direction = "causal" if causal else "bidirectional"
    return f"{name} {direction} {rows} " + " ".join(f"{key}={value}" for key, value in options.items())


def mask_of(rows, causal):
    told, tables = ROWS[rows], {}
    index = torch.arange(LENGTH)
    if "padding" in told:
        tables["padding_BK"] = torch.stack([(index >= first) & (index < last) for first, last in told["padding"]])
    if "texts" in told:
        numbers = [[n for n, length in enumerate(texts) for _ in range(length)] for texts in told["texts"]]
        tables["segments_BK"] = torch.tensor([row + row[-1:] * (LENGTH - len(row)) for row in numbers])
    return AttentionMask(2, LENGTH, LENGTH, causal=causal, **tables)


def compare(exchange, name, options, rows, causal, backend="auto"):
    """(Largest difference of outputs and gradients between this part and the same part of one process, bytes sent)."""
    torch.manual_seed(0)
    cls = get_attention(name)
    heads = HeadShape(num_heads=HEADS, num_key_value_heads=GROUPS, head_dim=SIZE, value_dim=SIZE, hidden_size=HIDDEN)
    attention = cls(cls.Config(**options), heads, backend=backend).double()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    tokens = [torch.randn(2, n, LENGTH, SIZE, dtype=torch.float64) for n in (HEADS, GROUPS, GROUPS)]
    hidden = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    part = Part(mask_of(rows, causal), exchange)
    given = {"hidden": hidden} if attention.wants_hidden else {}
    direction = torch.randn(2, LENGTH, HEADS, SIZE, dtype=torch.float64)
    if (padding := part.mask.padding_BK) is not None:
        direction = direction * padding[:, :, None, None]  # what padding attends to is nobody's business

    whole = [x.clone().requires_grad_() for x in (*tokens, *given.values())]
    of_given = {"hidden": whole[3]} if given else {}
    out = attention(*whole[:3], mask=mask_of(rows, causal), scale=0.4, **of_given)[0] * (direction != 0)
    weights = list(attention.parameters())
    expected = torch.autograd.grad((out * direction).sum(), [*whole, *weights], materialize_grads=True)

    own = slice(part.start, part.stop)
    parts = [x[:, :, own].clone().requires_grad_() for x in tokens]
    of_given = {"hidden": hidden[:, own].clone().requires_grad_()} if given else {}
    before = exchange.bytes_sent
    out_part = attention(*parts, mask=part.mask, part=part, scale=0.4, **of_given)[0] * (direction[:, own] != 0)
    sent = exchange.bytes_sent - before
    wanted = [*parts, *of_given.values(), *weights]
    found = torch.autograd.grad((out_part * direction[:, own]).sum(), wanted, materialize_grads=True)
    errors = [(out_part - out[:, own]).detach().abs().max()]
    for n, (got, want) in enumerate(zip(found, expected, strict=True)):
        if n < len(whole):
            want = want[:, own] if want.ndim == 3 else want[:, :, own]
        else:
            got = exchange.add_up(got)
        errors.append((got - want).abs().max())
    return float(torch.stack(errors).max()), sent


def process(rank, number, backend, folder):
    torch.set_num_threads(1)
    register_attention("with_the_one_before")(WithTheOneBefore)
    store = f"file://{folder}/store-{number}-{backend}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number, timeout=LIMIT)
    exchange = Exchange(dist.group.WORLD)
    with open(Path(folder, f"{rank}-{number}-{backend}.jsonl"), "w") as out:
        for case in cases():
            try:
                error, sent = compare(exchange, *case, backend=backend)
                line = {"error": error, "sent": sent}
            except ValueError as refused:
                line = {"refused": str(refused)}
            print(json.dumps({"case": title(*case), **line}), file=out, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    for number, backend in zip(map(int, given[::2]), given[1::2], strict=True):
        start_processes(process, args=(number, backend, folder), nprocs=number, start_method="fork")
