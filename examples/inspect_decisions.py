"""What an attention keeps or loses of a model's decision: weights and figures of several attentions on one input.

    python examples/inspect_decisions.py review --text TEXT "dense=FOLDER" "window of 7=FOLDER"
    python examples/inspect_decisions.py translation --model FOLDER --text TEXT --keep 6 "window=RULE"
    python examples/inspect_decisions.py caption --model FOLDER --image FILE "best 8 patches=RULE"
    python examples/inspect_decisions.py document --model MODEL --texts TEXTS.jsonl "window 256 + 4 sinks=RULE"
    python examples/inspect_decisions.py speech --model MODEL --audio FILE "window 96 in the encoder=RULE"

A review is classified by models that were fine-tuned each with its own attention; elsewhere one model is given others,
each LABEL=RULE as --attn of `attn-plugins inspect` takes it, beside its own ("dense"). What is looked at is how it
writes what the dense model writes. Each writes a picture and prints figures as Markdown; docs/inspect_examples.md shows
them. VERB --help tells of --output, --name, --tokens, --length, --window, --layers, --heads, --keep, --seed, --prompt.
"""

import argparse
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from attn_plugins import inspect_attention, restore_attention, swap_attention
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.data.recall import recall_rows
from attn_plugins.hf.swap import unwrap
from attn_plugins.inspection.alignment import alignment_of, shown
from attn_plugins.inspection.attributions import attention_rollout
from attn_plugins.inspection.inspect import Inspection, LayerWeights
from attn_plugins.inspection.media import of_audio, of_image
from attn_plugins.inspection.overlays import caption
from attn_plugins.inspection.sounds import over_time
from attn_plugins.inspection.subject import labels, with_own_attention_in_slots
from attn_plugins.training.models import Loaded, load, read_attention

DENSE = "dense"


def under(made: Loaded, rule: Any) -> Any:
    """The model of an input, with other attentions in it instead of those that were; null for its own everywhere."""
    model = restore_attention(unwrap(made.model))
    if rule is not None:
        swap_attention(model, rule)
    with_own_attention_in_slots(model)
    return made.model.eval()


def review(args: argparse.Namespace) -> None:
    """What [CLS], from which the class is read, looks at in each layer, and what of the text reaches it."""
    found, texts = {}, []
    for label, source in args.attentions.items():
        made = load(source, kind="classification", dtype="float32")
        with_own_attention_in_slots(made.model.eval())
        inputs = dict(made.tokenizer(args.text, return_tensors="pt", truncation=True, max_length=args.length))
        texts = labels(made.tokenizer, inputs["input_ids"][0])
        with torch.no_grad():
            shares = made.model(**inputs).logits[0].softmax(-1)
        best = int(shares.argmax())
        told = f"class {made.model.config.id2label[best]} at {float(shares[best]):.2f}"
        seen = inspect_attention(made.model, inputs, queries=0, window=4, num_sink_tokens=1)
        rolled = attention_rollout(made.model, inputs, queries=0, role="encoder").weights_BqK[0, 0]
        found[label] = (told, seen, rolled)
    rows = {
        label: (told, *_means(seen), _error(seen), f"{float(rolled[1:-1].sum()):.2f}", f"{_last(rolled):.2f}")
        for label, (told, seen, rolled) in found.items()
    }
    columns = ("it says", *MEANS, "error", "rollout on the text", "of that on its last third")
    _print(columns, rows)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 0.27 * len(texts), 1.2 + 1.75 * len(found)), layout="constrained")
    axes = figure.subplots(2 * len(found), 1, height_ratios=[6, 1] * len(found), sharex=True)
    maps = {label: torch.cat([alignment_of([one]) for one in seen.layers]) for label, (_, seen, _) in found.items()}
    for number, (label, (told, seen, rolled)) in enumerate(found.items()):
        heat, arrives = axes[2 * number : 2 * number + 2]
        most = max(float(one[:, 1:-1].max()) for one in maps.values())
        how = {"aspect": "auto", "interpolation": "nearest"}
        image = heat.imshow(maps[label].numpy(), cmap="viridis", vmin=0, vmax=most, **how)
        heat.set_yticks(range(len(seen.layers)), [f"layer {one.layer}" for one in seen.layers], fontsize=7)
        arrives.imshow(rolled[None].numpy(), cmap="magma", vmin=0, vmax=float(rolled[1:-1].max()), **how)
        arrives.set_yticks([0], ["rollout"], fontsize=7)
        heat.set_title(f"{label}: {told}", fontsize=9)
        heat.tick_params(axis="x", bottom=False)
    axes[-1].set_xticks(range(len(texts)), [shown(text) for text in texts], rotation=90, fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, shrink=0.6, extend="max")
    bar.set_label("share of [CLS]'s attention, mean over heads", fontsize=8)
    _save(figure, args, f"{args.name}: what [CLS] looks at, layer by layer, and what of the text reaches it")


