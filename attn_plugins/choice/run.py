"""A choice as the command line makes it: settings, model and text, the choice, what its cache takes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from attn_plugins.choice.cache import cache_bytes_at
from attn_plugins.choice.choose import check_choice, choose_attention
from attn_plugins.choice.places import Level
from attn_plugins.choice.report import Choice
from attn_plugins.choice.shared_copy import shared_copy
from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.stream import Stream
from attn_plugins.data.text import PYTHON_DOCS
from attn_plugins.hf.discovery.modules import targets
from attn_plugins.hf.swap import restore_attention, swap_attention, unwrap
from attn_plugins.training.evaluate import place
from attn_plugins.training.models import AS_SAVED, Dtype, Loaded, load, one_line, read_attention, resolve, skeleton


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """One choice: of which model, by which text and score, within which budget."""

    model: str
    """A folder (a PEFT adapter's too), a name on the hub, or smollm2-135m-demo."""
    data: DataConfig = field(default_factory=lambda: DataConfig(source=PYTHON_DOCS))
    """Text; its training split is used."""
    attention: Any = AS_SAVED
    """A name, a rule, or a YAML file of one, for what is not chosen; as-saved is that of a saved swapped model."""
    budget: float = 0.25
    """Share of the key/value heads, or layers, that keep full attention."""
    level: Level = "heads"
    """heads or layers."""
    score: str = "contribution"
    """contribution, kl, kl_swapped, recall, recall_kept or gates: see attn_plugins.choose_attention."""
    length: int | None = None
    """Tokens of a row; null for what the score takes."""
    rows: int | None = None
    """Rows, or batches of texts; null for what the score takes."""
    texts: int = 200
    """Of the first so many texts rows are made."""
    context: int = 8192
    """Tokens of the text whose cache is told; at most the model's positions."""
    dtype: Dtype = "auto"
    """What weights are loaded in; auto is what they were saved in."""
    seed: int = 0
    """Of the rows, and of new weights."""
    output_dir: str = "runs/choose"
    """Where rules.yaml, scores.json and scores.png go."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", read_attention(self.attention))
        check_choice(self.budget, self.level, self.score, self.length, self.rows)
        if self.attention is None:
            raise ValueError("attention=null; allowed: a name or a rule, for what is not chosen")
        for name in ("texts", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A choice that was made and written."""

    choice: Choice
    context: int
    dense_bytes: int | None
    """Of the cache, for one row of ``context`` tokens, with the model's own attention; None where it is not known."""
    chosen_bytes: int | None
    """The same with the rules."""
    files: list[Path]


def choose(config: ChooseConfig, told: Any) -> Chosen:
    """Load model and text, choose, write.

    Raises:
        ValueError: something that the config names is not there or does not fit.
    """
    need("matplotlib", "compare")
    folder = check_folder(config.output_dir)
    train, _ = load_data(config.data)
    loaded = place(_load(config))
    rule = None if config.attention == AS_SAVED else config.attention
    texts = (train.first if isinstance(train, Stream) else train)["text"][: config.texts]
    how: dict[str, Any] = {"length": config.length, "rows": config.rows, "seed": config.seed, "told": told}
    given = (loaded.model, loaded.tokenizer, texts, rule, config.budget, config.level, config.score)
    choice = choose_attention(*given, **how)
    inner = unwrap(loaded.model)
    longest = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    context = min(config.context, longest) if isinstance(longest, int) else config.context
    dense, chosen = (_cache(inner, rules, context) for rules in (None, choice))
    return Chosen(choice=choice, context=context, dense_bytes=dense, chosen_bytes=chosen, files=choice.save(folder))


def _cache(model: nn.Module, rules: Any, context: int) -> int | None:
    copied: Any = shared_copy(model)
    restored = restore_attention(copied) if rules is None else swap_attention(copied, rules)
    return cache_bytes_at(restored, context)  # type: ignore[arg-type]


def _load(config: ChooseConfig) -> Loaded:
    """A decoder with its head, or an encoder without one."""
    inner: Any = unwrap(skeleton(config.model))
    if any(target.role == "decoder" for target in targets(inner)):
        return load(config.model, dtype=config.dtype, seed=config.seed)
    source = resolve(config.model)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with one_line(config.model):
        model = transformers.AutoModel.from_pretrained(source, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return Loaded(model=model, processing=tokenizer, source=source, auto="AutoModel", fresh=[])
