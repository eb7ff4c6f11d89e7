"""Run every check on every model type and write docs/architectures.md and .json: ``make architectures``.

A run that was stopped goes on where it was, from the lines that it has appended to the file of results.

Some model types need a package that the environment of most runs lacks. Their rows stay as they were measured where it
is there, by ``make architectures-timm``, which runs these alone and writes them into the same page.
"""

import argparse
import collections
import concurrent.futures
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

NEEDS = "needs "
"""Begins the reason of what is not built for want of a package."""
MARKS = {"passed": "✓", "not applicable": "·", "failed": "✗"}
ORDER = ("passed", "failed", "refused", "inline attention", "no attention", "not built")
MEANINGS = {
    "passed": "all checks that apply pass",
    "failed": "a check fails",
    "refused": "attn_plugins says that it cannot serve it, and why",
    "inline attention": "attends without transformers' interface, and has no adapter",
    "no attention": "nothing to swap",
    "not built": "no tiny model or no inputs, so nothing is known",
}


def prepare() -> None:
    """Quiet, one thread: the processes are what runs side by side."""
    sys.path.append(str(Path(__file__).parents[1]))
    import torch
    import torchvision_on_cpu  # noqa: F401, before transformers imports torchvision
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def examine(model_type: str) -> dict[str, Any]:
    import checks

    return checks.examine(model_type).to_dict()


