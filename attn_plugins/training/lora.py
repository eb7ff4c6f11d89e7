"""LoRA: which layers adapters go to, and what trains whole beside them."""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from attn_plugins.config.extras import need
from attn_plugins.tasks.kinds import KINDS, PEFT_TASKS
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.heads import beside_attention
from attn_plugins.training.history import pretrained_base, stages_of
from attn_plugins.training.models import Loaded, in_slot, linear_of_both_kinds

ALL = "all-linear"
"""PEFT's name for every linear layer but the head, where adapters go unless that is said: see docs/transfer.md."""


def with_lora(config: FinetuneConfig, loaded: Loaded, model: Any, new: list[str]) -> nn.Module:
    """Put adapters into a model, as ``config.lora`` says.

    Args:
        model: what they go into: that of ``loaded``, or of a SentenceTransformer the one inside.
        new: names of its parameters that train whole.

    Returns:
        the model around them.

    Raises:
        ValueError: PEFT cannot place them.
    """
    peft = need("peft", "train")
    options = dict(config.lora)
    whole = ["attn_plugin" if in_slot(name) else name.rpartition(".")[0] for name in new]
    heads = beside_attention(model) if KINDS[config.trained().model].classes else []  # perhaps of other classes
    whole = sorted({*whole, *heads, *(options.pop("modules_to_save", None) or [])})
    if not {"target_modules", "target_parameters"} & set(options):
        options["target_modules"] = _all_linear(model, whole)
    # What trains whole gets no adapters inside it, even where a layer in it has the name of one of the model's.
    within = rf"(.*\.)?({'|'.join(map(re.escape, whole))})(\..*)?"
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = {path.rpartition(".")[2] for path in linear if whole and re.fullmatch(within, path)}
    targets = options.get("target_modules")
    if inside & set(targets) if isinstance(targets, list) else inside:
        options.setdefault("exclude_modules", within)
    kind = PEFT_TASKS.get(loaded.auto)
    try:
        adapter = peft.LoraConfig(task_type=kind, modules_to_save=whole or None, **options)
        with linear_of_both_kinds():
            if model is loaded.model:
                adapted = peft.get_peft_model(model, adapter)
            else:  # in a SentenceTransformer, which saves and loads adapters that transformers has placed
                adapted = loaded.model
                model.add_adapter(adapter)
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora: {error}") from error
    # The adapter brings all weights of the slots along: it needs no folder in which nothing else was trained.
    adapter.base_model_name_or_path = pretrained_base(stages_of(loaded.source)) or loaded.source
    return adapted


def _all_linear(model: Any, whole: list[str]) -> str | list[str]:
    """PEFT's option for all linear layers but the head: names of layers where PEFT does not know it, as that of CTC.

    Args:
        whole: names of what trains whole, which gets no adapters anyhow.
    """
    known, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D)
    heads = {name for name in beside_attention(model) if isinstance(getattr(model, name), kinds)} - set(whole)
    if all(getattr(model, name) is known for name in heads):
        return ALL
    linear = [path for path, module in model.named_modules() if isinstance(module, kinds) and not in_slot(path)]
    names = {path: path.rpartition(".")[2] for path in linear if path not in heads}
    return sorted({path if name.isdigit() else name for path, name in names.items()})
