from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.neighborhood import Neighborhood
from attn_plugins.ops.softmax.patterns.on_grid import grid_for


@register_attention("neighborhood_2d")
class Neighborhood2dAttention(PatternAttention):
    """Neighbourhood attention (NATTEN): each patch of an image sees the nearest patches, in two dimensions.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over ``kernel_size x kernel_size`` patches around i. At a border
    the square is shifted inwards, so that every patch sees as many. With ``dilation`` d it is the same within each of
    the d x d grids of every d-th row and column. Tokens before the patches (class token, registers) see all and are
    seen by all. A mask of the model's own hides patches within that; images of different sizes in a batch, told by
    padding, are refused, since patches would lie elsewhere than on the grid. In a model the grid is that of the image,
    as its embedding cuts it; where that is not known, tokens are refused that are no grid of the config's size.

    Where a grid has fewer than ``kernel_size`` patches to a side (of a phase, if dilated), they are all seen; NATTEN
    refuses that. An even ``kernel_size`` reaches one patch farther up and left than down and right.

    Nothing is learned: it starts from the pretrained model with a limited view.

    Limit case: equals softmax attention when kernel_size >= height and width, without dilation.
    """

    family = "local"
    cost = "O(N kernel_size^2 D)"
    paper = (
        "Hassani et al. 2023, Neighborhood Attention Transformer, arXiv:2204.07143; "
        "dilated: Hassani and Shi 2022, arXiv:2209.15001"
    )
    variants = "for images"
    when = (
        "For images of high resolution: a patch sees the patches around it on the grid, and CLS and registers "
        "see everything."
    )
    bidirectional = any_mask = position_bias = softcap = sinks = dropout = True
    any_length = False
    limit: ClassVar = {"kernel_size": 7, "num_prefix_tokens": 1}
    examples = ({"kernel_size": 3}, {"kernel_size": 3, "dilation": 2, "num_prefix_tokens": 5})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        kernel_size: int = 7
        """Patches that a patch sees in each direction, itself included."""
        dilation: int = 1
        """Distance between the patches that it sees."""
        num_prefix_tokens: int | None = field(
            default=None, metadata={"settled": lambda prefix: 1 if prefix is None else prefix}
        )
        """Tokens before the patches, such as a class token and registers: 1 for ViT, 5 for DINOv3, 0 for SigLIP. None
        is what the model has."""
        grid_size: tuple[int, int] | None = None
        """(height, width) of the image in patches; None is that of the image that the model is given, as it cuts it."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.kernel_size >= 1, "kernel_size", "an integer from 1 on")
            self.require(self.dilation >= 1, "dilation", "an integer from 1 on")
            self.require((self.num_prefix_tokens or 0) >= 0, "num_prefix_tokens", "None or an integer from 0 on")
            grid = self.grid_size
            self.require(grid is None or (len(grid) == 2 and min(grid) >= 1), "grid_size", "None or (height, width)")

    @property
    def wants_grid(self):
        return self.config.grid_size is None

    def patterns(self, heads, mask, grid_size=None):
        config, grid = self.config, grid_for(self, mask, grid_size, axes=(2,))
        kernel_size, dilation = (config.kernel_size,) * 2, (config.dilation,) * 2
        return [(slice(0, heads), Neighborhood(grid, config.num_prefix_tokens, kernel_size, dilation, (False, False)))]
