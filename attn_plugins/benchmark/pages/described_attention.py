"""What there is to know of one attention, for a terminal or as JSON: ``attn-plugins describe``."""

import dataclasses
import inspect
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attn_plugins.benchmark.checks.check import LENGTHS, standings, taken
from attn_plugins.core.capabilities import capabilities
from attn_plugins.core.options import describe_options


def facts(attention: Any) -> dict[str, Any]:
    """What there is to know of an attention, as JSON holds it."""
    file, line = inspect.getsourcefile(attention), inspect.getsourcelines(attention)[1]
    doc = inspect.getdoc(attention) or ""
    return {
        "name": attention.name,
        "family": attention.family,
        "summary": " ".join(doc.partition("\n\n")[0].split()),
        "cost": attention.cost,
        "keeps": attention.keeps if attention.causal else None,
        "capabilities": capabilities(attention),
        "paper": attention.paper,
        "options": [dataclasses.asdict(option) for option in describe_options(attention.Config)],
        "doc": doc,
        "source": f"{file}:{line}",
    }


def print_attention(attention: Any, as_json: bool) -> None:
    """What there is to know of an attention, for a terminal or as JSON."""
    known = facts(attention)
    if as_json:
        print(json.dumps(known, indent=2))
        return
    console = Console(highlight=False)
    paragraphs = known["doc"].split("\n\n")  # lines are wrapped for the source; a terminal wraps them anew
    doc = "\n\n".join(text if "\n " in text or "\n-" in text else " ".join(text.split()) for text in paragraphs)
    console.print(f"[bold]{known['name']}[/bold] ({known['family']}), cost of a head {escape(known['cost'])}\n")
    console.print(doc + "\n", markup=False)
    console.print(f"supports: {', '.join(known['capabilities'])}", markup=False)
    if known["keeps"]:
        console.print(f"keeps:    {known['keeps']} (when text is generated, a key/value head)", markup=False)
    console.print(f"paper:    {known['paper']}", markup=False)
    console.print(f"source:   {known['source']}\n", markup=False, soft_wrap=True)
    if not known["options"]:
        console.print("no options")
        return
    table = Table(title="options", title_justify="left")
    for column in ("name", "type", "default", "what it does"):
        table.add_column(column)
    for option in known["options"]:
        table.add_row(*(escape(option[name]) for name in ("name", "type", "default", "doc")))
    console.print(table)


def print_standings(attention: str, device: str, as_json: bool) -> None:
    """What computes an attention on a device, the fastest that passed first."""
    rows = standings(attention, device)
    if as_json:
        print(json.dumps({"auto": taken(attention, device), "backends": list(map(dataclasses.asdict, rows))}, indent=2))
        return
    title = f"{attention} on {device}: {taken(attention, device)}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("backend", "checked", f"ms at {LENGTHS[-1]}", "note"):
        table.add_column(column)
    for row in rows:
        checked_here = {True: "passed", False: "failed", None: "no"}[row.passed]
        took = "" if row.seconds is None else f"{1000 * row.seconds:.2f}"
        table.add_row(row.backend, checked_here, took, escape(row.note))
    Console(highlight=False).print(table)
