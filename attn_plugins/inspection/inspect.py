"""Effective weights of chosen layers, heads and queries of a swapped model, beside those of its own attention."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from attn_plugins.core.assignment import Target
from attn_plugins.core.attention import Attention, sink_tokens
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.number_forms import ALLOWED, check_numbers, numbers_of
from attn_plugins.core.options import shown
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.observe import Observed, own_attention, swapped_attention
from attn_plugins.hf.split import parts_of
from attn_plugins.hf.swap import unwrap
from attn_plugins.inspection.figures import HeadFigures, Places, overlap, unexplained, weight_figures
from attn_plugins.inspection.rows import Weighing
from attn_plugins.ops.reference import expand_heads
from attn_plugins.transfer.body import run_body
from attn_plugins.transfer.errors import output_error, real_queries

QUERIES = 32
"""How many are weighed where none are named."""

Through = Literal["swapped", "own"]
Numbers = int | str | Sequence[int | str]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """Weights of one call of one attention module. Tensors are on the CPU, in float32 at least."""

    path: str
    layer: int
    """Its number in its stack, from 0, as in ``layers`` of a rule."""
    role: str
    """encoder, decoder or cross."""
    attention: str
    """What is in its slot, with its options."""
    heads: list[int]
    """Numbers of the query heads that were chosen."""
    queries: list[int]
    """Positions of the queries that were chosen, from 0, among the module's queries."""
    weights_BhqK: torch.Tensor = dataclasses.field(repr=False)
    """The slot's effective weights: of which its output is the sum of values, where :attr:`exact`."""
    own_BhqK: torch.Tensor = dataclasses.field(repr=False)
    """Those of the model's own attention on the same queries and keys."""
    real_Bq: torch.Tensor = dataclasses.field(repr=False)
    """False for queries that are padding: what these attend to means nothing."""
    exact: bool
    """Whether the output is the sum of values by these weights; else a norm or a product comes after it."""
    figures: list[HeadFigures] = dataclasses.field(repr=False)
    """Of each head in ``heads``."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_attention` finds; printing it gives a table of the figures."""

    layers: list[LayerWeights]
    """One for each call of a chosen module, in the order of the calls."""

    def __str__(self) -> str:
        names = ("entropy", "distance", "density", "sinks", "outside")
        lines = [["path", "role", "head", "attention", *names, *(f"own {name}" for name in names), "overlap", "error"]]
        for layer in self.layers:
            for one in layer.figures:
                sides = [getattr(side, name) for side in (one.weights, one.own) for name in names]
                told = ["-" if x is None else f"{x:.3g}" for x in (*sides, one.overlap, one.error)]
                lines.append([layer.path, layer.role, str(one.head), one.attention, *told])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """All of it for JSON; the rows of weights too, unless ``rows`` is False."""
        told = []
        for layer in self.layers:
            tensors = {f.name for f in dataclasses.fields(layer) if isinstance(getattr(layer, f.name), torch.Tensor)}
            plain = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name not in tensors}
            plain["figures"] = [dataclasses.asdict(one) for one in layer.figures]
            told.append(plain | ({name: getattr(layer, name).tolist() for name in sorted(tensors)} if rows else {}))
        return {"layers": told}


