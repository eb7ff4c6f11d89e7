"""The attention modules of recurrent models, which call transformers' attention interface as its own do."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``attn_implementation="eager"`` means: (out (B, Q, H, V), weights (B, H, Q, K))."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RecurrentAttention(nn.Module):
    """Attention of some states over others, whose keys and values are made by :meth:`project`.

    Args:
        memory_size: size of the states that are attended to.
    """

    is_causal = False

    def __init__(self, config: Any, memory_size: int):
        super().__init__()
        self.config = config
        self.num_heads, size = config.num_attention_heads, config.hidden_size
        self.head_dim = size // self.num_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, config.attention_dropout
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(memory_size, size, bias=False)
        self.v_proj = nn.Linear(memory_size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def project(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, K, D) of states (B, K, memory_size)."""
        key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (self.k_proj(memory), self.v_proj(memory)))
        return key.transpose(1, 2), value.transpose(1, 2)

    def attended(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(context (B, Q, hidden_size), weights (B, H, Q, K) or None) of queries made of ``hidden_states``."""
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(context.flatten(2)), weights


class RecurrentCrossAttention(RecurrentAttention):
    """Attention of a decoder's states, or of a learned query, over the states of an encoder.

    The keys and values of the encoder are made once for all the steps that ask.
    """

    def forward(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(context (B, Q, hidden_size), weights (B, H, Q, K) or None) of queries made of ``hidden_states``."""
        return self.attended(hidden_states, key, value, attention_mask, **kwargs)


class RecurrentSelfAttention(RecurrentAttention):
    """Attention of an encoder's states to one another, added to them, with a norm."""

    def __init__(self, config: Any):
        super().__init__(config, config.hidden_size)
        self.dropout, self.norm = nn.Dropout(config.dropout), nn.LayerNorm(config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(states (B, N, hidden_size), weights (B, H, N, N) or None)."""
        context, weights = self.attended(hidden_states, *self.project(hidden_states), attention_mask, **kwargs)
        return self.norm(hidden_states + self.dropout(context)), weights
