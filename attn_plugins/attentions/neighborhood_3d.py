from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.neighborhood import Neighborhood
from attn_plugins.ops.softmax.patterns.on_grid import grid_for


@register_attention("neighborhood_3d")
class Neighborhood3dAttention(PatternAttention):
    """Neighbourhood attention (NATTEN) for video: each patch sees the nearest patches, in time and on the image.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the ``kernel_size[0] x kernel_size[1] x kernel_size[2]``
    patches around i, in frames, rows and columns. At a border the box is shifted inwards, so that every patch sees as
    many. With ``dilation`` it is the same within each of the grids of every d-th frame, row and column. With
    ``causal_time`` a patch sees its own frame and those before it, ``kernel_size[0]`` in all and fewer at the
    beginning, as NATTEN's ``is_causal`` does along that axis.

    Tokens before the patches (class token, registers) see all and are seen by all, also with ``causal_time``: what
    they gather of later frames comes to earlier ones a layer on. A mask of the model's own hides patches within that.
    In a model the grid is that of the video, as its embedding cuts it: tubelets of several frames count as one. An
    image is a video of one frame. Where an axis has fewer patches than the kernel (of a phase, if dilated), they are
    all seen; NATTEN refuses that. An even size reaches one patch farther to the beginning of an axis than to its end.

    Nothing is learned: it starts from the pretrained model with a limited view.

    Limit case: equals softmax attention when no side of the grid exceeds that of the kernel, without dilation and
    causal_time.
    """

    family = "local"
    cost = "O(N kernel_size[0] kernel_size[1] kernel_size[2] D)"
    paper = (
        "Hassani et al. 2023, Neighborhood Attention Transformer, arXiv:2204.07143, whose 3-D form is NATTEN's; "
        "causal: Hassani et al. 2024, Faster Neighborhood Attention, arXiv:2403.04690"
    )
    variants = "for video"
    when = "For video: a patch sees the patches around it, in its own frame and those beside it."
    bidirectional = any_mask = position_bias = softcap = sinks = dropout = True
    any_length = False
    limit: ClassVar = {"kernel_size": (1, 7, 7), "num_prefix_tokens": 1, "grid_size": (1, 7, 7)}
    examples = (
        {"kernel_size": (2, 3, 3)},
        {"kernel_size": (2, 3, 2), "dilation": (1, 2, 1), "causal_time": True},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        kernel_size: tuple[int, ...] = (3, 7, 7)
        """Patches that a patch sees in each direction, itself included: (frames, height, width)."""
        dilation: tuple[int, ...] = (1, 1, 1)
        """Distances between the patches that it sees: (frames, height, width)."""
        causal_time: bool = False
        """Whether it sees no frame after its own."""
        num_prefix_tokens: int | None = field(
            default=None, metadata={"settled": lambda prefix: 1 if prefix is None else prefix}
        )
        """Tokens before the patches, such as a class token: 1 for ViViT, 0 for VideoMAE and V-JEPA 2. None is what the
        model has."""
        grid_size: tuple[int, ...] | None = None
        """(frames, height, width) of the video in patches, or (height, width) of an image; None is that of what the
        model is given, as it cuts it."""

        def __post_init__(self):
            super().__post_init__()
            for name in ("kernel_size", "dilation"):
                sizes = getattr(self, name)
                self.require(len(sizes) == 3 and min(sizes) >= 1, name, "(frames, height, width), each from 1 on")
            self.require((self.num_prefix_tokens or 0) >= 0, "num_prefix_tokens", "None or an integer from 0 on")
            grid = self.grid_size
            fits = grid is None or (len(grid) in (2, 3) and min(grid) >= 1)
            self.require(fits, "grid_size", "None, (height, width) or (frames, height, width)")

    @property
    def wants_grid(self):
        return self.config.grid_size is None

    def patterns(self, heads, mask, grid_size=None):
        config, grid = self.config, grid_for(self, mask, grid_size, axes=(3,))
        causal = (config.causal_time, False, False)
        pattern = Neighborhood(grid, config.num_prefix_tokens, config.kernel_size, config.dilation, causal)
        return [(slice(0, heads), pattern)]