def run(model_types: list[str], results: Path, workers: int) -> Rows:
    """Rows of all types, in order; those that ``results`` has lines of are taken from there."""
    held = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = {row["model_type"]: row for row in held}
    todo = [name for name in model_types if name not in rows]
    results.parent.mkdir(parents=True, exist_ok=True)
    with (
        results.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(workers, initializer=prepare) as pool,
    ):
        for future in concurrent.futures.as_completed([pool.submit(examine, name) for name in todo]):
            row = future.result()
            rows[row["model_type"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{len(rows)}/{len(model_types)} {row['model_type']}: {row['status']} {row['reason']}", flush=True)
    return [rows[name] for name in model_types]


def lacks_package(row: dict[str, Any]) -> bool:
    """Whether a model type was not built here for want of a package."""
    return row["status"] == "not built" and row["reason"].startswith(NEEDS)


def with_held(rows: Rows, held: Rows) -> Rows:
    """``rows``, but those of ``held`` of model types that are not built now for want of a package, and were built."""
    known = {row["model_type"]: row for row in held if not lacks_package(row)}
    return [known.get(row["model_type"], row) if lacks_package(row) else row for row in rows]


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}


def document(rows: Rows, told: dict[str, str]) -> str:
    """The page, made from the rows alone."""
    counts = collections.Counter(row["status"] for row in rows)
    whole = sum(all(m["called"] == m["count"] for m in row["modules"]) for row in rows if row["status"] == "passed")
    names = list(dict.fromkeys(name for row in rows for name in row["checks"]))
    lines = [
        "# Architectures",
        "",
        f"What the flag does on a tiny random model of each of the {len(rows)} model types that transformers' auto "
        f"classes know ({', '.join(f'{name} {version}' for name, version in told.items())}). `make architectures` "
        "writes this page and architectures.json, which has the reason behind every mark; the code is "
        "tests/architectures.",
        "",
        "| model types | | |",
        "|---|---|---|",
        *(f"| {counts[status]} | {status} | {MEANINGS[status]} |" for status in ORDER if counts[status]),
        "",
        f"In {whole} of the {counts['passed']} that pass, every attention module was called; elsewhere the column "
        "*modules* says how many were.",
        "",
        *beyond_setup(rows),
        "The checks, each on every attention module that was called, with padded inputs where the model takes any:",
        "",
        "- **shapes**: the sizes of heads that are read off the modules are those that arrive.",
        "- **roles**: modules said to be encoder, decoder or cross are called as such.",
        "- **limit**: `softmax` everywhere, and `local` with a window over the whole length where it serves, give the "
        "model's own output within 1e-4; a window of one token does not.",
        "- **linear**, **additive**: forward and backward run, with a gradient in every new weight.",
        "- **save**: saved and loaded, new weights and all, the output is equal bit for bit.",
        "- **restore**: the model's own attention comes back bit for bit.",
        "- **packed**: texts in one row, told apart by their positions, are computed as if each were alone.",
        "- **generate**: greedy tokens with a cache are those without one, under a small window and linear attention.",
        "",
        f"{MARKS['passed']} passed, {MARKS['not applicable']} does not apply, {MARKS['failed']} failed. Heads are "
        "query heads x size, with key/value heads and the size of a value where they differ.",
        "",
        f"## Served ({counts['passed']})",
        "",
        f"| model type | modules | heads | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for row in rows:
        if row["status"] == "passed":
            marks = (MARKS[row["checks"].get(name, "not applicable").partition(":")[0]] for name in names)
            lines.append(f"| {row['model_type']} | {modules(row)} | {heads(row)} | {' | '.join(marks)} |")
    lines += ["", "What does not apply, most frequent first:", ""]
    reasons = collections.Counter(
        (name, said.partition(": ")[2])
        for row in rows
        if row["status"] == "passed"
        for name, said in row["checks"].items()
        if said.startswith("not applicable")
    )
    lines += [f"- {name}, {count} times: {reason}" for (name, reason), count in reasons.most_common(12)]
    lines += ["", f"## Others ({len(rows) - counts['passed']})", "", "| model type | | reason |", "|---|---|---|"]
    for status in ORDER[1:]:
        lines += [
            f"| {row['model_type']} | {status} | {row['reason'].replace('|', '/')} |"
            for row in rows
            if row["status"] == status
        ]
    return "\n".join(lines) + "\n"


def beyond_setup(rows: Rows) -> list[str]:
    """What is made with packages that `make setup` does not bring."""
    made: dict[str, Rows] = collections.defaultdict(list)
    for row in rows:
        for name, version in row.get("versions", {}).items():
            made[f"{name} {version}"].append(row)
    if not made:
        return []
    told = [
        f"{len(found)} with {package}, of which {sum(row['status'] == 'passed' for row in found)} pass "
        f"({', '.join(row['model_type'] for row in found)})"
        for package, found in made.items()
    ]
    return [
        f"Some need packages that `make setup` does not bring: {'; '.join(told)}. `make architectures-timm` measures "
        "these alone; `make architectures` leaves their rows as they are where the packages are absent. The flag does "
        "not reach attention inside timm's own modules: `ap.swap_attention` swaps a part that is timm's by itself "
        "([Any torch module](torch_modules.md)).",
        "",
    ]


def modules(row: dict[str, Any]) -> str:
    """Such as ``2 text decoder, 1 of 2 vision encoder (adapter)``."""
    found = []
    for m in row["modules"]:
        number = str(m["count"]) if m["called"] == m["count"] else f"{m['called']} of {m['count']}"
        found.append(f"{number} {m['kind']} {m['role']}{' (adapter)' if m['reached'] == 'adapter' else ''}")
    return ", ".join(found)


def heads(row: dict[str, Any]) -> str:
    """Such as ``4x8``, ``4/2x8`` for grouped heads, ``4x8/12`` for values of another size."""
    shapes = sorted({tuple(shape) for m in row["modules"] for shape in m["heads"]})
    return ", ".join(
        f"{q}{'' if q == kv else f'/{kv}'}x{size}{'' if size == value else f'/{value}'}"
        for q, kv, size, value in shapes
    )


def write(rows: Rows, told: dict[str, str], folder: Path) -> None:
    """Versions stand at a row where they are those of packages beyond `make setup`."""
    kept = [
        {key: value for key, value in row.items() if key != "seconds" and (key, value) != ("versions", {})}
        for row in rows
    ]
    text = json.dumps({"versions": told, "rows": kept}, indent=1, ensure_ascii=False)
    (folder / "architectures.json").write_text(text + "\n", encoding="utf8")
    (folder / "architectures.md").write_text(document(rows, told), encoding="utf8")


def read(folder: Path) -> tuple[Rows, dict[str, str]]:
    """What :func:`write` has written, if anything."""
    file = folder / "architectures.json"
    held = json.loads(file.read_text(encoding="utf8")) if file.exists() else {"rows": [], "versions": {}}
    return held["rows"], held["versions"]


def update(model_types: list[str], folder: Path, results: Path, workers: int) -> None:
    """Run these model types, or those that need a package beyond `make setup`, and write their rows into the page.

    Raises:
        ValueError: the page is of other versions of transformers and torch than those at hand.
    """
    held, told = read(folder)
    if told != versions():
        raise ValueError(f"{folder}/architectures.json is of {told}, and here are {versions()}; run all model types")
    names = model_types or [row["model_type"] for row in held if row.get("versions") or lacks_package(row)]
    rows = {row["model_type"]: row for row in held}
    rows.update({row["model_type"]: row for row in with_held(run(names, results, workers), held)})
    write([rows[name] for name in sorted(rows)], told, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="only these, and write nothing; default: all")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write the rows of these model types into the page; default: those that need packages beyond make setup",
    )
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the page and the JSON go")
    parser.add_argument("--results", type=Path, default=Path("runs/architectures.jsonl"), help="one line a model type")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    prepare()
    if given.update:
        results = given.results.with_stem(f"{given.results.stem}-update")
        update(given.model_types, given.folder, results, given.workers)
        results.unlink()
        return
    if given.model_types:
        for name in given.model_types:
            print(json.dumps(examine(name), indent=1))
        return
    import tiny_model

    held, _ = read(given.folder)
    rows = with_held(run(tiny_model.model_types(), given.results, given.workers), held)
    write(rows, versions(), given.folder)
    given.results.unlink()  # the next run begins anew


if __name__ == "__main__":
    main()
