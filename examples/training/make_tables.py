"""Tables to try tasks on where there are none ready: what authors of packages and of Python's documentation marked.

    python examples/training/make_tables.py words --out data/words
    python examples/training/make_tables.py questions --summaries data/summaries --out data/questions
    python examples/training/make_tables.py preference --summaries data/summaries --out data/preference

Writes OUT/train.jsonl and OUT/validation.jsonl. `words` (token-classification) are paragraphs of Python's
documentation, with tags of what stands in marks of code; every fourth is held out. `questions` (question-answering) are
short descriptions of packages and what they say the package provides; `preference` are descriptions with their own
summary, and that of another package. The folder of --summaries has a train.jsonl and a validation.jsonl with columns
document and summary.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from attn_plugins.data.text import python_docs

Row = dict[str, object]

CODE = re.compile(r'("[^"]+"|``[^`]+``)')
QUESTION = re.compile(r"This package (provide|contain)s ([^.:;]{10,120})\.")


def words(texts: Sequence[str]) -> list[Row]:
    """Paragraphs of 6 to 60 words that have some in marks of code. The marks are gone from the words."""
    found: dict[str, Row] = {}
    for paragraph in (part for text in texts for part in text.split("\n\n")):
        pieces = CODE.split(flat := " ".join(paragraph.split()))
        row: tuple[list[str], list[str]] = [], []
        for number, piece in enumerate(pieces):
            code = number % 2 == 1
            parts = re.findall(r"\w+|[^\w\s]", piece.strip('"`') if code else piece)
            row[0].extend(parts)
            row[1].extend(["B-CODE", *["I-CODE"] * (len(parts) - 1)][: len(parts)] if code else ["O"] * len(parts))
        prose = not paragraph.startswith(" ") and not re.search(r"\*\*|==|--|::", paragraph)
        if prose and '"' not in "".join(pieces[::2]) and 6 <= len(row[0]) <= 60 and {"O", "B-CODE"} <= set(row[1]):
            found[flat] = {"words": row[0], "tags": row[1]}
    return list(found.values())


def questions(summaries: Sequence[dict[str, str]]) -> list[Row]:
    """Descriptions of up to 180 characters that say once what a package is for: the question of it, and that part."""
    found: dict[str, Row] = {}
    for row in summaries:
        context = " ".join(row["document"].split())
        said = QUESTION.findall(context)
        if len(said) == 1 and len(context) <= 180:
            ((verb, answer),) = said
            found[context] = {"question": f"What does this package {verb}?", "context": context, "answers": answer}
    return list(found.values())


def preference(summaries: Sequence[dict[str, str]]) -> list[Row]:
    """Descriptions of 100 to 500 characters; the summary that is rejected is one of half the table away."""
    short = [row for row in summaries if 100 < len(row["document"]) < 500]
    half = len(short) // 2
    return [
        {"prompt": row["document"] + "\n\nSummary:\n", "chosen": row["summary"], "rejected": other["summary"]}
        for row, other in zip(short, short[half:] + short[:half], strict=True)
        if row["summary"] != other["summary"]
    ]


TABLES: dict[str, Callable[..., list[Row]]] = {"words": words, "questions": questions, "preference": preference}


def tables(table: str, summaries: Path | None) -> dict[str, list[Row]]:
    """All rows of each split."""
    if summaries is None:
        rows = words([text for split in python_docs().values() for text in split["text"]])
        return {"train": [row for number, row in enumerate(rows) if number % 4], "validation": rows[::4]}
    lines = {s: (summaries / f"{s}.jsonl").read_text(encoding="utf8").splitlines() for s in ("train", "validation")}
    return {split: TABLES[table]([json.loads(line) for line in read]) for split, read in lines.items()}


def spread(rows: dict[str, list[Row]], counts: dict[str, int]) -> dict[str, list[Row]]:
    """So many rows of each split at most, from its beginning to its end: tables are often in the order of names."""
    return {split: rows[split][:: max(1, len(rows[split]) // count)][:count] for split, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--summaries", type=Path, help="folder of the descriptions that questions and preference are of"
    )
    parser.add_argument("--train", type=int, default=400, help="rows to train on, at most (default %(default)s)")
    parser.add_argument("--validation", type=int, default=100, help="held-out rows, at most (default %(default)s)")
    args = parser.parse_args()
    if (args.summaries is None) != (args.table == "words"):
        parser.error(f"{args.table} {'needs' if args.summaries is None else 'takes no'} --summaries")
    made = spread(tables(args.table, args.summaries), {"train": args.train, "validation": args.validation})
    for split, rows in made.items():
        if not rows:
            parser.error(f"{split}: no row of the source is of the kind that {args.table} takes")
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in made.items():
        (args.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
        print(f"{args.out / split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
