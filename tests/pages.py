"""The pages that people read: which there are, and the code blocks and links in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
"""Every page, as a path in the repository."""


class Block(NamedTuple):
    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf8")


def blocks(page: str) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    return [Block(*match) for match in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", read(page), re.MULTILINE)]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", read(page), flags=re.MULTILINE)


def python(page: str, model: str | None) -> dict:
    """Run the Python of a page, all blocks as one program whose ``path`` is a folder; returns its names.

    Args:
        model: the folder; None where the page loads none.

    Raises:
        ValueError: the page does not say exactly once which model it loads, or says it where it loads none.
    """
    source = "\n".join(block.text for block in blocks(page) if block.language == "python")
    source, replaced = re.subn(r"^path = .*$", f"path = {model!r}", source, flags=re.MULTILINE)
    if replaced != (expected := 0 if model is None else 1):
        raise ValueError(f"{page}: {expected} lines `path = ...` were expected, {replaced} were found")
    names: dict = {}
    exec(compile(source, page, "exec"), names)
    return names


def links(page: str) -> list[str]:
    """Targets inside the repository, pictures too, as written: ``docs/design.md#masks``."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if ":" not in link]


def anchors(page: str) -> set[str]:
    """What ``#...`` may follow the page's name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
