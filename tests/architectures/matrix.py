"""Run every check on every model type and write docs/architectures.md and .json: ``make architectures``.

A run that was stopped goes on where it was, from the lines that it has appended to the file of results.
"""

import argparse
import collections
import concurrent.futures
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

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
    import torch
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
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    text = json.dumps({"versions": told, "rows": kept}, indent=1, ensure_ascii=False)
    (folder / "architectures.json").write_text(text + "\n", encoding="utf8")
    (folder / "architectures.md").write_text(document(rows, told), encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="only these, and write nothing; default: all")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the page and the JSON go")
    parser.add_argument("--results", type=Path, default=Path("runs/architectures.jsonl"), help="one line a model type")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    prepare()
    if given.model_types:
        for name in given.model_types:
            print(json.dumps(examine(name), indent=1))
        return
    import tiny_model

    write(run(tiny_model.model_types(), given.results, given.workers), versions(), given.folder)
    given.results.unlink()  # the next run begins anew


if __name__ == "__main__":
    main()
