"""Presets: attentions whose options are computed from a budget and the sizes of a model."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attn_plugins.benchmark.compare.models import spelled_out
from attn_plugins.benchmark.suites.kinds import config_of
from attn_plugins.config.shipped import named
from attn_plugins.config.yaml import read_yaml
from attn_plugins.core.assignment import assign
from attn_plugins.core.options import build
from attn_plugins.core.rules import parse_rules
from attn_plugins.data.sources import DataConfig
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.training.models import skeleton

Numbers = dict[str, float]

TEMPLATE = re.compile(r"\{([^{}]*)\}")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Attentions at several budgets, as a YAML file gives them: text in braces is an expression."""

    budgets: list[float]
    """Shares of the bytes of keys and values that the model's own attention keeps."""
    length: int
    """Tokens after which they hold."""
    once: dict[str, Any]
    """Label -> rules that no budget changes."""
    each: dict[str, Any]
    """Label -> rules for every budget."""
    baseline: str
    """Label of the attention that the others are compared with."""
    bar: str | None = None
    """Label of the attention that every other has to beat, where there is one budget."""
    names: dict[str, str] = field(default_factory=dict)
    """Name -> expression, of the names before it and of share, length, kept, layers, heads, head_dim and itemsize."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < share < 1 for share in self.budgets):
            raise ValueError(f"budgets={self.budgets}; allowed: at least one, each between 0 and 1")
        if self.length < 1:
            raise ValueError(f"length={self.length}; allowed: at least 1")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The attentions of a preset for one model."""

    attentions: dict[str, Any]
    baseline: str
    bar: str | None
    left_out: dict[str, str]
    """Label -> why a budget leaves no such row."""

    @property
    def settings(self) -> dict[str, Any]:
        """As settings of a comparison."""
        return {"attentions": self.attentions, "baseline": self.baseline, "bar": self.bar}


def read_preset(asked: Any) -> Preset:
    """A preset by its name or file, or ``{name: one, budgets: [0.25], ...}`` with some of it said otherwise.

    Raises:
        ValueError: there is none of that name, or it is wrong.
    """
    own = {"name": asked} if isinstance(asked, str) else asked
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
        raise ValueError(f"preset={asked!r}; allowed: a name, a YAML file, or a mapping with name, budgets, length")
    path = named("presets", own["name"], "preset")
    return build(Preset, {**read_yaml(path), **{key: own[key] for key in own if key != "name"}}, f"preset {path.stem}")


def rows_for(preset: Preset, source: Any, dtype: str, data: DataConfig | None) -> Rows:
    """What a preset is for a model.

    Args:
        source: a folder or a name, of which the config is read.
        dtype: of the weights, and so of the cache.
        data: what heads and layers are chosen on.

    Raises:
        ValueError: there is no such model, its sizes cannot be told, or an expression is wrong.
    """
    sizes, targets = sizes_of(source, dtype, preset.length), discovery.targets(skeleton(source))  # type: ignore[arg-type]
    attentions: dict[str, Any] = {}
    left_out: dict[str, str] = {}

    def add(label: str, rules: Any) -> None:
        try:
            spelled = spelled_out(rules, data)
            if isinstance(spelled, list):
                assign(parse_rules(spelled), targets)
        except ValueError as error:
            left_out[label] = str(error)
        else:
            attentions[label] = rules

    once = {label: _filled(rules, sizes) for label, rules in preset.once.items()}
    if preset.baseline in once:
        add(preset.baseline, once[preset.baseline])
    bars = []
    for share in preset.budgets:
        known = {**sizes, "share": share}
        for name, expression in preset.names.items():
            known[name] = evaluated(str(expression), known)
        bars.append(None if preset.bar is None else _filled(preset.bar, known))
        for label, rules in preset.each.items():
            add(str(_filled(label, known)), _filled(rules, known))
    for label, rules in once.items():
        if label != preset.baseline:
            add(label, rules)
    bar = bars[0] if len(bars) == 1 and bars[0] in attentions else None
    return Rows(attentions=attentions, baseline=preset.baseline, bar=bar, left_out=left_out)


def sizes_of(source: Any, dtype: str, length: int) -> Numbers:
    """What expressions know of a model: of its layers those that keep keys and values.

    Raises:
        ValueError: there is no such model, its config does not tell its heads, or no layer keeps keys and values.
    """
    config = config_of(source).get_text_config()
    own = [layer for layer in DynamicCache(config=config).layers if isinstance(layer, DynamicLayer)]
    if not own:
        raise ValueError(f"model {source!r} has no layer that keeps keys and values; allowed: models with attention")
    kept = sum(min(length, getattr(layer, "sliding_window", length + 1) - 1) for layer in own) / len(own)
    try:
        queries, layers = config.num_attention_heads, len(own)
        shared = getattr(config, "num_key_value_heads", None) or queries
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    except AttributeError as error:
        raise ValueError(f"model {source!r}: its config does not tell its heads: {error}") from None
    saved = str(getattr(config, "dtype", None) or "float32").rpartition(".")[2]
    itemsize = BYTES.get(saved if dtype == "auto" else dtype, 4)
    sizes = {"layers": layers, "heads": layers * shared, "head_dim": head_dim, "itemsize": itemsize}
    return {**sizes, "length": length, "kept": kept}


def evaluated(expression: str, known: Mapping[str, float]) -> float:
    """The number that an expression of + - * / // and min and max says; a whole one is an int.

    Raises:
        ValueError: it is of another form, or a name is not known.
    """
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, known)
    except (SyntaxError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"expression {expression!r}: {error}") from None
    return int(value) if value == int(value) else value


def _value(node: ast.expr, known: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise ValueError(f"unknown name {node.id!r} in an expression; known: {', '.join(known)}")
        return known[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, known), _value(node.right, known))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand, known))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        return FUNCTIONS[node.func.id](*(_value(one, known) for one in node.args))
    raise ValueError(f"{ast.unparse(node)!r} in an expression; allowed: numbers, names, + - * / //, min and max")


def _filled(tree: Any, known: Mapping[str, float]) -> Any:
    """A tree whose texts have numbers in place of expressions; a text that is one alone becomes the number."""
    if isinstance(tree, Mapping):
        return {key: _filled(value, known) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, known) for value in tree]
    if not isinstance(tree, str):
        return tree
    whole = TEMPLATE.fullmatch(tree)
    if whole:
        return evaluated(whole[1], known)
    return TEMPLATE.sub(lambda found: f"{evaluated(found[1], known):g}", tree)
