"""A file of functions that attention classes of other files call."""

from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * kwargs["scaling"]
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


def dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    implementation = module.config._attn_implementation
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)(module, *args, **kwargs)
