from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.axial import Axial
from attn_plugins.ops.softmax.patterns.on_grid import grid_for

AXES = ("time", "height", "width")


@register_attention("axial")
class AxialAttention(PatternAttention):
    """Axial attention: each patch of an image or a video sees those in its row, its column, and its place over time.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the patches j of the spans of i, in one softmax in which each
    counts once. A span of ``axes`` is the patches that lie as i does along all other axes: "width" is its row, "height"
    its column, "time" its place in all frames, "height+width" its frame. By default every axis is a span of its own.
    ``axes=["height+width", "time"]`` shows what the divided space-time attention of TimeSformer does.

    Papers attend along one axis after another, each with a softmax, and with new weights; here one softmax over the
    union keeps a pretrained model usable untrained. ``axes=["width"]`` in some layers and ``axes=["height"]`` in others
    alternates as they do. On an image an axis "time" shows nothing.

    Tokens before the patches (class token, registers) see all and are seen by all. A mask of the model's own hides
    patches within that. In a model the grid is that of the image or video, as its embedding cuts it; where that is not
    known, tokens are refused that are no grid of the config's size.

    Nothing is learned: it starts from the pretrained model with a limited view.

    Limit case: equals softmax attention when a span has all axes, or the grid is one row or column.
    """

    family = "sparse"
    cost = "O(N (height + width + frames) D)"
    paper = (
        "Ho et al. 2019, Axial Attention in Multidimensional Transformers, arXiv:1912.12180; divided space-time: "
        "Bertasius et al. 2021, Is Space-Time Attention All You Need for Video Understanding?, arXiv:2102.05095"
    )
    variants = "for images and video"
    when = "For images and video of high resolution where far patches matter: any two are two layers apart."
    bidirectional = any_mask = position_bias = softcap = sinks = dropout = True
    any_length = False
    limit: ClassVar = {"axes": ("height+width",), "num_prefix_tokens": 1}
    examples = ({}, {"axes": ("width", "time"), "num_prefix_tokens": 5})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        axes: tuple[str, ...] | None = None
        """Along what a patch sees: "time", "height", "width", or several joined by "+". None is each by itself."""
        num_prefix_tokens: int | None = field(
            default=None, metadata={"settled": lambda prefix: 1 if prefix is None else prefix}
        )
        """Tokens before the patches, such as a class token and registers: 1 for ViT, 5 for DINOv3, 0 for VideoMAE. None
        is what the model has."""
        grid_size: tuple[int, ...] | None = None
        """(height, width) of the image or (frames, height, width) of the video in patches; None is that of what the
        model is given, as it cuts it."""

        def __post_init__(self):
            super().__post_init__()
            spans = [set(span.split("+")) for span in (AXES if self.axes is None else self.axes)]
            known = len(spans) > 0 and all(span <= {*AXES} for span in spans)
            apart = not any(a <= b for i, a in enumerate(spans) for j, b in enumerate(spans) if i != j)
            allowed = 'None or a list of "time", "height", "width", or some of these joined by "+", none within another'
            self.require(known and apart, "axes", allowed)
            self.require((self.num_prefix_tokens or 0) >= 0, "num_prefix_tokens", "None or an integer from 0 on")
            grid = self.grid_size
            fits = grid is None or (len(grid) in (2, 3) and min(grid) >= 1)
            self.require(fits, "grid_size", "None, (height, width) or (frames, height, width)")

    @property
    def wants_grid(self):
        return self.config.grid_size is None

    def patterns(self, heads, mask, grid_size=None):
        grid, spans = grid_for(self, mask, grid_size, axes=(2, 3)), []
        number = {axis: place - (3 - len(grid.sides)) for place, axis in enumerate(AXES)}
        for span in self.config.axes or AXES:
            axes = tuple(sorted(number[axis] for axis in span.split("+") if number[axis] >= 0))
            if axes and axes not in spans:
                spans.append(axes)
        spans = [span for span in spans if not any({*span} < {*other} for other in spans)]
        if not spans:
            raise ValueError(f"attention 'axial' got an image; allowed with axes={list(self.config.axes)}: videos")
        return [(slice(0, heads), Axial(grid, self.config.num_prefix_tokens, tuple(spans)))]