def translation(args: argparse.Namespace) -> None:
    """Where a decoder looks in the source as it writes its translation: the heads that align the two."""
    made = load(args.model, dtype="float32")
    under(made, None)
    tokenizer: Any = made.tokenizer
    before, _, after = args.prompt.partition("{source}")
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, args.text, after)]
    prompt, first = torch.tensor([list(itertools.chain(*parts))]), len(parts[0])
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    ids = _generated(made.model, prompt, args.tokens, **end)
    source, queries = slice(first, first + len(parts[1])), list(range(prompt.shape[1] - 1, ids.shape[1] - 1))
    inputs = {"input_ids": ids}
    dense = inspect_attention(made.model, inputs, queries=queries, window=args.window)
    chosen = aligning(dense.layers, source, args.heads)
    rules: dict[str, Any] = {DENSE: None, **args.attentions}
    if args.keep:
        label, rule = next(iter(args.attentions.items()))
        heads = aligning(dense.layers, source, args.keep)
        rules[f"{label}, {args.keep} heads kept"] = [kept(made.model, heads), rule]
    sides, rows = {}, {}
    for label, rule in rules.items():
        model = under(made, rule)
        seen = inspect_attention(model, inputs, queries=queries, window=args.window)
        shares = torch.stack([layer.weights_BhqK[0, head].abs() for layer, head in at(seen.layers, chosen)])
        sides[label] = shares.mean(0)[:, source]
        written = tokenizer.decode(_generated(model, prompt, args.tokens, **end)[0, prompt.shape[1] :], True)
        rows[label] = (
            written.strip(),
            _loss(model, ids, prompt.shape[1]),
            *_means(seen),
            _error(seen),
            _share(sides[label]),
        )
    named = ", ".join(f"{layer}.{head}" for layer, head in chosen)
    _print(("it writes", "loss of the dense one's", *MEANS, "error", "of these heads, on the source"), rows)
    print(f"\nThe heads that align (layer.head): {named}")
    texts = labels(tokenizer, ids[0])
    title = f"{args.name}: heads {named}"
    _save(aligned(sides, [texts[q + 1] for q in queries], texts[source]), args, title)


def aligning(layers: Sequence[LayerWeights], source: slice, number: int) -> list[tuple[int, int]]:
    """The (layer, head) that look at other tokens of the source from one written token to the next.

    What a head has on a token whatever is written, as on a sink, is taken off before the largest share counts.
    """
    found = []
    for one in layers:
        for place, head in enumerate(one.heads):
            side_qK = one.weights_BhqK[0, place, :, source]
            found.append((float((side_qK - side_qK.mean(0)).amax(-1).mean()), one.layer, head))
    return sorted((layer, head) for _, layer, head in sorted(found, reverse=True)[:number])