@torch.inference_mode(False)
def inspect_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: Numbers = "all",
    heads: Numbers = "all",
    queries: int | Sequence[int] | None = None,
    roles: Sequence[str] = ("encoder", "decoder", "cross"),
    modules: str = "*",
    through: Through = "swapped",
    num_sink_tokens: int | None = None,
    window: int = 64,
    topk: int = 16,
) -> Inspection:
    """What the heads of a swapped model look at: weights of chosen queries, and figures of each head.

    For every attention of the registry, linear and low-rank ones too, weights are those by which its output is a sum of
    values. They are read off its own form, as derivatives of outputs with respect to values, so that no tensor of
    Q x K is made where the attention makes none: H / G backwards of a layer for as many queries as a value has
    dimensions. Gates that are made of values are held. Where the output is no sum of values (``linear_in_values`` is
    False: Fastformer, the differential paper's norm), weights are those that its dense form reports, O(N^2) for one
    layer at a time, and ``unexplained`` says how far their sums are from the output.

    Beside them is softmax attention on the same queries and keys, with the biases, softcaps and sinks of the call,
    which is what the model's own attention is. Everything is computed in float32 (float64 in a model of float64),
    whatever the model's dtype; a choice of keys by scores may fall differently there where scores are all but equal.

    A model without a slot has nothing to inspect: ``swap_attention(model, "softmax")`` puts its own attention there.

    Args:
        model: swapped, in any mode; it runs as in evaluation, without a cache, and is left as it was.
        inputs: of the model's forward: ``tokenizer(text, return_tensors="pt")``, for example.
        layers: numbers of layers in their stacks: "all", 3, -1, "0-15", "every:4", or a list of these.
        heads: the same of query heads.
        queries: positions of tokens among the queries of each module, the same in every row, -1 for the last; None for
            32 from the first to the last, evenly spaced. Rows take B h q K x 8 bytes a layer.
        roles: of modules: any of encoder, decoder, cross.
        modules: glob on paths of modules.
        through: "swapped" for the swapped model as it runs; "own" to give each slot what reaches its layer in the
            original model.
        num_sink_tokens: first tokens whose share is told; None for 4, in encoders [CLS] and registers.
        window: keys, the query's own included, outside of which shares are told.
        topk: keys with the most weight, of which the overlap is told.

    Raises:
        ValueError: nothing is swapped where it is asked for, a number is out of range, or the model does not run.
    """
    inner, inputs = unwrap(model), ordinary(inputs)
    if through not in ("swapped", "own"):
        raise ValueError(f"through={through!r}; allowed: 'swapped', 'own'")
    for name, number in {"window": window, "topk": topk}.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}; allowed: an integer from 1 on")
    check_numbers(heads, "heads", "head", "inspect_attention")
    chosen = chosen_modules(inner, layers, roles, modules)
    found: list[LayerWeights] = []
    targets = {inner.get_submodule(path): target for path, target in chosen.items()}
    sizes: dict[str, Any] = {"num_sink_tokens": num_sink_tokens, "window": window, "topk": topk}

    def see(one: Observed) -> None:
        target = targets.get(one.module)
        if target is not None:
            with torch.autocast(one.query_BHQD.device.type, enabled=False):
                found.append(_weighed(one, target, inputs, heads, queries, **sizes))

    watch = swapped_attention if through == "swapped" else own_attention
    with evaluating(inner), watch(inner, see):
        run_body(inner, slots_at(inner, chosen), inputs)
    if not found:
        raise ValueError(f"none of the chosen modules was called by these inputs: {', '.join(chosen)}")
    return Inspection(found)


def chosen_modules(
    model: nn.Module, layers: Numbers, roles: Sequence[str], modules: str = "*", *, swapped: bool = True
) -> dict[str, Target]:
    """The modules that are asked for, by path: those with a slot, unless ``swapped`` is False.

    Raises:
        ValueError: none is, or a layer is out of range everywhere.
    """
    check_numbers(layers, "layers", "layer", "inspect_attention")
    inner = unwrap(model)
    targets = discovery.targets(inner)
    counts: dict[tuple[str, str], int] = {}
    for target in targets:
        stack = target.stack, target.role
        counts[stack] = max(counts.get(stack, 0), target.layer + 1)
    items = [layers] if isinstance(layers, (int, str)) else layers
    wanted: dict[tuple[str, str], set[int]] = {stack: set() for stack in counts}
    for item in items:
        numbers = {stack: numbers_of(item, count) for stack, count in counts.items()}
        if all(one is None for one in numbers.values()):
            most = max(counts.values(), default=0)
            raise ValueError(f"layers={layers!r} has {item!r}, and the model has layers 0 to {most - 1}")
        for stack, some in numbers.items():
            wanted[stack] |= set(some or ())
    found = {
        target.path: target
        for target in targets
        if target.layer in wanted[target.stack, target.role]
        and target.role in roles
        and fnmatchcase(target.path, modules)
    }
    if not found:
        has = ", ".join(sorted({target.role for target in targets}))
        raise ValueError(f"no module is in layers={layers!r}, roles={list(roles)!r}, modules={modules!r}; roles: {has}")
    if not swapped:
        return found
    slots = slots_at(inner, found)
    if not slots:
        those = f"layers={layers!r}, roles={list(roles)!r}, modules={modules!r}: {', '.join(found)}"
        raise ValueError(
            f"no module of {type(inner).__name__} has a slot among those asked for ({those}); put an attention there, "
            "'softmax' for the model's own: swap_attention(model, 'softmax')"
        )
    return {path: found[path] for path in slots}


