"""README.md of a model that was exported: what it is, and that it needs nothing but transformers."""

import re
from pathlib import Path
from typing import Any

import yaml

from attn_plugins.hf.checkpoints.card import kinds_of, tags


def native_card(swapped: Any, native: Any, windows: str, source: str | None) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        windows: what each layer sees, in words.
        source: what the swapped model was loaded from; the front matter of a README.md there is taken over.
    """
    name, was = type(native).__name__, type(swapped).__name__
    kind = f"a {name}" if name == was else f"a {name}, which computes what a {was} does but for windows"
    front = {"library_name": "transformers", **_front(source, set(tags(kinds_of(swapped))))}
    loaded = f'{name}.from_pretrained("path/to/this/folder")'
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(source).name if source else name}",
        "",
        f"A {was} whose attention was swapped by attn-plugins, written by `attn-plugins export --native` as {kind}. "
        "transformers loads it without that package.",
        "",
        f"Windows, in keys that a query sees, its own with them: {windows or 'none'}.",
        "",
        "```python",
        f"from transformers import {name}",
        "",
        f"model = {loaded}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front(source: str | None, ours: set[str]) -> dict[str, Any]:
    """Front matter of the model that was swapped, without the tags of its attention."""
    path = Path(source or "") / "README.md"
    found = None if source is None or not path.is_file() else path.read_text(encoding="utf-8")
    matter = re.match(r"---\n(.*?)\n---\n", found or "", flags=re.S)
    front: Any = (yaml.safe_load(matter[1]) if matter else None) or {}
    if isinstance(front.get("tags"), list):
        front["tags"] = [tag for tag in front["tags"] if tag not in ours]
    return {key: value for key, value in front.items() if value != []}