def kept(model: Any, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The rule that leaves full attention to the key/value heads of these (layer, head); says which."""
    config = model.config.get_text_config()
    shared = config.num_attention_heads // config.num_key_value_heads
    groups: dict[int, set[int]] = {}
    for layer, head in sorted(heads):
        groups.setdefault(layer, set()).add(head // shared)
    rule = {"type": "softmax", "kv_heads": {layer: sorted(some) for layer, some in groups.items()}}
    every = config.num_key_value_heads * config.num_hidden_layers
    print(f"Kept: {sum(map(len, groups.values()))} of {every} key/value heads, {rule['kv_heads']}\n")
    return rule


def at(layers: Sequence[LayerWeights], heads: Sequence[tuple[int, int]]) -> list[tuple[LayerWeights, int]]:
    by_number = {one.layer: one for one in layers}
    return [(by_number[layer], by_number[layer].heads.index(head)) for layer, head in heads]


def aligned(sides: Mapping[str, torch.Tensor], written: Sequence[str], read: Sequence[str]) -> Any:
    """Attentions side by side: what is written down, what is read across."""
    from matplotlib.figure import Figure

    size = 1.6 + len(sides) * (0.3 + 0.19 * len(read)), 1.9 + 0.18 * len(written)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    most = max(float(side.quantile(0.99)) for side in sides.values())
    for axis, (label, side) in zip(axes, sides.items(), strict=True):
        image = axis.imshow(side.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axis.set_title(label, fontsize=9)
        axis.set_xticks(range(len(read)), [shown(text) for text in read], rotation=90, fontsize=8)
    axes[0].set_yticks(range(len(written)), [shown(text) for text in written], fontsize=8)
    figure.colorbar(image, ax=list(axes), pad=0.01, extend="max").set_label("share, mean over these heads", fontsize=8)
    return figure


def captioned(args: argparse.Namespace) -> None:
    """Where a captioner looks in the picture as it writes each token."""
    _written(args, "image", of_image, caption)


def heard(args: argparse.Namespace) -> None:
    """When in a recording a model listens as it writes each token."""
    _written(args, "audio", of_audio, over_time)


def _written(args: argparse.Namespace, kind: str, read: Any, draw: Any) -> None:
    """What an encoder-decoder writes of a file, and its cross-attention as it writes what the dense one does."""
    given, sides, rows, medium, texts = {}, {}, {}, None, []
    made = load(args.model, kind="any", dtype="float32", processing="speech-to-text")
    for label, rule in {DENSE: None, **args.attentions}.items():
        model = under(made, rule)
        subject, medium = read(model, made.processing, getattr(args, kind), generate=args.tokens)
        words = [token for token in subject.written if token not in made.tokenizer.get_added_vocab()]
        written = ("" if any(token.startswith(" ") for token in words) else " ").join(words)
        given, texts = given or subject.inputs, texts or subject.written
        layers = "all" if args.layers is None else args.layers
        seen = inspect_attention(
            model, given, queries=list(range(len(texts))), roles=["cross"], layers=layers, through="swapped"
        )
        sides[label] = alignment_of(seen.layers)
        with torch.no_grad():
            logits = model(**given).logits[0, -len(texts) :]
        wanted = made.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([one[0] if len(one) == 1 else -100 for one in wanted])
        own = f"{float(cross_entropy(logits, ids)):.2f}"
        even = torch.tensor(float(sides[label].shape[1])).log()
        rows[label] = (written.strip(), own, *_means(seen, ("entropy", "density")), f"{float(even):.2f}", _error(seen))
    columns = ("it writes", "loss of the dense one's", "entropy", "density", "entropy of an even one", "error")
    _print(columns, rows)
    _save(
        draw(sides, medium, texts, ""),
        args,
        f"{args.name}: where it looks as it writes, mean over heads, layers {layers}",
    )


def document(args: argparse.Namespace) -> None:
    """Where a long document's answer comes from: what the heads of its first token have on the place of the answer."""
    made = load(args.model, dtype="float32")
    tokenizer: Any = made.tokenizer
    texts = [json.loads(line)["text"] for line in Path(args.texts).read_text(encoding="utf8").splitlines()]
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    (row,) = recall_rows(documents, tokenizer, length=args.length, count=1, seed=args.seed, parts=["passkey"])
    ids, ((start, stop),) = row.input_ids_N, row.spans("passkey")
    answer = ids[start:stop]
    told = next(n for n in range(len(ids)) if torch.equal(ids[n : n + len(answer)], answer))
    place = slice(told, told + len(answer))
    inputs = {"input_ids": ids[None]}
    maps, curves, rows = {}, {}, {}
    rules: dict[str, Any] = {DENSE: None, **args.attentions}
    if args.keep:
        rules[f"{args.keep} heads that look there"] = None  # once the dense model has shown which
    for label, rule in rules.items():
        if rule is None and label != DENSE:
            found = [divmod(n, maps[DENSE].shape[1]) for n in maps[DENSE].flatten().argsort(descending=True).tolist()]
            rule = [kept(made.model, found[: args.keep]), next(iter(args.attentions.values()))]
        model = under(made, rule)
        seen = inspect_attention(model, inputs, queries=start - 1, window=args.window)
        shares = torch.stack([one.weights_BhqK[0, :, 0].abs() for one in seen.layers])
        maps[label], curves[label] = shares[:, :, place].sum(-1), shares
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, start - 1 : stop - 1]
        right = logits.argmax(-1) == answer
        likely = float(logits[0].softmax(-1)[answer[0]])
        looking = int((maps[label] > 0.1).sum())
        of = f"{int(right.sum())} of {len(answer)}"
        rows[label] = (of, f"{likely:.2g}", *_means(seen), _error(seen), f"{float(maps[label].max()):.2f}", looking)
    of = ("digits right", "its first digit's share", *MEANS, "error", "most of a head on the key", "heads above 0.1")
    _print(of, rows)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 + 2.2 * len(maps), 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(maps), height_ratios=[3, 1.4])
    most = max(float(one.max()) for one in maps.values())
    axes = [figure.add_subplot(grid[0, column]) for column in range(len(maps))]
    for axis, (label, one) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(one.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axis.set_title(f"{label}\n{rows[label][0]} digits right", fontsize=9)
        axis.set_xlabel("head", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, pad=0.01).set_label("share on the pass key", fontsize=8)
    below = figure.add_subplot(grid[1, :])
    bins = torch.linspace(0, start, 65).long()
    for label, shares in curves.items():
        sums = [float(shares[..., a:b].sum(-1).mean()) for a, b in itertools.pairwise(bins.tolist())]
        below.stairs(sums, bins.tolist(), label=label, linewidth=1.4)
    below.axvspan(told, told + len(answer), color="black", alpha=0.25, label="the pass key")
    below.set_yscale("log")
    below.set_ylim(1e-4, 1)
    below.set_xlabel("token of the document", fontsize=8)
    below.set_ylabel("share, mean\nover all heads", fontsize=8)
    below.tick_params(labelsize=8)
    below.legend(fontsize=7, ncols=2)
    _save(figure, args, f"{args.name}, {args.length} tokens: what the answer's first token looks at")


MEANS = ("entropy", "outside", "sinks")
"""Figures of weights, means over all heads."""


def _means(seen: Inspection, names: Sequence[str] = MEANS) -> list[str]:
    found = []
    for name in names:
        values = [getattr(one.weights, name) for layer in seen.layers for one in layer.figures]
        some = [value for value in values if value is not None]
        found.append(f"{sum(some) / len(some):.2f}" if some else "")
    return found


def _error(seen: Inspection) -> str:
    some = [one.error for layer in seen.layers for one in layer.figures if one.error is not None]
    return f"{sum(some) / len(some):.2f}"


def _last(rolled_K: torch.Tensor) -> float:
    text = rolled_K[1:-1]
    return float(text[-(len(text) // 3) :].sum() / text.sum())


def _share(side: torch.Tensor) -> str:
    return f"{float(side.sum(-1).mean()):.2f}"


def _generated(model: Any, prompt: torch.Tensor, tokens: int, **end: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        return model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **end)


def _loss(model: Any, ids: torch.Tensor, start: int) -> str:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
    return f"{float(cross_entropy(logits, ids[0, start:])):.2f}"


def _print(columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    print("| attention |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for label, cells in rows.items():
        print(f"| {label} |", " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells), "|")


def _save(figure: Any, args: argparse.Namespace, title: str) -> None:
    """A PNG of 256 colours, which is small enough for a page."""
    from PIL import Image

    figure.suptitle(title, fontsize=10)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.open(held).convert("RGB").quantize(256).save(args.output, optimize=True)
    print(f"\n{args.output}: {args.output.stat().st_size // 1000} kB")


def labelled(told: str) -> tuple[str, str]:
    label, equals, value = told.partition("=")
    if not equals or not value:
        raise ValueError(f"{told!r}; allowed: LABEL=FOLDER, LABEL=RULE")
    return label, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for run, name, needs in (
        (review, "review", ("text",)),
        (translation, "translation", ("model", "text")),
        (captioned, "caption", ("model", "image")),
        (document, "document", ("model", "texts")),
        (heard, "speech", ("model", "audio")),
    ):
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.add_argument("attentions", nargs="+", metavar="LABEL=...", type=labelled)
        for one in needs:
            verb.add_argument(f"--{one}", required=True)
        verb.add_argument("--output", type=Path, default=Path(f"{name}.png"))
        verb.add_argument("--name", default="", help="of the model, for the title")
        verb.add_argument("--tokens", type=int, default=48, help="that are written at most")
        verb.add_argument("--length", type=int, default=64 if name == "review" else 1024, help="tokens that are read")
        verb.add_argument("--window", type=int, default=64, help="outside of which shares are told")
        verb.add_argument("--seed", type=int, default=0, help="of the document")
        verb.add_argument("--layers", type=parse_yaml, help="whose cross-attention is shown, such as [2, 3]; all")
        verb.add_argument("--heads", type=int, default=4, help="that are shown: those that align best")
        verb.add_argument("--keep", type=int, default=0, help="heads that keep full attention, in one more row")
        verb.add_argument("--prompt", default="English:\n{source}\n\nFrench:\n")
        verb.set_defaults(run=run)
    args = parser.parse_args()
    args.attentions = dict(args.attentions)
    if args.run is not review:
        args.attentions = {label: rule_of(value) for label, value in args.attentions.items()}
        args.name = args.name or Path(args.model).name
    args.name = args.name or ", ".join(args.attentions)
    args.run(args)


def rule_of(told: str) -> Any:
    return read_attention(told if told.endswith((".yaml", ".yml")) else parse_yaml(told))


if __name__ == "__main__":
    main()