def slots_at(model: nn.Module, paths: Iterable[str]) -> dict[str, Attention]:
    """The attentions in the slots of the modules at these paths, by path; none of a module without one."""
    found = {path: slot_of(model.get_submodule(path)) for path in paths}
    return {path: slot for path, slot in found.items() if slot is not None}


def weighing_of(one: Observed) -> Weighing:
    """The slot's output in an observed call, with the way back to its values."""
    return Weighing.of(one.attend_to, one.value_BGKV)


def own_weighing(one: Observed) -> Weighing:
    """The same of softmax attention, with all that the call adds to scores, which is the model's own."""
    softmax = get_attention("softmax")
    scores = {name: one.options.get(name) for name in ("position_bias", "softcap", "sinks")}
    attend = softmax(softmax.Config())
    given = {"mask": one.mask, "scale": one.scale, **scores}
    return Weighing.of(lambda v: attend(one.query_BHQD, one.key_BGKD, v, **given)[0], one.value_BGKV)


def at_least_float32(one: Observed) -> Observed:
    """The call in float32, of a model of float64 in that."""
    low = one.query_BHQD.dtype != torch.float64
    return one.in_dtype(torch.float32 if low else torch.float64)


def _weighed(
    observed: Observed,
    target: Target,
    inputs: Mapping[str, Any],
    heads: Numbers,
    queries: int | Sequence[int] | None,
    *,
    num_sink_tokens: int | None,
    window: int,
    topk: int,
) -> LayerWeights:
    one, slot = at_least_float32(observed), observed.slot
    num_heads, length = one.query_BHQD.shape[1:3]
    chosen_heads = numbers_in(heads, num_heads, "heads", target.path)
    chosen_queries = positions_in(queries, length, target.path)
    weighing = weighing_of(one)
    out_BQHV = weighing.out_BQHV.detach()
    if slot.linear_in_values:
        weights_BhqK = weighing.rows(chosen_queries, chosen_heads)
    else:
        dense_BHQK = one.attend(need_weights=True)[1]
        assert dense_BHQK is not None
        weights_BhqK = dense_BHQK[:, chosen_heads][:, :, chosen_queries].to(out_BQHV.dtype)
    own_BhqK = own_weighing(one).rows(chosen_queries, chosen_heads)
    real_BQ = real_queries(one, inputs)
    if num_sink_tokens is None:
        num_sink_tokens = sink_tokens(None if slot.heads is None else slot.heads.prefix_tokens)
    places = places_of(one.mask, chosen_queries, real_BQ, batch=len(out_BQHV), num_sink_tokens=num_sink_tokens)
    value_BhKV = expand_heads(one.value_BGKV, num_heads)[:, chosen_heads]
    out_BhqV = out_BQHV[:, chosen_queries][:, :, chosen_heads].transpose(1, 2)
    error = output_error(out_BQHV, one.own_BQHV, real_BQ)
    errors = error.mean_H().where(error.counts_BH.any(0), torch.nan)[chosen_heads].tolist()
    columns = (
        chosen_heads,
        errors,
        overlap(weights_BhqK, own_BhqK, places, topk=topk),
        unexplained(weights_BhqK, value_BhKV, out_BhqV, places.real_Bq),
        weight_figures(weights_BhqK, places, window=window),
        weight_figures(own_BhqK, places, window=window),
    )
    served = _served_by(slot, num_heads)
    figures = [
        HeadFigures(
            head=head,
            attention=served[head],
            error=None if error != error else error,
            overlap=shared,
            unexplained=rest,
            weights=of_slot,
            own=of_own,
        )
        for head, error, shared, rest, of_slot, of_own in zip(*columns, strict=True)
    ]
    return LayerWeights(
        path=target.path,
        layer=target.layer,
        role=target.role,
        attention=f"{slot.name}({slot.extra_repr()})",
        heads=chosen_heads,
        queries=chosen_queries,
        weights_BhqK=weights_BhqK.cpu(),
        own_BhqK=own_BhqK.cpu(),
        real_Bq=places.real_Bq.cpu(),
        exact=bool(slot.linear_in_values),
        figures=figures,
    )


