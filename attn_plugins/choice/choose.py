"""From a model, a rule and a budget to rules that keep the heads or layers which matter most."""

import functools
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attn_plugins.choice.contribution import contribution
from attn_plugins.choice.gates import gates
from attn_plugins.choice.one_at_a_time import divergence, measured, recall
from attn_plugins.choice.places import Level, Places
from attn_plugins.choice.report import Choice, Scored
from attn_plugins.choice.samples import samples_of
from attn_plugins.choice.scene import Scene, Table
from attn_plugins.choice.shared_copy import shared_copy
from attn_plugins.core.options import did_you_mean
from attn_plugins.core.rules import Flag, parse_rules
from attn_plugins.hf.plan import make_plan
from attn_plugins.hf.swap import swap_attention, unwrap


@dataclass(frozen=True, kw_only=True)
class Score:
    """One way to score heads and layers."""

    table: Callable[[Scene], Table]
    length: int = 768
    """Tokens of a row, unless another number is asked for."""
    rows: int = 2
    """Rows, or batches of texts, unless another number is asked for."""
    cost: str
    """What it takes, for --help."""


_RUNS = "a forward pass, from its block on, for each head group or layer"
SCORES = {
    "contribution": Score(table=contribution, cost="one forward pass a row: seconds"),
    "kl": Score(table=functools.partial(divergence, alone="kept"), cost=f"{_RUNS}: minutes"),
    "kl_swapped": Score(table=functools.partial(divergence, alone="swapped"), cost=f"{_RUNS}: minutes"),
    "recall": Score(table=functools.partial(recall, alone="swapped"), cost=f"{_RUNS}: minutes"),
    "recall_kept": Score(table=functools.partial(recall, alone="kept"), cost=f"{_RUNS}: minutes"),
    "gates": Score(table=gates, length=512, rows=6, cost="24 forward and backward passes: minutes"),
}
"""By the name of the option."""


def choose_attention(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Any],
    rule: "Flag | None" = None,
    budget: float = 0.25,
    level: Level = "heads",
    score: str | Callable[[nn.Module], float] = "contribution",
    *,
    length: int | None = None,
    rows: int | None = None,
    seed: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Choose the heads or layers that keep full attention, where all others get another one.

    The model stays exactly as it is; ``swap_attention(model, rules)`` with what is returned swaps it.

    Chosen among are the modules that ``rule`` would serve. Where it names no ``roles``, encoder and cross-attention of
    a model with a decoder are left out; so are a model's own sliding layers, unless it has no others.

    Args:
        model: a transformers model, also under PEFT or quantised, and one that has this attention already, with trained
            weights: it is then scored with these.
        tokenizer: of the model; None for models that take other things than one text.
        texts: strings, of a few thousand tokens in all; what is recalled is made of them. Without a tokenizer, inputs
            of the model, as mappings, of which all real tokens count, or rows of ``attn_plugins.data.recall``.
        rule: a name or a rule, for what is not chosen; None is the one rule that the model has been swapped by.
        budget: share of the key/value heads, or of the layers, that are kept; rounded down.
        level: "heads" or "layers".
        score: what decides, each with its cost in the docstring of its function:

            - contribution: change of the residual stream at recalled tokens; one forward pass a row
            - kl: divergence of the outputs that is saved where only this one is kept, kl_swapped: that comes where only
              this one is swapped; a forward pass each, resumed from its block
            - recall: likelihood of recalled tokens that is lost where only this one is swapped, recall_kept: that is
              saved where only this one is kept; as kl
            - gates: gates between the two attentions, learned (DuoAttention); 24 steps
            - a function of a model, of which more is better: what it loses where only this one is swapped

        length: tokens of a row, or at most of a text; None for 768 (512 for gates). Has to reach far beyond a window.
        rows: rows, or batches of 8 texts for an encoder; None for 2 (6 for gates).
        seed: of the rows.
        told: gets a line of text now and then, on how far it is.

    Returns:
        the rules: a list, with the scores; printing it gives a table. See :class:`~attn_plugins.choice.report.Choice`.

    Raises:
        ValueError: the budget, level, score, rule or texts do not fit, or no choice can be made by the score.
    """
    check_choice(budget, level, score if isinstance(score, str) else None, length, rows)
    inner = unwrap(model)
    flag = inner.config.attn_plugin if rule is None else rule
    if flag is None:
        raise ValueError("rule=None, and the model is not swapped; allowed then: a name or a rule")
    places = Places(inner, flag)
    how = Score(table=functools.partial(measured, metric=score), cost="") if callable(score) else SCORES[score]
    units = sum(place.groups if level == "heads" else 1 for place in places)
    number = math.floor(budget * units + 1e-9)
    if number < 1:
        raise ValueError(f"budget={budget} of {units} {level} is none; allowed: at least {1 / units:.3g}")
    sizes = {"length": length or how.length, "rows": rows or how.rows, "seed": seed}
    samples = [] if callable(score) else samples_of(inner, tokenizer, texts, places, **sizes)
    scene_model = shared_copy(inner)
    swap_attention(scene_model, places.rules)
    scene = Scene(model=scene_model, places=places, samples=samples, level=level, told=told)
    table = how.table(scene)
    _check(table)
    ranked = sorted(
        (
            (score_of, place, unit)
            for place, row in zip(places, table, strict=True)
            for unit, score_of in enumerate(row)
        ),
        key=lambda one: -one[0],  # of equals the first in the model's order
    )
    kept: dict[str, list[int]] = {}
    for _, place, unit in ranked[:number]:
        kept.setdefault(place.path, []).append(unit)
    rules = places.keeping(kept, level=level)
    make_plan(inner, parse_rules(rules))  # an attention may refuse to have some of the heads
    return Choice(
        rules,
        [
            Scored(
                path=place.path,
                stack=place.target.stack,
                role=place.target.role,
                layer=place.layer,
                kv_head=unit if level == "heads" else None,
                score=score_of,
                kept=unit in kept.get(place.path, ()),
            )
            for place, row in zip(places, table, strict=True)
            for unit, score_of in enumerate(row)
        ],
        level=level,
        score=score if isinstance(score, str) else "metric",
        budget=budget,
    )


def check_choice(budget: float, level: str, score: str | None, length: int | None, rows: int | None) -> None:
    """Raise a ValueError for what no model could be chosen from by."""
    if level not in typing.get_args(Level):
        raise ValueError(f"level={level!r}; allowed: {', '.join(typing.get_args(Level))}")
    if score is not None and score not in SCORES:
        raise ValueError(f"score={score!r}{did_you_mean(score, list(SCORES))}; allowed: {', '.join(SCORES)}")
    if not 0 < budget < 1:
        raise ValueError(f"budget={budget}; allowed: between 0 and 1, a share of the {level} that may be served")
    for name, number in (("length", length), ("rows", rows)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}; allowed: at least 1, or None")


def _check(table: Table) -> None:
    values = [value for row in table for value in row]
    if not all(map(math.isfinite, values)):
        raise ValueError("scores are not finite numbers; the model gives NaN or infinities with this attention")
    if len(set(values)) == 1:
        raise ValueError(
            f"all scores are {values[0]:.3g}, so that there is nothing to choose by; choose by another one"
        )
