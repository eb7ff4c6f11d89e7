from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.on_grid import grid_for
from attn_plugins.ops.softmax.patterns.windows import Windows


@register_attention("window_2d")
class Window2dAttention(PatternAttention):
    """Window attention: the image is cut into squares, and each patch sees those of its own, and the tokens before.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the patches j with
    ``floor((row_j + shift) / window_size) = floor((row_i + shift) / window_size)`` and the same of columns, and over
    the tokens before the patches (class token, registers), which see all and are seen by all. As in Swin, windows are
    shifted by half their size in every second layer, from the second on, so that borders lie elsewhere; there windows
    at the image's border are cut by it, which is what Swin's cyclic shift and mask come to. ``shift_size=0`` is the
    unshifted form of ViTDet, in which a few layers that keep softmax attention (rules with ``layers``) and the first
    tokens carry information from window to window.

    Papers have no tokens before the patches, and learn a position bias; here the model's own is used, if it has one. A
    mask of the model's own hides patches within that. In a model the grid is that of the image, as its embedding cuts
    it; where that is not known, tokens are refused that are no grid of the config's size.

    Nothing is learned: it starts from the pretrained model with a limited view.

    Limit case: equals softmax attention when window_size >= height and width, without a shift.
    """

    family = "local"
    cost = "O(N window_size^2 D)"
    paper = (
        "Liu et al. 2021, Swin Transformer, arXiv:2103.14030; "
        "Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection, arXiv:2203.16527"
    )
    variants = "for images"
    when = (
        "For images of high resolution: as neighborhood_2d, faster, since patches of a window share their keys, with "
        "borders that hide near patches."
    )
    bidirectional = any_mask = position_bias = softcap = sinks = dropout = True
    any_length = False
    limit: ClassVar = {"window_size": 7, "shift_size": 0, "num_prefix_tokens": 1}
    examples = (
        {"window_size": 3, "shift_size": 0},
        {"window_size": 4, "num_prefix_tokens": 5},
        {"window_size": 5, "shift_size": 2, "num_prefix_tokens": 0},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        window_size: int = 14
        """Patches along each side of a window."""
        shift_size: int | None = None
        """How far windows lie up and left of where they would begin with the image. None is half a window in every
        second layer, and nothing in the others."""
        num_prefix_tokens: int | None = field(
            default=None, metadata={"settled": lambda prefix: 1 if prefix is None else prefix}
        )
        """Tokens before the patches, such as a class token and registers: 1 for ViT, 5 for DINOv3, 0 for SigLIP. None
        is what the model has."""
        grid_size: tuple[int, ...] | None = None
        """(height, width) of the image in patches; None is that of the image that the model is given, as it cuts it."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.window_size >= 1, "window_size", "an integer from 1 on")
            within = self.shift_size is None or 0 <= self.shift_size < self.window_size
            self.require(within, "shift_size", f"None or an integer from 0 to below window_size={self.window_size}")
            self.require((self.num_prefix_tokens or 0) >= 0, "num_prefix_tokens", "None or an integer from 0 on")
            grid = self.grid_size
            self.require(grid is None or (len(grid) == 2 and min(grid) >= 1), "grid_size", "None or (height, width)")

    @property
    def wants_grid(self):
        return self.config.grid_size is None

    def patterns(self, heads, mask, grid_size=None):
        config, grid = self.config, grid_for(self, mask, grid_size, axes=(2,))
        shift = config.shift_size
        if shift is None:
            layer = 0 if self.heads is None else self.heads.layer or 0
            shift = config.window_size // 2 if layer % 2 else 0
        pattern = Windows(grid, config.num_prefix_tokens, (config.window_size,) * 2, (shift,) * 2)
        return [(slice(0, heads), pattern)]
