from dataclasses import dataclass

import torch

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.reference import dense_attention, expand_heads
from attn_plugins.ops.softmax.patterns.band import BlockBand
from attn_plugins.ops.softmax.tiles import dense_pattern, tiled_attention


@register_attention("shifted_block")
class ShiftedBlockAttention(Attention):
    """LongLoRA's S2 attention: blocks in half of the heads, blocks shifted by half a block in the others.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that are in the query's
    group: ``floor(j / group_size) == floor(i / group_size)`` in the first half of the heads, and the same of
    ``j + group_size // 2`` and ``i + group_size // 2`` in the second half. Positions count from the first real token of
    a row or packed segment. Information passes from group to group through the heads that are shifted.

    Deviations from the published code: the shifted heads' first group is half a group, where the code rolls the
    sequence around, so that its first tokens see the last ones; ``group_size`` is a number of tokens (2048 in the
    paper's training on 8192, ``group_size_ratio`` 1/4), since with a ratio each generated token would move the groups.
    The paper trains with it and decodes with full attention: give the trained model no flag for that.

    Limit case: none, the second half of the heads splits every group.
    """

    family = "local"
    cost = "O(N group_size D)"
    paper = "Chen et al. 2023, LongLoRA, arXiv:2309.12307"
    when = "For fine-tuning to a longer context at little cost, going back to full attention afterwards."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = True
    heads_alike = False
    examples = ({"group_size": 6}, {"group_size": 5})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        group_size: int = 512
        """Tokens of a group."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.group_size >= 2, "group_size", "an integer from 2 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        half = q_BHQD.shape[1] // 2
        visible = [dense_pattern(mask, pattern) for pattern in self._patterns()]
        heads = (half, q_BHQD.shape[1] - half)
        both = torch.cat([seen.expand(-1, n, -1, -1) for seen, n in zip(visible, heads, strict=True)], dim=1)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, both, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, position_bias=None, sinks=None, **options):
        heads, groups = q_BHQD.shape[1], k_BGKD.shape[1]
        if groups % 2 and groups > 1:
            # The query heads that share the middle one are in both halves.
            k_BGKD, v_BGKV, groups = expand_heads(k_BGKD, heads), expand_heads(v_BGKV, heads), heads
        one = slice(None)
        shares = (one, one) if groups == 1 else (slice(groups // 2), slice(groups // 2, None))
        outs = []
        for half, share, pattern in zip(
            (slice(heads // 2), slice(heads // 2, None)), shares, self._patterns(), strict=True
        ):
            q, k, v = q_BHQD[:, half], k_BGKD[:, share], v_BGKV[:, share]
            if q.shape[1]:
                outs.append(
                    tiled_attention(
                        q, k, v, mask, pattern,
                        position_bias=_of_heads(position_bias, half),
                        sinks=None if sinks is None else sinks[half],
                        **options,
                    )
                )  # fmt: skip
        return torch.cat(outs, dim=1)

    def _patterns(self) -> tuple[BlockBand, BlockBand]:
        size = self.config.group_size
        return BlockBand(size), BlockBand(size, shift=size // 2)


def _of_heads(position_bias: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    if position_bias is None or position_bias.ndim < 3 or position_bias.shape[-3] == 1:
        return position_bias
    return position_bias[..., heads, :, :]
