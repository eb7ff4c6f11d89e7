"""What is left of a pretrained model under another attention, before any training, and what it costs.

    python examples/untrained.py --decoder MODEL --texts ESSAYS.jsonl
    python examples/untrained.py --sentence-encoder MODEL --texts ESSAYS.jsonl
    python examples/untrained.py --speech MODEL --clips CLIPS.jsonl
    python examples/untrained.py --vision MODEL --pictures PICTURES.jsonl

MODEL is a folder or a name on the hub. The files have one JSON object a line: {"text"}, {"audio", "text"} or {"image"},
paths relative to the file; clips are WAV. Each result goes to untrained.jsonl in the output folder as it comes, so a
run that was stopped goes on where it was; with --rounds 0 and then without, all figures come before the times.
untrained.md is written from all of that file.
"""

import argparse
import copy
import functools
import json
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from attn_plugins import describe_attention, swap_attention
from attn_plugins.benchmark.cost.timing import Workload, compared, interleaved, parts
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.benchmark.results.tables import Table, brief_number
from attn_plugins.config.extras import need
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.core.attention import Attention
from attn_plugins.core.rules import ROLES, parse_rules
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.models import resolve

Inputs = dict[str, Any]

PAIRS = ("dense", "local", "sparse")
"""Families whose cost is the pairs of queries and keys that they score; the others score none, or landmarks."""

WINDOW = "type: local, window_size"
BLOCKS = "type: block_topk, init_blocks: 0"
"""The best blocks alone, as in the paper."""
NEIGHBOURS = "{{type: neighborhood_2d, kernel_size: {0}, num_prefix_tokens: 1}}"


def _windows(sizes: list[int], sinks: int, first: str) -> list[str]:
    rule = "{{type: local, window_size: {0}, num_sink_tokens: {1}}}"
    alone = [f"window {size}={rule.format(size, 0)}" for size in sizes]
    return alone + [f"window {size} + {first}={rule.format(size, sinks)}" for size in sizes]


ATTENTIONS: dict[str, list[str]] = {
    "decoder": [
        "softmax={type: softmax}",
        *_windows([1024, 512, 256, 128], 4, "4 sinks"),
        *(f"best {n} blocks of 64={{{BLOCKS}, block_size: 64, topk: {n}}}" for n in (16, 8, 4)),
        f"best 8 blocks of 64, every 6th layer={{{BLOCKS}, block_size: 64, topk: 8, layers: 'every:6+5'}}",
        "best 32 keys={type: topk, topk: 32}",
        "linear, every 6th layer={type: linear, layers: 'every:6+5'}",
        "linear={type: linear}",
    ],
    "sentence-encoder": [
        "softmax={type: softmax}",
        *_windows([128, 64, 32, 16, 8], 1, "CLS"),
        *(f"blocks of {n}={{type: block_local, block_size: {n}, num_sink_tokens: 0}}" for n in (128, 64, 32)),
        *(f"best {n} keys={{type: topk, topk: {n}}}" for n in (64, 16)),
        f"best 4 blocks of 16={{{BLOCKS}, block_size: 16, topk: 4}}",
        "nystrom, 64 landmarks={type: nystrom, num_landmarks: 64}",
        "linear={type: linear}",
    ],
    "speech": [
        "softmax, all roles={type: softmax, roles: [encoder, decoder, cross]}",
        *(
            f"encoder, window {n}={{{WINDOW}: {n}, num_sink_tokens: 0, roles: [encoder]}}"
            for n in (750, 384, 192, 96, 48, 24)
        ),
        "encoder, window 48 + 4 sinks={type: local, window_size: 48, num_sink_tokens: 4, roles: [encoder]}",
        f"encoder, best 8 blocks of 32={{{BLOCKS}, block_size: 32, topk: 8, roles: [encoder]}}",
        "encoder, nystrom, 64 landmarks={type: nystrom, num_landmarks: 64, roles: [encoder]}",
        "encoder, linear={type: linear, roles: [encoder]}",
        *(f"decoder, window {n}={{{WINDOW}: {n}, num_sink_tokens: 0, roles: [decoder]}}" for n in (16, 8, 4, 2)),
        *(f"decoder, window {n} + 4 sinks={{{WINDOW}: {n}, num_sink_tokens: 4, roles: [decoder]}}" for n in (8, 4, 2)),
        *(f"cross, best {n} keys={{type: topk, topk: {n}, roles: [cross]}}" for n in (256, 64, 16, 4, 1)),
        "cross, linear={type: linear, roles: [cross]}",
    ],
    "vision": [
        "softmax={type: softmax}",
        *(f"neighbourhood {n} x {n}={NEIGHBOURS.format(n)}" for n in (37, 25, 19, 13, 9, 7, 5, 3)),
        "neighbourhood 7 x 7, dilation 3={type: neighborhood_2d, kernel_size: 7, dilation: 3}",
        "neighbourhood 13 x 13, every 2nd layer={type: neighborhood_2d, kernel_size: 13, layers: 'every:2'}",
        "window 128 + CLS, in reading order={type: local, window_size: 128, num_sink_tokens: 1}",
        "best 64 keys={type: topk, topk: 64}",
        f"best 4 blocks of 64={{{BLOCKS}, block_size: 64, topk: 4}}",
        "nystrom, 64 landmarks={type: nystrom, num_landmarks: 64}",
        "linear={type: linear}",
    ],
}
"""What is measured by default, LABEL=RULE, by kind of model."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pretrained model, and how to tell what another attention leaves of it."""

    model: nn.Module
    what: str
    """What is measured on what, in a line for the report."""
    sample: Inputs
    """Inputs of a forward pass, for time and for counting pairs."""
    measure: Callable[[nn.Module], dict[str, float]]
    """Figures of a model that shares these weights; their names are the table's columns."""


