"""The tables of docs/cpu.md, from what was measured: python docs/benchmarks/compiled/table.py.

results.jsonl beside it is of `attn-plugins bench --config configs/bench/compiled.yaml`, whole_model.json of
docs/benchmarks/whole_model.py, token.jsonl of `attn-plugins bench --decode --config configs/bench/token.yaml`.
"""

import argparse
import json
from pathlib import Path

from attn_plugins.benchmark.pages.attention_tables import between_comments

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "cpu.md"


def rows_of(name):
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf8").splitlines()]


def spelled(ratio):
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def markdown(header, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def kernels():
    """Ratios by length: one thread's time, and in brackets two threads' clock."""
    found = {}
    for one in rows_of("results.jsonl"):
        if one["status"] == "ok":
            ratios = one["result"]["times_as_fast"], one["result"]["wall"]["times_as_fast"]
            found.setdefault(one["label"], {})[one["settings"]["length"]] = ratios
    lengths = sorted({length for its in found.values() for length in its})

    def cell(ratios):
        return f"{spelled(ratios[0])} ({spelled(ratios[1])})" if ratios else ""

    rows = [[label, *(cell(its.get(length)) for length in lengths)] for label, its in sorted(found.items())]
    return markdown(["", *(f"{length:,}" for length in lengths)], rows)


def whole_model():
    """Ratios by pass and length."""
    measured = json.loads((HERE.parent / "whole_model.json").read_text(encoding="utf8"))["rows"]
    passes = list(dict.fromkeys((one["pass"], one["tokens"]) for one in measured))
    found = {}
    for one in measured:
        found.setdefault(one["attention"], {})[one["pass"], one["tokens"]] = one["times_as_fast"]
    rows = [[name, *(f"{its[one]:.2f}" for one in passes)] for name, its in found.items() if name != "dense"]
    return markdown(["", *(f"{which}, {tokens:,}" for which, tokens in passes)], rows)


def token():
    """Times as fast as the model without slots, a token at 1,024 tokens of context."""
    rows = [
        [one["label"], f"{one['result']['times_as_fast']:.3f}"]
        for one in rows_of("token.jsonl")
        if one["status"] == "ok" and one["label"] != "dense"
    ]
    return markdown(["", "times as fast"], rows)


TABLES = {"kernels": kernels, "whole model": whole_model, "token": token}


def with_tables(page):
    """The page with its tables written anew."""
    for name, make in TABLES.items():
        written = between_comments(
            page, name, lambda make=make: make().splitlines(), by="docs/benchmarks/compiled/table.py"
        )
        if written is None:
            raise ValueError(f"{PAGE} has no place for the table {name!r}")
        page = written
    return page


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf8")), encoding="utf8")


if __name__ == "__main__":
    main()
