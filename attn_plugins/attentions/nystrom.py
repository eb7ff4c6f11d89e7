from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.low_rank.nystrom import dense_nystrom_attention, nystrom_attention


@register_attention("nystrom")
class NystromAttention(Attention):
    """Nystromformer: softmax attention interpolated from its values at landmarks, which are means of runs of tokens.

    With landmarks ``q~`` and ``k~``, ``out = softmax(scale q k~^T) Z softmax(scale q~ k^T) v``, where Z is the inverse
    of ``softmax(scale q~ k~^T)``, found by iteration. A convolution over the values of neighbouring tokens may be
    added, one kernel a query head.

    Landmarks are means over a row's real tokens, cut into ``num_landmarks`` runs whose lengths differ by at most one;
    a row with fewer tokens has each as a landmark and no more. So padding and other rows change nothing. In the
    published code lengths must divide, padding is part of the means, and the iteration starts from the largest norm in
    the whole batch; here it is each matrix's own. Rows of the product may have negative weights, and the sum of each is
    1 only where the inverse has converged. Attention dropout isn't applied.

    It learns nothing, or the convolution, which starts from zero: from the method itself on the pretrained queries and
    keys. How near that is to softmax attention depends on how smooth the model's attention is along the text.

    Limit case: equals softmax attention when num_landmarks >= K and num_iterations is enough for the inverse.
    """

    family = "low_rank"
    cost = "O(N num_landmarks D + num_iterations num_landmarks^3)"
    paper = "Xiong et al. 2021, Nystromformer, arXiv:2102.03902, eq. 11 to 14"
    when = "For encoders of a few thousand tokens, without training or with little; landmarks beside the length decide."
    bidirectional = True
    head_weights = ("*",)
    symbolic_length = True
    convex = False
    limit: ClassVar = {"num_landmarks": 50, "num_iterations": 30}
    examples = ({"num_landmarks": 4}, {"num_landmarks": 7, "conv_kernel_size": 3})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        num_landmarks: int = 64
        """Means that stand for the queries and for the keys."""
        num_iterations: int = 6
        """Steps of the iteration for the inverse, up to 40; each costs four products of num_landmarks^3, in float64."""
        conv_kernel_size: int | None = None
        """Tokens that the convolution over the values reaches, an odd number; None adds no convolution."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.num_landmarks >= 1, "num_landmarks", "an integer from 1 on")
            self.require(self.num_iterations >= 1, "num_iterations", "an integer from 1 on")
            # Each step can triple what rounding leaves; after 40, that of float64 would show.
            self.require(self.num_iterations <= 40, "num_iterations", "an integer from 1 to 40")
            size = self.conv_kernel_size
            self.require(size is None or (size >= 1 and size % 2 == 1), "conv_kernel_size", "None or an odd integer")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.conv_weight = None
        if config.conv_kernel_size is not None:
            if heads is None:
                raise ValueError("conv_kernel_size has weights a head and needs the sizes of the heads, got None")
            self.conv_weight = nn.Parameter(torch.empty(heads.num_heads, config.conv_kernel_size))
            self.reset_parameters()

    def reset_parameters(self):
        if self.conv_weight is not None:
            nn.init.zeros_(self.conv_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        return dense_nystrom_attention(q_BHQD, k_BGKD, v_BGKV, mask, scale=scale, **self._method(mask))

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        return nystrom_attention(q_BHQD, k_BGKD, v_BGKV, mask, scale=scale, **self._method(mask))

    def _method(self, mask):
        if mask.q_length != mask.kv_length:
            raise ValueError(
                f"attention 'nystrom' takes the means of all queries, got {mask.q_length} queries and "
                f"{mask.kv_length} keys; allowed: as many queries as keys"
            )
        landmarks, iterations = self.config.num_landmarks, self.config.num_iterations
        return {"num_landmarks": landmarks, "num_iterations": iterations, "conv_HC": self.conv_weight}