def places_of(
    mask: AttentionMask, queries: Sequence[int], real_BQ: torch.Tensor | None, *, batch: int, num_sink_tokens: int
) -> Places:
    """Which keys these queries may see, and where they are."""
    q_index = torch.tensor(queries, device=mask.device)
    k_index = torch.arange(mask.kv_length, device=mask.device)
    visible_BqK = mask.visible(q_index[None, :, None], k_index[None, None]).expand(batch, -1, -1)
    starts_BK = mask.starts_BK().expand(batch, -1)
    # The text of a query starts where that of its own key does; in cross-attention there is one text.
    start_Bq = starts_BK[:, -1:].expand(-1, len(queries)) if mask.cross else starts_BK[:, q_index + mask.keys_before]
    since_BqK = k_index - start_Bq.unsqueeze(2)
    distance_qK = None if mask.cross else (q_index[:, None] + mask.keys_before - k_index).abs()
    real_Bq = torch.ones(batch, len(queries), dtype=torch.bool, device=mask.device)
    if real_BQ is not None:
        real_Bq = real_Bq & real_BQ[:, q_index]
    return Places(
        visible_BqK=visible_BqK,
        sinks_BqK=(since_BqK >= 0) & (since_BqK < num_sink_tokens),
        distance_qK=distance_qK,
        real_Bq=real_Bq,
    )


def _served_by(slot: Attention, num_heads: int) -> list[str]:
    """The name of what serves each query head."""
    parts = parts_of(slot)
    names = [slot.name] * num_heads
    groups = sum(len(part.kv_heads or ()) for part in parts)
    for part in parts:
        for group in part.kv_heads or ():
            size = num_heads // groups
            name = "own" if part.attention is None else part.attention.name
            names[group * size : (group + 1) * size] = [name] * size
    return names


def numbers_in(value: Numbers, count: int, key: str, path: str) -> list[int]:
    """The heads of a module that are asked for; a ValueError where it has no such ones."""
    found: set[int] = set()
    for item in [value] if isinstance(value, (int, str)) else value:
        numbers = numbers_of(item, count)
        if numbers is None:
            raise ValueError(f"{key}={value!r} has {item!r}, and {path} has {count} {key}; allowed: {ALLOWED}")
        found |= set(numbers)
    return sorted(found)


def positions_in(queries: int | Sequence[int] | None, length: int, path: str) -> list[int]:
    """The queries of a module that are asked for, from 0; a ValueError where it has no such ones."""
    if queries is None:
        return sorted(
            {round(x) for x in torch.linspace(0, length - 1, min(QUERIES, length), dtype=torch.float64).tolist()}
        )
    wanted = [queries] if isinstance(queries, int) else list(queries)
    if not wanted or not all(isinstance(q, int) and -length <= q < length for q in wanted):
        raise ValueError(
            f"queries={shown(queries)}, and {path} has {length} queries; allowed: {-length} to {length - 1}"
        )
    return [q % length for q in wanted]


def ordinary(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that have gradients: copies of those made in inference mode."""
    return {k: x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for k, x in inputs.items()}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and without checkpoints of activations, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
