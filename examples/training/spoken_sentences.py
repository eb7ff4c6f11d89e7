"""Recordings to try speech recognition on where there are none: sentences of Python's documentation, spoken by flite.

    apt install flite
    python examples/training/spoken_sentences.py --out data/spoken

Writes OUT/train.jsonl and OUT/validation.jsonl, a line {"audio": ..., "text": ...} a sentence, and recordings beside
them (16 bit, one channel). Held-out sentences are of other topics of the documentation, in the same voices.
"""

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path

from attn_plugins.data.text import python_docs

SENTENCE = re.compile(r"(?<=[.:] )[A-Z][a-z]+(?:,? [a-z]+){4,16}(?=\. )")
VOICES = ("slt", "rms", "awb")


def sentences(texts: list[str], count: int) -> list[str]:
    """The first sentences that are plain words, each once; ValueError where there are fewer than asked for."""
    flat = (" ".join(text.split()) for text in texts)
    found = list(dict.fromkeys(one for text in flat for one in SENTENCE.findall(text)))
    if len(found) < count:
        raise ValueError(f"asked for {count} sentences, and the texts have {len(found)} of plain words")
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=96, help="sentences to train on (default %(default)s)")
    parser.add_argument("--validation", type=int, default=16, help="held-out sentences (default %(default)s)")
    args = parser.parse_args()
    if shutil.which("flite") is None:
        parser.error("flite is not installed; Debian and others have a package of this name")
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in python_docs().items():
        try:
            chosen = sentences(list(rows["text"]), getattr(args, split))
        except ValueError as error:
            parser.error(f"{split}: {error}")
        lines = []
        for number, text in enumerate(chosen):
            name = f"{split}-{number:03}.wav"
            voice = VOICES[number % len(VOICES)]
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(args.out / name)], check=True)
            lines.append(json.dumps({"audio": name, "text": text}))
        (args.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
