"""Logits of the last tokens of rows alone: of long rows all of them are the largest tensor by far."""

import inspect
from typing import Any

import torch
from torch import nn


def last_logits(model: nn.Module, ids_BN: torch.Tensor, number: int) -> torch.Tensor:
    """Logits that predict the last ``number`` tokens of rows, each given all before it: (B, number, V)."""
    few = {"logits_to_keep": number + 1} if _keeps_logits(model) else {}
    return model(input_ids=ids_BN, use_cache=False, **few).logits[:, -number - 1 : -1]


def _keeps_logits(model: Any) -> bool:
    """Whether a model, whatever is around it, can be asked for its last logits alone."""
    while hasattr(model, "module"):
        model = model.module
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(model.forward).parameters
