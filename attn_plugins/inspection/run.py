"""``attn-plugins inspect``: from a model on disk and a text to files that show what its heads look at."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.core.options import require, shown
from attn_plugins.hf.swap import describe_attention, unwrap
from attn_plugins.inspection import media, overview, page
from attn_plugins.inspection.attributions import attention_rollout, gradient_times_weights
from attn_plugins.inspection.inspect import LayerWeights, Through, chosen_modules, inspect_attention
from attn_plugins.inspection.subject import Subject, of_text, positions_of, with_own_attention_in_slots
from attn_plugins.training.models import ANY, AS_SAVED, load, skeleton

MANY = 256
"""Tokens up to which each is a query where none is named."""

SPREAD = 64
"""Queries of longer texts where none is named."""

OVERLAYS = 4
"""Queries of an image that get a picture; the first token, [CLS] mostly, where none is named."""

INPUTS = {"text": None, "text_file": None, "image": "image-to-text", "audio": "speech-to-text"}
"""Settings that say what is read, with the kind of models whose processor reads it, None for a tokenizer."""

Role = Literal["encoder", "decoder", "cross"]


READERS = {"image": media.of_image, "audio": media.of_audio}
"""What makes inputs of files other than texts."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Settings of ``attn-plugins inspect``."""

    model: str
    """A folder, a name on the hub, or smollm2-135m-demo."""
    output_dir: str
    """Where everything is written."""
    attention: Any = AS_SAVED
    """Rules of the flag, null, or as-saved. Modules that it leaves out show the model's own attention."""
    text: str | None = None
    text_file: str | None = None
    """A file of one text, in UTF-8."""
    image: str | None = None
    """A file of a picture."""
    audio: str | None = None
    """A file of sound."""
    length: int = 512
    """Tokens that a text is cut to."""
    generate: int | None = None
    """Tokens that the model writes first, greedily, or up to its end; None is 64 in encoder-decoders, else none."""
    layers: Any = "all"
    """Numbers of layers, as in a rule."""
    heads: Any = "all"
    """Numbers of query heads."""
    queries: tuple[str, ...] = ()
    """Tokens whose weights are looked at: last, a position, or a word. None are all of a text of up to 256 tokens, else
    64 spread over it."""
    roles: tuple[Role, ...] = ("encoder", "decoder", "cross")
    """Of the modules."""
    through: Through = "swapped"
    """Which attention the model goes on with from layer to layer: that in its slots, or its own."""
    window: int = 64
    """Keys outside of which the share of weights is told."""
    topk: int = 16
    """Keys with the most weight whose overlap with the model's own is told."""
    attributions: tuple[Literal["rollout", "gradient"], ...] = ()
    """Beside weights: attention rollout; gradient times weights for the largest logit (at the last token)."""

    def __post_init__(self) -> None:
        given = [name for name in INPUTS if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise ValueError(f"got {got} to inspect the model on; allowed: one of {', '.join(INPUTS)}")
        for name in ("length", "window", "topk"):
            require(self, getattr(self, name) >= 1, name, "an integer from 1 on")
        require(self, (self.generate or 0) >= 0, "generate", "None or an integer from 0 on")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was found, and where it was written."""

    layers: list[LayerWeights]
    files: list[Path] = field(default_factory=list)


def run_inspect(config: InspectConfig) -> Inspected:
    """Load a model, inspect it, and write inspect.json, weights.safetensors, pictures and a page.

    Raises:
        ValueError: a setting does not fit the model or the input; nothing is written then.
    """
    need("matplotlib", "compare")
    folder = check_folder(config.output_dir)
    kind, read = _read(config)
    chosen_modules(unwrap(skeleton(config.model, config.attention)), config.layers, config.roles, swapped=False)
    loaded = load(config.model, attention=config.attention, kind=ANY, processing=INPUTS[kind])
    model = loaded.model.eval()
    own = with_own_attention_in_slots(model)
    writes = getattr(model.config, "is_encoder_decoder", False)
    generate = (64 if writes else 0) if config.generate is None else config.generate
    medium: Any = None
    if kind in READERS:
        subject, medium = READERS[kind](model, loaded.processing, read, generate=generate)
    else:
        subject = of_text(model, loaded.tokenizer, read, length=config.length, generate=generate)
    layers = _layers(config, model, subject)
    entries = [page.entry_of(one, *_texts(one, subject)) for one in layers]
    beside = _attributions(config, model, subject)
    entries = page.fitting(entries)
    title = f"{Path(config.model).name}: {_named(config)}"
    head = {
        "model": config.model,
        "attention": config.attention,
        "modules with the model's own attention": own,
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "text"},
        "tokens": subject.tokens,
        "written": subject.written,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "inspect.json", folder / "weights.safetensors", folder / "page.html"]
    told = {**head, "layers": [_told(one, rows=bool(config.queries)) for one in layers]}
    files[0].write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    need("safetensors.torch", "train").save_file(tensors_of(layers), files[1])
    shown_of = f"{len(entries)} of {len(layers)} modules" if len(entries) < len(layers) else f"{len(layers)} modules"
    about = f"{sum(map(len, subject.tokens.values()))} tokens, {shown_of}. Exact weights: weights.safetensors."
    files[2].write_text(page.page([*entries, *beside], title=title, told=about), encoding="utf8")
    for role in dict.fromkeys(one.role for one in layers):
        some = [one for one in layers if one.role == role]
        files.append(_saved(overview.overview(some, f"{title}, {role}"), folder / f"overview_{role}.png"))
    drawn = media.pictures(layers, subject, medium, title, most=OVERLAYS if config.queries else 1)
    files += [_saved(made, folder / name) for name, made in drawn.items()]
    return Inspected(layers=layers, files=files)


def _read(config: InspectConfig) -> tuple[str, str]:
    """(Which input is given, the text, or the path of a picture or sound)."""
    kind = next(name for name in INPUTS if getattr(config, name) is not None)
    given = getattr(config, kind)
    if kind == "text":
        return kind, given
    path = Path(given).expanduser()
    if kind in READERS:
        if not path.is_file():
            raise ValueError(f"{kind}={given!r} is no file")
        return kind, str(path)
    try:
        return kind, path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_file={given!r} cannot be read as a text in UTF-8: {error}") from None


def tensors_of(layers: Sequence[LayerWeights]) -> dict[str, torch.Tensor]:
    """Weights by path and side, (B, h, q, K), with the numbers of queries and heads.

    Of a module that is called several times, as where layers share their weights, further calls are PATH.1, PATH.2.
    """
    found: dict[str, torch.Tensor] = {}
    calls: Counter[str] = Counter()
    for one in layers:
        path = f"{one.path}.{calls[one.path]}" if calls[one.path] else one.path
        calls[one.path] += 1
        found[f"{path}.weights"] = one.weights_BhqK.contiguous()
        found[f"{path}.own"] = one.own_BhqK.contiguous()
        found[f"{path}.queries"], found[f"{path}.heads"] = torch.tensor(one.queries), torch.tensor(one.heads)
    return found


def _layers(config: InspectConfig, model: nn.Module, subject: Subject) -> list[LayerWeights]:
    """Of each role, whose queries are tokens of their own: those that are read, in cross-attention those written."""
    present = {row.role for row in describe_attention(model)} & set(config.roles)
    options: dict[str, Any] = {"layers": config.layers, "heads": config.heads, "through": config.through}
    options |= {"window": config.window, "topk": config.topk}
    wanted = {role: _queries(config, subject.queries_of(role)) for role in get_args(Role) if role in present}
    if config.queries and not any(wanted.values()):
        tokens = [token for role in wanted for token in subject.queries_of(role)]
        raise ValueError(f"queries={list(config.queries)!r}, none of which is among the tokens {shown(tokens)}")
    found: list[LayerWeights] = []
    for role, queries in wanted.items():
        if queries or not config.queries:
            found += inspect_attention(model, subject.inputs, queries=queries or None, roles=[role], **options).layers
    for one in found:
        parts = len(one.weights_BhqK)
        if parts > 1:
            raise ValueError(
                f"{one.path} attends within {parts} parts of the input, whose tokens have no names here; allowed: "
                "models whose modules see all of it"
            )
    return found


def _texts(one: LayerWeights, subject: Subject) -> tuple[list[str], list[str]]:
    """What queries and keys are called, by numbers where there are other keys than tokens, as of pooled ones."""
    named = one.weights_BhqK.shape[-1] == len(subject.keys_of(one.role))
    return (subject.queries_of(one.role), subject.keys_of(one.role)) if named else ([], [])


def _queries(config: InspectConfig, tokens: Sequence[str]) -> list[int]:
    """Positions that are asked for; empty where none is, or where nothing is known of tokens."""
    if config.queries:
        return sorted({place for query in config.queries for place in positions_of(query, tokens)}) if tokens else []
    if len(tokens) <= MANY:
        return list(range(len(tokens)))
    return sorted({round(x) for x in torch.linspace(0, len(tokens) - 1, SPREAD, dtype=torch.float64).tolist()})


def _attributions(config: InspectConfig, model: nn.Module, subject: Subject) -> list[page.Entry]:
    """What stands in the page beside weights."""
    found = []
    for role in (role for role in ("encoder", "decoder") if role in config.roles and subject.tokens.get(role)):
        texts, queries = subject.tokens[role], _queries(config, subject.tokens[role])
        present = any(row.role == role for row in describe_attention(model))
        if "rollout" in config.attributions and present and queries:
            rolled = attention_rollout(model, subject.inputs, queries=queries, role=role, through=config.through)
            found.append(
                page.Entry(
                    title=f"attention rollout of the {role}",
                    told="products of the layers' weights, mean over heads, and half of each the token itself (Abnar "
                    "and Zuidema 2020): what arrives were all values alike",
                    heads=["all layers"],
                    captions=[""],
                    mean=False,
                    queries=rolled.queries,
                    query_texts=texts,
                    key_texts=texts,
                    weights_hqK=rolled.weights_BqK[:1],
                    own_hqK=rolled.own_BqK[:1],
                )
            )
    if "gradient" in config.attributions:
        options: dict[str, Any] = {"layers": config.layers, "heads": config.heads, "roles": config.roles}
        for one in gradient_times_weights(model, subject.inputs, **options):
            found.append(
                page.Entry(
                    title=f"gradient x weights, {one.role} layer {one.layer}  ({one.path})",
                    told="weights times the gradient of the largest logit (at the last token) with respect to them, "
                    "summed over all queries",
                    heads=["sum of all", *map(str, one.heads)],
                    captions=["", *("" for _ in one.heads)],
                    mean=False,
                    queries=[0],
                    query_texts=["all queries"],
                    key_texts=subject.keys_of(one.role),
                    weights_hqK=torch.cat([one.of_keys_BhK[0].sum(0, keepdim=True), one.of_keys_BhK[0]]).unsqueeze(1),
                    own_hqK=None,
                )
            )
    return found


def _named(config: InspectConfig) -> str:
    attention = config.attention
    if attention == AS_SAVED or attention is None:
        return "as saved" if attention else "its own attention"
    return attention["type"] if isinstance(attention, dict) else shown(attention)


def _told(one: LayerWeights, *, rows: bool) -> dict[str, Any]:
    names = ("path", "layer", "role", "attention", "heads", "queries", "exact")
    told = {name: getattr(one, name) for name in names} | {"figures": [dataclasses.asdict(x) for x in one.figures]}
    if rows:  # of the one text, by head, query and key
        told |= {"weights": one.weights_BhqK[0].tolist(), "own": one.own_BhqK[0].tolist()}
    return told


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