def decoder(source: str, args: argparse.Namespace) -> Subject:
    """Perplexity at the beginnings of long texts."""
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    model = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows = []
    for row in _rows(args.texts):
        ids = tokenizer(row["text"], truncation=True, max_length=args.length)["input_ids"]  # with <bos>, if it has one
        if len(ids) == args.length and len(rows) < args.documents:
            rows.append(ids)
    if not rows:
        raise ValueError(f"no text of {args.texts} has {args.length} tokens")
    batches = [{"input_ids": torch.tensor([ids])} for ids in rows]
    cls = get_task("perplexity")
    task = cls(cls.Config(length=args.length))

    def measure(other: nn.Module) -> dict[str, float]:
        figures = run_task(task, other, batches)
        return {"perplexity": figures["perplexity"], "last quarter": figures["by_position"][-1]["perplexity"]}

    what = (
        f"Perplexity of the first {args.length} tokens of {len(rows)} texts, and of the last quarter of these. Pairs "
        "and time: one of them, read as generate() reads it, with the logits of the last token alone."
    )
    sample = {**batches[0], "use_cache": False, "logits_to_keep": 1}
    return Subject(model=model, what=what, sample=sample, measure=measure)


def sentence_encoder(source: str, args: argparse.Namespace) -> Subject:
    """How far embeddings of paragraphs, means over their tokens, keep their directions and their ranking."""
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    model = tf.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    length, texts = args.sentence_length, []
    for number, row in enumerate(_rows(args.texts)[: args.paragraphs]):
        words = row["text"].split()  # every fourth is cut at the full length, the others at parts of it
        texts.append(" ".join(words[: max(1, length * (number % 4 + 1) // 4)]))
    batches = [
        tokenizer(texts[i : i + 8], padding=True, truncation=True, max_length=length, return_tensors="pt")
        for i in range(0, len(texts), 8)
    ]
    full = tokenizer(" ".join(texts), truncation=True, max_length=length, return_tensors="pt")

    @torch.no_grad()
    def embed(other: Any) -> torch.Tensor:
        means = []
        for batch in batches:
            weight = batch["attention_mask"].unsqueeze(-1).float()
            means.append((other(**batch).last_hidden_state * weight).sum(1) / weight.sum(1))
        return normalize(torch.cat(means), dim=-1)

    own = embed(model)
    pair = torch.triu_indices(len(own), len(own), 1).unbind()

    def measure(other: nn.Module) -> dict[str, float]:
        got = embed(other)
        cosines = cosine_similarity(got, own)
        ranks = rank_correlation(*((x @ x.T)[pair] for x in (got, own)))
        return {"cosine": float(cosines.mean()), "lowest cosine": float(cosines.min()), "rank correlation": ranks}

    what = (
        f"Embeddings of {len(texts)} paragraphs of {length // 4} words up to {length} tokens: cosine with the model's "
        f"own, and Spearman's correlation of all pairwise similarities. Pairs and time: one text of {length} tokens."
    )
    return Subject(model=model, what=what, sample=dict(full), measure=measure)


def speech(source: str, args: argparse.Namespace) -> Subject:
    """Word errors of transcripts, and the share of next tokens that stay along the model's own."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    jiwer, clean = need("jiwer", "untrained"), EnglishTextNormalizer({})
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    extractor = tf.AutoFeatureExtractor.from_pretrained(source)
    model: Any = tf.AutoModelForSpeechSeq2Seq.from_pretrained(source, dtype=torch.float32).eval()
    rows, rate = _rows(args.clips), extractor.sampling_rate
    clips = [
        extractor(_audio(args.clips.parent / row["audio"], rate), sampling_rate=rate, return_tensors="pt")
        for row in rows
    ]
    said = [clean(row["text"]) for row in rows]

    @torch.no_grad()
    def transcribe(other: Any) -> list[torch.Tensor]:
        return [other.generate(clip["input_features"], max_new_tokens=args.new_tokens) for clip in clips]

    @torch.no_grad()
    def next_tokens(other: Any) -> torch.Tensor:
        found = [
            other(input_features=clip["input_features"], decoder_input_ids=ids).logits[0, :-1].argmax(-1)
            for clip, ids in zip(clips, prompts, strict=True)
        ]
        return torch.cat(found)

    start = torch.tensor([[model.config.decoder_start_token_id]])
    own = transcribe(model)
    prompts = [ids if ids[0, 0] == start else torch.cat([start, ids], dim=1) for ids in own]
    kept = next_tokens(model)

    def measure(other: nn.Module) -> dict[str, float]:
        heard = [clean(tokenizer.decode(ids[0], skip_special_tokens=True)) for ids in transcribe(other)]
        same = (next_tokens(other) == kept).float().mean()
        return {"word error rate": jiwer.wer(said, heard), "next tokens kept": float(same)}

    words = sum(len(text.split()) for text in said)
    what = (
        f"Word error rate on {len(rows)} read clips ({words} words: one word is {1 / words:.3f}; an inserted word "
        "counts, so it may exceed 1), and the share of next tokens that stay along the model's own transcripts. Pairs "
        "and time: one clip, padded to 30 s as the model wants it."
    )
    sample = {"input_features": clips[0]["input_features"], "decoder_input_ids": prompts[0]}
    return Subject(model=model, what=what, sample=sample, measure=measure)


def vision(source: str, args: argparse.Namespace) -> Subject:
    """Cosine of the features of the class token and of patches with the model's own."""
    model: Any = tf.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    side = model.config.image_size
    rows = _rows(args.pictures)[:: args.every][: args.images]
    images = [_picture(args.pictures.parent / row["image"], side) for row in rows]

    @torch.no_grad()
    def features(other: Any) -> torch.Tensor:
        return torch.cat([other(pixel_values=image).last_hidden_state for image in images])

    own = features(model)

    def measure(other: nn.Module) -> dict[str, float]:
        cosines = cosine_similarity(features(other), own, dim=-1)
        return {"cosine of CLS": float(cosines[:, 0].mean()), "cosine of patches": float(cosines[:, 1:].mean())}

    what = (
        f"Last hidden states of {len(rows)} pictures at {side} px, {own.shape[1]} tokens: cosine with the model's own."
    )
    return Subject(model=model, what=what, sample={"pixel_values": images[0]}, measure=measure)


KINDS = {"decoder": decoder, "sentence-encoder": sentence_encoder, "speech": speech, "vision": vision}
SETTINGS = {
    "decoder": ("texts", "length", "documents"),
    "sentence-encoder": ("texts", "sentence_length", "paragraphs"),
    "speech": ("clips", "new_tokens"),
    "vision": ("pictures", "every", "images"),
}
"""What a figure depends on beside model and attention, the data first."""


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: the correlation of ranks, for values without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def with_attention(model: nn.Module, rules: Any) -> nn.Module:
    """A copy of the model that shares its weights and has another attention."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    other = copy.deepcopy(model, shared)
    torch.manual_seed(0)  # for attentions with weights of their own
    return swap_attention(other, rules).eval()


@torch.no_grad()
def pairs(model: nn.Module, sample: Inputs) -> dict[str, int | None]:
    """Path of each attention module with a slot -> pairs of query and key that enter its softmax, over all heads.

    Counted in the weights of the reference form, with scores scaled down so far that none can vanish, in the first of
    all modules that have the same attention and the same mask. None where the attention does not work by pairs.
    """
    found: dict[str, int | None] = {}
    alike: dict[Any, int] = {}

    def count(path: str, slot: Attention, args: tuple, kwargs: dict[str, Any]) -> None:
        if slot.family not in PAIRS:
            found[path] = None
            return
        q, k, v = args
        mask = kwargs["mask"]
        seen = (mask.causal, mask.cross) if mask.plain and not mask.row_starts else mask
        kind = (slot.name, slot.config, q.shape, k.shape, seen)
        if kind in alike:
            found[path] = alike[kind]
            return
        small = q / (q.norm(dim=-1).max() * k.norm(dim=-1).max() * kwargs["scale"]).clamp(min=1e-12)
        options = {"mask": kwargs["mask"], "scale": kwargs["scale"], "dropout": 0.0}
        found[path] = alike[kind] = int(slot.reference(small, k, v[..., :1], **options)[1].count_nonzero())

    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            hook = functools.partial(count, path.rpartition(".")[0])
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(**sample)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def share(model: nn.Module, own: dict[str, Any], sample: Inputs) -> float | None:
    """Pairs scored, of those that the model itself scores, in all attention modules of the roles that were swapped.

    None where no pair is.
    """
    counted = pairs(model, sample)
    rows = describe_attention(model)
    roles = {row.role for row in rows if row.plugin is not None}
    paths = dict.fromkeys(row.path for row in rows if row.role in roles)
    scored = sum(counted.get(path, own[path]) or 0 for path in paths)
    return scored / sum(own[path] for path in paths) if scored else None


def run(args: argparse.Namespace, results: Results) -> None:
    """Measure every attention that is asked for on every model and has no result yet."""
    for kind, sources in ((kind, getattr(args, kind.replace("-", "_")) or []) for kind in KINDS):
        for source in sources:
            needed = next(iter(SETTINGS[kind]))
            if getattr(args, needed) is None:
                raise ValueError(f"--{kind} needs --{needed}")
            if args.scope == "attention" and needed != "texts":
                raise ValueError(f"--scope attention is for models of text, not for --{kind}")
            todo = []
            for label, _, rule in (given.partition("=") for given in args.attention or ATTENTIONS[kind]):
                rules = [rule.to_dict() for rule in parse_rules(parse_yaml(rule))]
                settings = {"kind": kind, "model": Path(source).name, "rules": rules, **_settings(kind, args)}
                todo.append((label, settings, hash_of(settings)))
            todo = [cell for cell in todo if not _finished(results.current(cell[2]), args.rounds)]
            if todo:
                _run(KINDS[kind](resolve(source), args), Path(source).name, todo, args, results)


def _finished(record: dict[str, Any] | None, rounds: int) -> bool:
    return record is not None and (rounds == 0 or record["speed"] is not None)


def _run(subject: Subject, name: str, todo: list, args: argparse.Namespace, results: Results) -> None:
    roles = sorted({row.role for row in describe_attention(subject.model)}, key=ROLES.index)
    own = functools.cache(lambda: subject.measure(subject.model))
    every = functools.cache(
        lambda: pairs(with_attention(subject.model, {"type": "softmax", "roles": roles}), subject.sample)
    )
    for label, settings, key in todo:
        started = time.perf_counter()
        record = {"key": key, "model": name, "what": subject.what, "attention": label}
        held = results.current(key)
        try:
            other = with_attention(subject.model, settings["rules"])
            if held is not None:
                found = {what: held[what] for what in ("own", "figures", "pairs")}
            else:
                found = {
                    "own": own(),
                    "figures": subject.measure(other),
                    "pairs": share(other, every(), subject.sample),
                }
            record |= {"status": "ok", **found, "speed": _speed(subject, other, args)}
        except ValueError as error:  # an attention that does not serve this model: that is the result
            record |= {"status": "refused", "error": " ".join(str(error).split())}
        record |= {"seconds": round(time.perf_counter() - started, 1), "settings": settings, "versions": versions()}
        results.add(record)
        print(f"{name}: {label}: {record.get('figures') or record['error']} ({record['seconds']} s)", flush=True)


def _speed(subject: Subject, other: nn.Module, args: argparse.Namespace) -> dict[str, Any] | None:
    if args.rounds == 0:
        return None
    models = {"own": subject.model, "other": other}
    contenders = {which: _work(model, subject.sample, args.scope) for which, model in models.items()}
    seconds = interleaved(contenders, args.rounds, next(other.parameters()).device)
    return {"scope": args.scope, "rounds": args.rounds, **compared(seconds["other"], seconds["own"])}


def _work(model: nn.Module, sample: Inputs, scope: str) -> list[Workload]:
    if scope == "attention":
        return parts(model, sample["input_ids"], "attention", "forward")

    @torch.no_grad()
    def forward() -> None:
        model(**sample)

    return [Workload(run=forward, count=1)]


def report(records: list[dict[str, Any]]) -> str:
    """Markdown: a table for each model and what was measured on it."""
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for record in records:
        groups.setdefault((record["model"], record["what"]), {})[record["attention"]] = record
    tables = []
    for (name, what), rows in groups.items():
        done = [record for record in rows.values() if record["status"] == "ok"]
        if not done:
            continue
        columns = list(done[0]["own"])
        scopes = {record["speed"]["scope"] for record in done if record["speed"] is not None}
        time_of = f"times as fast: {' or '.join(sorted(scopes)) or 'not measured'}"
        table = Table(name, what, ["attention", "pairs scored", *columns, time_of])
        own = done[0]["own"]
        table.rows.append(["**the model's own**", "1", *(brief_number(own[column]) for column in columns), "1"])
        for label, record in rows.items():
            if record["status"] != "ok":
                table.rows.append([label, f"refused: {record['error'].split(';')[0]}", *[""] * (len(columns) + 1)])
                continue
            speed, part = record["speed"], record["pairs"]
            figures = [brief_number(record["figures"][column]) for column in columns]
            ratio = "" if speed is None else "{times_as_fast:.2f} ({lowest:.2f} to {highest:.2f})".format(**speed)
            table.rows.append([label, "none" if part is None else f"{part:.3f}", *figures, ratio])
        tables.append(table.markdown())
    return "\n\n".join(tables) + "\n"


def _settings(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in SETTINGS[kind]}
    # Data by content, so that a moved file is the same one.
    return {name: hash_of({"": v.read_text("utf-8")}) if isinstance(v, Path) else v for name, v in values.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _audio(path: Path, rate: int) -> Any:
    with wave.open(str(path)) as file:
        got = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if got != (rate, 1, 2):
            raise ValueError(f"{path} has (rate, channels, bytes) = {got}; allowed: {(rate, 1, 2)}")
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
    return (samples.float() / 2**15).numpy()


def _picture(path: Path, side: int) -> torch.Tensor:
    """(1, 3, side, side): on white, the shorter side resized, the middle cut out, normalised as ImageNet is."""
    image_of = need("PIL.Image", "compare")
    image = image_of.open(path).convert("RGBA")
    image = image_of.alpha_composite(image_of.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(size * scale)) for size in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), image_of.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return ((pixels / 255 - mean) / deviation).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", action="append", metavar="MODEL", help=KINDS[kind].__doc__)
    parser.add_argument("--texts", type=Path, help="JSONL of long texts")
    parser.add_argument("--clips", type=Path, help="JSONL of clips and what is said in them")
    parser.add_argument("--pictures", type=Path, help="JSONL of pictures")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text (default %(default)s)")
    parser.add_argument("--documents", type=int, default=4, help="texts of that length (default %(default)s)")
    parser.add_argument("--sentence-length", type=int, default=256, help="tokens of a paragraph (default %(default)s)")
    parser.add_argument("--paragraphs", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of a transcript (default %(default)s)")
    parser.add_argument("--images", type=int, default=12, help="pictures used (default %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th picture (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of timing; 0 leaves it to a later run (default 5)"
    )
    parser.add_argument("--scope", choices=("model", "attention"), default="model", help="what is timed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    parser.add_argument("--attention", action="append", metavar="LABEL=RULE", help="instead of the default ones")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/untrained"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.output_dir / "untrained.jsonl")
    try:
        with results.lock():
            run(args, results)
    except ValueError as error:
        parser.error(str(error))
    written = report(list(results.records.values()))
    (args.output_dir / "untrained.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
