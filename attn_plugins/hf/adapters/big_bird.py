"""BigBird and BigBird-Pegasus's encoder: blocks, or all tokens where rows are short.

The adapted module is the one around the two that attend. The model puts one of these in the other's place when a row is
short, and a slot would go with it.
"""

from typing import Any

import torch
from transformers.models.big_bird import modeling_big_bird
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.own_pattern import OwnBlocks, OwnPattern
from attn_plugins.hf.adapters import Heads, attend, cached, slotted
from attn_plugins.hf.masks.own_masks import bidirectional, shared

FAMILIES = ("big_bird", "bigbird_pegasus")


class BigBirdAttention(modeling_big_bird.BigBirdAttention):
    @property
    def own_options(self) -> dict[str, int]:
        return own_options(self)

    @property
    def layer_idx(self) -> int | None:
        return self.seed

    def is_causal_in(self, model: Any, path: str) -> bool:
        return bool(self.config.is_decoder)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        band_mask: torch.Tensor | None = None,
        from_mask: torch.Tensor | None = None,
        to_mask: torch.Tensor | None = None,
        from_blocked_mask: torch.Tensor | None = None,
        to_blocked_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of an encoder, of a decoder, or from a decoder to the states of an encoder."""
        cross = encoder_hidden_states is not None
        out, weights = attend_by_blocks(
            self,
            hidden_states,
            encoder_attention_mask if cross else attention_mask,
            to_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            output_attentions=output_attentions,
        )
        return self.output(out, hidden_states), weights


class BigBirdPegasusEncoderAttention(modeling_bigbird_pegasus.BigBirdPegasusEncoderAttention):
    is_causal = False

    @property
    def own_options(self) -> dict[str, int]:
        return own_options(self)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        band_mask: torch.Tensor | None = None,
        from_mask: torch.Tensor | None = None,
        to_mask: torch.Tensor | None = None,
        from_blocked_mask: torch.Tensor | None = None,
        to_blocked_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = attend_by_blocks(
            self, hidden_states, attention_mask, to_mask, output_attentions=output_attentions
        )
        return self.output(out), weights


def own_options(module: Any) -> dict[str, int]:
    """Of ``bigbird``: with these it is the pretrained function."""
    if module.config.attention_type != "block_sparse":
        return {}
    return {"block_size": module.config.block_size, "num_random_blocks": module.config.num_random_blocks}


def attend_by_blocks(
    module: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any,
    to_mask: torch.Tensor | None,
    *,
    source: torch.Tensor | None = None,
    cache: Any = None,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention (B, N, heads * D), and its weights, with the projections of the module inside that would attend.

    Args:
        attention_mask: where all tokens are attended to.
        to_mask: (B, 1, 1, N), 1 for real tokens, where blocks are.
        source: the states of an encoder, where keys and values are of these.
    """
    inner, sparse = module.self, module.attention_type == "block_sparse"
    states = hidden_states if source is None else source

    def heads(project: torch.nn.Module, states: torch.Tensor) -> Heads:
        return project(states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)

    def made() -> tuple[Heads, Heads]:
        return heads(inner.key, states), heads(inner.value, states)

    key, value = cached(cache, getattr(inner, "layer_idx", None), source is not None, made)
    if sparse:
        assert to_mask is not None
        drawn = drawn_blocks(inner, hidden_states.shape[1])
        attention_mask = shared(to_mask, "big_bird", lambda: bidirectional(to_mask[:, 0, 0] > 0))
    elif own_options(module) and source is None and not module.config.is_decoder:
        drawn = None  # rows are short
    else:
        drawn = ()
    if drawn != () and isinstance(attention_mask, AttentionMask):
        attention_mask = with_blocks(attention_mask, module, inner, drawn)
    out, weights = attend(
        module,
        heads(inner.query, hidden_states),
        key,
        value,
        attention_mask,
        dropout=0.0 if sparse else inner.dropout.p,
        output_attentions=output_attentions,
    )
    made_inside = out.flatten(2), weights
    for number, hook in list(inner._forward_hooks.items()):
        if number not in inner._forward_hooks_with_kwargs:
            hook(inner, (), made_inside)  # as weights are recorded
    return made_inside


def with_blocks(mask: AttentionMask, module: Any, inner: Any, drawn: tuple[Any, ...] | None) -> AttentionMask:
    """The mask with what the model's own pattern has beside it, once for all layers that draw the same."""
    size, number, scale = module.config.block_size, module.config.num_random_blocks, inner.attention_head_size**-0.5
    blocks = OwnBlocks(size, drawn, number, scale)
    return mask.cached(blocks, lambda: mask._copy(own=OwnPattern(blocks=blocks)))


def drawn_blocks(inner: Any, length: int) -> tuple[Any, ...]:
    """The blocks that the model draws for rows of this length, as it does, for each head or once for all."""
    size, number = inner.block_size, inner.num_random_blocks
    if not inner.training:
        return (((0,) * number,) * (length // size - 2),)
    import numpy as np

    heads, state = inner.num_attention_heads, np.random.get_state()
    np.random.seed(inner.seed)
    try:
        if length in (1024, 3072, 4096):
            longest = inner.max_seqlen
            plans = [
                inner._bigbird_block_rand_mask(longest, longest, size, size, number, last_idx=1024)[
                    : length // size - 2
                ]
                for _ in range(heads)
            ]
        else:
            ends, numbers = inner._get_rand_attn_plan(length, size, number)
            plans = inner._bigbird_block_rand_mask_with_head(length, length, size, size, heads, ends, numbers)
    finally:
        np.random.set_state(state)
    return tuple(tuple(map(tuple, plan.tolist())) for plan in plans)
