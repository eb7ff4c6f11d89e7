"""What a group's figures say, in sentences and in a table of the best row within each budget."""

from typing import Any

from attn_plugins.benchmark.compare.report import STAGES
from attn_plugins.benchmark.html.figures import place_words
from attn_plugins.benchmark.html.groups import CACHE, MEMORY, STEP, TIME, TOKEN, Cost, Group, Row
from attn_plugins.benchmark.html.noise import beside, share

SHARES = (0.5, 0.25, 0.1)
"""Budgets of bytes, as shares of the baseline's."""
MOST_NAMED = 8
"""So many attentions are named in a sentence."""
SPEEDS = (1.5, 2.0, 3.0)
"""Budgets of time, as times as fast as the baseline."""


def summary_of(group: Group) -> dict[str, Any]:
    """Sentences, and rows of the table of budgets: (budget, attention and stage, figure, beside the baseline)."""
    return {"label": group.label, "lead": _lead(group), "sentences": _sentences(group), "budgets": _budgets(group)}


def named(row: Row) -> str:
    """An attention and its stage."""
    return f"{row.attention}, {row.stage}"


def _lead(group: Group) -> str:
    """The best row in one sentence."""
    others = [row for row in group.ranked if row.attention != group.baseline]
    if group.ranked:
        best = group.ranked[0]
        told = f"Best {group.metric}: {named(best)}, {best.figure}"
        if not others or others[0] is best:
            return f"{told}."
        gap = beside(others[0], best, group.lower)
        return f"{told}; the best other is {named(others[0])}, {others[0].figure} ({gap})."
    for cost in (TIME, STEP, TOKEN):
        found = {name: its for name in group.attentions if name != group.baseline and (its := group.at(name, cost))}
        place = group.place(cost)
        if found and place is not None:
            fast = max(found, key=lambda name: found[name]["times_as_fast"])
            times = f"{found[fast]['times_as_fast']:.2f} times as fast as {group.baseline}"
            return f"Fastest: {fast}, {times} ({place_words(place)})."
    return "Nothing has been measured yet."


def _sentences(group: Group) -> list[str]:
    told = [*_bar(group), *_noise(group)]
    for status, words in (("failed", "Failed"), ("left out", "Left out"), ("not run", "Not run yet")):
        rows = [row for row in group.rows if row.status == status]
        told += [f"{words}: {_list(rows)}."] if rows else []
    return told


def _bar(group: Group) -> list[str]:
    """What is better than the bar, which costs no training, and what is not."""
    bar = next((row for row in group.measured if (row.attention, row.stage) == (group.bar, STAGES["evaluate"])), None)
    if bar is None:
        return []
    found: dict[str, list[Row]] = {"better": [], "noise": [], "worse": []}
    for row in group.measured:
        its = beside(row, bar, group.lower)
        if row is bar or row.attention == group.baseline or its is None:
            continue
        found[("better" if its.change > 0 else "worse") if its.verdict == "unknown" else its.verdict].append(row)
    words = {"better": "Better", "noise": "Within its noise", "worse": "Not better"}
    told = [f"{words[verdict]}: {_list(rows)}." for verdict, rows in found.items() if rows]
    return [" ".join([f"The bar is {named(bar)}, {bar.figure}: it costs no training.", *told])]


def _noise(group: Group) -> list[str]:
    """Which rows stand above the baseline, or within its noise, at their stage."""
    verdicts: dict[str, list[Row]] = {}
    for row in group.measured:
        base = group.base(row)
        if base is not None and row.attention != group.baseline and base.stage == row.stage:
            its = beside(row, base, group.lower)
            verdicts.setdefault(its.verdict if its else "unknown", []).append(row)
    told = []
    if "better" in verdicts:
        told.append(f"Better than {group.baseline} at the same stage, beyond noise: {_list(verdicts['better'])}.")
    if "noise" in verdicts:
        told.append(f"Within the noise of {group.baseline} at the same stage: {_list(verdicts['noise'])}.")
    if group.measured and len({seed for row in group.measured for seed in row.results}) == 1:
        told.append("One seed: no difference here can be told from noise.")
    elif "unknown" in verdicts:
        told.append(f"Seeds change nothing, so that no noise is known: {_list(verdicts['unknown'])}.")
    return told


def _budgets(group: Group) -> list[list[str]]:
    return [row for cost in (CACHE, MEMORY, TIME, TOKEN, STEP) for row in _within(group, cost)]


def _within(group: Group, cost: Cost) -> list[list[str]]:
    """The best row within each budget of a cost; of budgets with the same best row the smallest."""
    base = 1.0 if cost.ratio else group.cost(group.baseline, cost)
    rows: list[list[str]] = []
    for limit in (SPEEDS if cost.ratio else SHARES) if base else ():
        assert base is not None
        most = 1 / limit if cost.ratio else limit * base
        fits = [(row, its) for row in group.ranked if (its := group.cost(row.attention, cost)) and its <= most]
        if not fits:
            continue
        best, its = fits[0]
        other = group.base(best)
        gap = None if other is None else beside(best, other, group.lower)
        if cost.ratio:
            of = {TOKEN: ", a token", STEP: ", a training step"}.get(cost, "")
            least, takes = f"at least {limit:g} times as fast{of}", f"{1 / its:.2f}\u00d7"
        else:
            least, takes = map(share, (limit, its / base))
            least = f"at most {least} of the {cost.name}"
        if rows and rows[-1][1] == named(best):
            rows.pop()
        rows.append([least, named(best), str(best.figure), takes, str(gap or "")])
    return rows


def _list(rows: list[Row]) -> str:
    """Rows by attention, each with its stages."""
    stages: dict[str, list[str]] = {}
    for row in rows:
        stages.setdefault(row.attention, []).append(row.stage)
    told = [f"{attention} ({', '.join(its)})" for attention, its in stages.items()]
    more = [f"{len(told) - MOST_NAMED} more"] if len(told) > MOST_NAMED else []
    return "; ".join([*told[:MOST_NAMED], *more])
