"""Checkpoints hold weights by the names that a model is saved under, and Trainer reads them by those that it has.

Where transformers has renamed or joined layers of a family since its models were published (ViT, BLIP), it saves them
under the published names, and ``Trainer`` would take what it does not find there for missing and go on from the weights
of the start, both when a run is resumed and when the best checkpoint is loaded.
"""

from typing import Any

import torch
from transformers import PreTrainedModel


def read_as_saved(model: Any) -> None:
    """Have a model's ``load_state_dict`` take weights under the names that they are saved with, too."""
    if isinstance(model, PreTrainedModel):
        model.register_load_state_dict_pre_hook(_convert)


def _convert(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give weights in ``state_dict`` the names that they have in the model, in place, where they have others."""
    if prefix or set(state_dict) <= set(model.state_dict()):
        return
    # transformers' own loading knows how.
    alike = type(model).from_pretrained(None, config=model.config, state_dict=dict(state_dict), dtype=torch.float32)
    weights = alike.state_dict()
    kept = {name: weight for name, weight in state_dict.items() if name in weights}
    state_dict.clear()
    state_dict.update({**weights, **kept})
