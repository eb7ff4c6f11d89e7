"""Where each attention starts: what is left of a pretrained decoder when it is swapped, before any training.

    python examples/transfer/starts.py                              every causal attention at its default options
    python examples/transfer/starts.py "sinks={type: local, num_sink_tokens: 4}" ...        LABEL=RULES, or rules alone

Perplexity of Python's documentation (held-out topics, the first blocks), what it recalls of the beginning of a row, and
how far outputs of its layers are from the model's own: the squared error relative to squares of the model's own, so
that 1 is as bad as zeros, each layer given what the unswapped model gives it. The body computes in bfloat16, attentions
in float32. A line of JSON for each goes to --out as it is measured; a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn.functional import cross_entropy

import attn_plugins as ap
from attn_plugins.benchmark.pages.starts_table import at_start
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.core.attention import Attention
from attn_plugins.data.recall import RecallRow, recall_rows
from attn_plugins.data.text import python_docs, token_blocks
from attn_plugins.hf.observe import Observed, own_attention
from attn_plugins.training.models import resolve

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "starts.jsonl"


def causal_attentions() -> dict[str, Any]:
    """Label -> rules: the model's own attention, and each one that serves a decoder, also without first tokens."""
    return {"dense": None, **at_start("causal")}


class Subject:
    """A pretrained decoder with a bfloat16 body, and rows of tokens to measure it on.

    Args:
        model: a folder, a name on the hub, or "smollm2-135m-demo".
        length: tokens of a row.
        blocks: rows of text for perplexity; outputs of layers are compared on two of them.
        rows: of recall.
    """

    def __init__(self, model: str = "smollm2-135m-demo", *, length: int = 512, blocks: int = 12, rows: int = 4):
        self.settings = {"model": model, "length": length, "blocks": blocks, "rows": rows}
        folder = resolve(model)
        self.tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        self.model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        data = python_docs()["validation"]
        self.blocks_BN = torch.tensor(token_blocks(data, self.tokenizer, length)["input_ids"][:blocks])
        texts = self.tokenizer(list(data["text"]), add_special_tokens=False, verbose=False)["input_ids"]
        self.recall: list[RecallRow] = recall_rows(texts, self.tokenizer, length=length, count=rows) if rows else []

    @contextlib.contextmanager
    def swapped(self, rules: Any, seed: int) -> Iterator[Any]:
        """The model under these rules, its own again afterwards."""
        torch.manual_seed(seed)
        if rules is not None:
            ap.swap_attention(self.model, rules)
            in_float32(self.model)
        try:
            yield self.model
        finally:
            if rules is not None:
                ap.restore_attention(self.model)


def in_float32(model: nn.Module) -> None:
    """Have attentions in slots compute in float32, whatever the model does."""

    def cast(slot, given, options):
        hidden = options.get("hidden")
        return tuple(x.float() for x in given), {**options, "hidden": None if hidden is None else hidden.float()}

    for slot in model.modules():
        if isinstance(slot, Attention):
            slot.float()
            slot.register_forward_pre_hook(cast, with_kwargs=True)
            slot.register_forward_hook(lambda slot, given, attended: (attended[0].to(model.dtype), *attended[1:]))


@torch.no_grad()
def perplexity(model: Any, blocks_BN: torch.Tensor) -> float:
    losses = []
    for ids in blocks_BN:
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        losses.append(cross_entropy(logits[:-1], ids[1:]))
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def recalled(model: Any, rows: list[RecallRow]) -> dict[str, float]:
    """Part -> share of its tokens that are the likeliest in their places."""
    found: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        ids = row.input_ids_N
        right = model(input_ids=ids[None], use_cache=False).logits[0, :-1].argmax(-1) == ids[1:]
        for name, (start, stop) in row.answers.items():
            found.setdefault(name.split(" ")[0], []).append(right[start - 1 : stop - 1])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in found.items() if name != "text"}


@torch.no_grad()
def output_errors(model: Any, blocks_BN: torch.Tensor) -> dict[str, Any]:
    """Relative squared error of outputs: mean over layers, the worst layer, and the mean over all heads."""
    wrong: dict[nn.Module, torch.Tensor] = {}
    whole: dict[nn.Module, torch.Tensor] = {}

    def see(call: Observed) -> None:
        own, got = call.own_BQHV.float(), call.attend()[0].float()
        for sums, x in ((wrong, got - own), (whole, own)):
            sums[call.module] = sums.get(call.module, 0) + x.square().sum((0, 1, 3))

    with own_attention(model, see):
        for ids in blocks_BN:
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    layers = [float(wrong[module].sum() / whole[module].sum()) for module in wrong]
    heads = [float((wrong[module] / whole[module]).mean()) for module in wrong]
    return {"error": sum(layers) / len(layers), "worst layer": max(layers), "error of heads": sum(heads) / len(heads)}


def measure(seed: int = 0, rules: Any = "linear_window", subject: Subject | None = None) -> dict[str, Any]:
    """Figures of the model under these rules, untrained; a ValueError where they do not serve it."""
    subject = subject or Subject()
    with subject.swapped(rules, seed) as model:
        figures: dict[str, Any] = {"perplexity": perplexity(model, subject.blocks_BN)}
        if subject.recall:
            figures["recall"] = recalled(model, subject.recall)
        if rules is not None:
            figures |= output_errors(model, subject.blocks_BN[:: max(1, len(subject.blocks_BN) // 2)][:2])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", help="LABEL=RULES, or rules alone; default: every causal attention")
    parser.add_argument("--model", default="smollm2-135m-demo")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="rows of text (default %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows of recall, 0 for none (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights that are drawn")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    wanted = causal_attentions()
    if args.rules:
        split = [rules.rpartition("=")[::2] for rules in args.rules]
        wanted = {label or rules: parse_yaml(rules) for label, rules in split}
    tf.utils.logging.disable_progress_bar()
    subject, results = Subject(args.model, length=args.length, blocks=args.blocks, rows=args.rows), Results(args.out)
    for label, rules in wanted.items():
        settings = {"attention": label, "rules": rules, **spelled_out(rules), **subject.settings, "seed": args.seed}
        record = {"key": hash_of(settings), "status": "ok", "settings": settings, "versions": versions()}
        if results.done(record["key"]):
            continue
        try:
            record["result"] = measure(args.seed, rules, subject)
        except ValueError as error:
            record |= {"status": "refused", "error": str(error)}
        results.add(record)
        print(label, json.dumps(record.get("result", record.get("error"))), flush=True)


def spelled_out(rules: Any) -> dict[str, Any]:
    """The options of an attention that is named alone, so that another default is another result."""
    name = rules.get("type") if isinstance(rules, dict) and set(rules) == {"type"} else rules
    return {"options": vars(ap.get_attention(name).Config())} if isinstance(name, str) else {}


if __name__ == "__main__":
    main()
