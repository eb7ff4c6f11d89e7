"""What README.md beside a swapped model says of its attention: what it is, what to install, how to load it.

transformers alone only says that it does not know the implementation; a folder's page on the hub shows this.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from attn_plugins.hf.checkpoints.peft import rules_in
from attn_plugins.hf.swap import describe_attention

START, END = "<!-- attn-plugins: what follows is written anew whenever the model is saved -->", "<!-- /attn-plugins -->"


def kinds_of(model: Any) -> dict[str, int]:
    """What serves how many of the model's attention modules."""
    kinds: dict[str, int] = {}
    for row in describe_attention(model):
        kind = row.plugin or f"own ({row.implementation})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def tags(kinds: dict[str, int]) -> list[str]:
    """Tags by which the hub finds models with these attentions."""
    return ["attn-plugins", *(f"attention-{kind}" for kind in kinds if not kind.startswith("own ("))]


def served(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} in {count}" for kind, count in kinds.items())


def rules_block(rules: Any) -> list[str]:
    """Rules as Markdown shows them."""
    return ["```yaml", yaml.safe_dump(rules, sort_keys=False).strip().removesuffix("...").strip(), "```"]


def write_card(folder: Any, model: Any, *, adapter: bool, tagged: bool = False) -> None:
    """Write the part of README.md that is about the attention, and nothing else of it; none for a model without rules.

    Args:
        adapter: the folder holds an adapter of PEFT, not the model.
        tagged: also add what is missing of :func:`tags` to the front matter of a card that has one, as that which
            transformers makes for the hub.
    """
    if not Path(folder).is_dir():
        return  # nothing was saved
    path, rules = Path(folder) / "README.md", rules_in(model)
    found = path.read_text(encoding="utf-8") if path.is_file() else None
    around = (
        None if found is None else re.split(f"{re.escape(START)}.*?{re.escape(END)}\n?", found, maxsplit=1, flags=re.S)
    )
    if not rules:
        if around is not None and len(around) == 2:
            path.write_text(around[0] + around[1], encoding="utf-8")
        return
    section = "\n".join([START, *_section(model, rules, adapter), END]) + "\n"
    if around is None:
        front = {
            "library_name": "peft" if adapter else "transformers",
            **_base(model),
            "tags": tags(kinds_of(model)),
        }
        around = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n", ""]
    elif len(around) == 1:
        around = [found.rstrip("\n") + "\n\n" if found else "", ""]
    text = around[0] + section + around[1]
    path.write_text(_tagged(text, tags(kinds_of(model))) if tagged else text, encoding="utf-8")


def _base(model: Any) -> dict[str, str]:
    """``base_model`` as the hub reads it, where the model came from there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = model.name_or_path
    try:
        validate_repo_id(name)
    except HFValidationError:
        return {}
    return {} if Path(name).exists() else {"base_model": name}


def _tagged(text: str, names: list[str]) -> str:
    """A card with these tags among those of its front matter, if it has one."""
    from huggingface_hub import ModelCard

    if not text.startswith("---\n"):
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *names]))
    return str(card)


def _section(model: Any, rules: Any, adapter: bool) -> list[str]:
    what, alone = ("adapter was trained with", "PEFT") if adapter else ("model has", "transformers")
    name, module = type(model).__name__, type(model).__module__
    loaded = f'{name}.from_pretrained("path/to/this/folder")'
    if adapter:
        loaded = f'PeftModel.from_pretrained({name}.from_pretrained("its base model"), "path/to/this/folder")'
    return [
        "## Attention",
        "",
        f"This {what} another attention than its architecture's own. Of its attention modules: "
        f"{served(kinds_of(model))}. {alone} alone refuses to load it; with attn-plugins it is loaded like any other.",
        "",
        "```sh",
        "pip install attn-plugins",
        "```",
        "",
        "```python",
        "import attn_plugins",
        *(["from peft import PeftModel"] if adapter else []),
        f"from {'transformers' if module.startswith('transformers.') else module} import {name}",
        "",
        f"model = {loaded}",
        "```",
        "",
        "The rules:",
        "",
        *rules_block(rules),
    ]
