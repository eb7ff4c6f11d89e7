"""What a click on a row shows: its facts, and of each of its cells settings, versions, log and command."""

from typing import Any

import yaml

from attn_plugins.benchmark.compare.report import PASSES, STAGES
from attn_plugins.benchmark.html.command import command
from attn_plugins.benchmark.html.groups import Group, Row
from attn_plugins.benchmark.html.noise import beside
from attn_plugins.benchmark.results.tables import brief_number, duration
from attn_plugins.config.versions import spelled

STATES = {"ok": "measured", "error": "failed"}

Facts = list[tuple[str, str]]


def row_facts(group: Group, row: Row) -> Facts:
    """What stands at the top: figures over all seeds, and what the attention is made of."""
    facts: Facts = [("Model", group.model)]
    facts += [("Part", group.part)] if group.part else []
    facts += [("Run", group.run)] if group.run else []
    rules = dict(rules_text(group)).get(row.attention)
    facts.append(("Attention", rules or "the model's own"))
    figure, base = row.figure, group.base(row)
    if figure is not None:
        facts.append((str(group.metric), f"{figure} ({'lower' if group.lower else 'higher'} is better)"))
        gap = None if base is None or row.attention == group.baseline else beside(row, base, group.lower)
        if gap is not None:
            words = {"noise": "within the noise", "unknown": "no noise is known"}.get(gap.verdict, "beyond the noise")
            facts.append((f"Beside {group.baseline}", f"{gap}, {words}"))
    facts += [(name, str(its)) for name, its in row.others.items()]
    served = row.first().get("attention", {})
    if "modules" in served:
        facts.append(("Modules", ", ".join(f"{kind} in {number}" for kind, number in served["modules"].items())))
    if served.get("new_params"):
        facts.append(("New parameters", f"{served['new_params']:,}"))
    if row.note:
        facts.append(("Seeds", row.note) if row.status == "ok" else ("State", row.note))
    return facts


def cell_details(group: Group) -> dict[str, dict[str, Any]]:
    """Key -> what there is to tell of a cell."""
    found = {}
    for row in group.rows:
        for cell in (*row.records, *row.missing):
            found[cell["key"]] = _cell(cell)
    return found | {cell["key"]: _cell(cell) for cell in group.cost_records}


def rules_text(group: Group) -> list[tuple[str, str]]:
    """Attention -> its rules in one line; empty for the model's own."""
    rules: dict[str, str] = {}
    for row in group.rows:
        for cell in (*row.records, *row.missing):
            rules.setdefault(row.attention, _line(cell.get("settings", {}).get("rules")))
    return [(name, rules.get(name, "")) for name in group.attentions]


def hardware_words(hardware: dict[str, Any]) -> str:
    """A machine in words, bytes as GiB."""
    sizes = {name: f"{its / 2**30:.1f} GiB" for name, its in hardware.items() if name.endswith("_bytes")}
    told = {name: sizes.get(name, its) for name, its in hardware.items()}
    return ", ".join(f"{name.removesuffix('_bytes').replace('_', ' ')} {its}" for name, its in told.items())


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    settings, status = cell.get("settings", {}), cell["status"]
    what = STAGES.get(cell["measure"], settings.get("what", cell["measure"]))
    where = [f"{settings['length']} tokens" if "length" in settings else "", settings.get("scope", "")]
    title = ", ".join([what, *filter(None, where), f"seed {cell['seed']}"])
    facts: Facts = [("State", STATES.get(status, status or "not run yet"))]
    if status not in (None, "ok"):
        facts.append(("Reason", cell.get("error", "none was recorded")))
    if status == "ok":
        facts += _results(cell["result"])
    if "seconds" in cell:
        facts.append(("Took", duration(cell["seconds"])))
    if "finished" in cell:
        facts.append(("Finished", cell["finished"].replace("T", " ").replace("+00:00", " UTC")))
    if "versions" in cell:
        facts.append(("Versions", spelled(cell["versions"])))
    if cell.get("hardware"):
        facts.append(("Machine", hardware_words(cell["hardware"])))
    if cell.get("hashes"):
        facts.append(("Hashes", ", ".join(f"{name} {its}" for name, its in cell["hashes"].items())))
    facts.append(("Key", cell["key"]))
    if isinstance(folder := cell.get("result", {}).get("folder"), str):
        facts.append(("Folder", folder))
    log = [text for text in (cell.get("log"), cell.get("traceback")) if isinstance(text, str)]
    return {
        "title": title,
        "status": status or "not run",
        "facts": facts,
        "log": "\n".join([*log, *_losses(cell)]).strip() or None,
        "command": command(cell),
        "figures": _dump({k: v for k, v in cell["result"].items() if k != "train"}) if status == "ok" else None,
        "settings": _dump(settings) if settings else None,
    }


def _results(result: dict[str, Any]) -> Facts:
    facts: Facts = []
    if "value" in result:
        facts.append((result["metric"], f"{result['value']:.6g}"))
    for which, figures in result.get("passes", {"": result}).items():
        name = PASSES.get(which, which).capitalize()
        if "times_as_fast" in figures:
            told = f"{figures['times_as_fast']:.2f} times as fast as the baseline ({figures['lowest']:.2f} to "
            facts.append((name or "Time", f"{told}{figures['highest']:.2f}), {duration(figures['seconds'])}"))
        for key, words in (("bytes", "Memory" if which else "Cache"), ("peak_bytes", "Memory at the peak")):
            if key in figures:
                facts.append((f"{name} {words}".strip().capitalize(), f"{brief_number(figures[key] / 2**20)} MiB"))
        facts += [("Launches", f"{figures['launches']:,}")] if "launches" in figures else []
    train = result.get("train", {})
    taken = [f"{train[name]} {name}" for name in ("steps", "rows") if name in train]
    return facts + ([("Trained", ", ".join([*taken, duration(train["seconds"])]))] if "seconds" in train else [])


def _losses(cell: dict[str, Any]) -> list[str]:
    losses = cell.get("result", {}).get("train", {}).get("losses", [])
    return [f"step {one['step']:>6}  loss {one['loss']:.4f}" for one in losses if "loss" in one]


def _line(rules: Any) -> str:
    if rules is None:
        return ""
    if isinstance(rules, dict) and "choose" in rules:
        rules = {"choose": {name: its for name, its in rules["choose"].items() if name != "data"}}
    return _flow(_given(rules))


def _given(tree: Any) -> Any:
    """Without options that are null."""
    if isinstance(tree, dict):
        return {key: _given(value) for key, value in tree.items() if value is not None}
    return [_given(one) for one in tree] if isinstance(tree, list) else tree


def _flow(tree: Any) -> str:
    return (
        yaml.safe_dump(tree, default_flow_style=True, width=10**6, sort_keys=False).strip().removesuffix("...").strip()
    )


def _dump(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110).strip()
