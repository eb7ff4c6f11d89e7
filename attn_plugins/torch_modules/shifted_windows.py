"""The adapter of the attention of torchvision's Swin and Swin V2, which multiplies queries with keys itself."""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import dropout, linear, normalize, pad

from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.names import SLOT, slot_of

ACROSS = -100.0
"""Added to scores of patches that lie in one window after a shift, and come from opposite edges of the image."""
MOST = 4.605170185988092
"""The largest logit of the scale of Swin V2: ln 100."""


def attends_in_windows(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class is that of torchvision's attention in shifted windows, of either version."""
    maker = next(base for base in cls.__mro__ if "forward" in vars(base))
    names = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
    return maker.__module__ == "torchvision.models.swin_transformer" and maker.__name__ in names


class ShiftedWindowAttention:
    """What such a module is while it has a slot, which attends within each window of each image."""

    attn_plugin: nn.Module
    cannot: str | None = None
    needs: ClassVar[dict[str, str]] = {"position_bias": "it adds a relative position bias to the scores"}

    def head_shape(self) -> HeadShape:
        """Sizes of its heads."""
        module: Any = self
        return head_sizes.head_shape(module, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's own, with another attention.

        Args:
            x: images (B, rows, columns, channels) of patches.

        Returns:
            the same shape.

        Raises:
            ValueError: the attention cannot honour the call.
        """
        module: Any = self
        batch, rows, columns, _ = x.shape
        (window_rows, window_columns), heads = module.window_size, module.num_heads
        x = pad(x, (0, 0, 0, -columns % window_columns, 0, -rows % window_rows))
        whole = x.shape[1:3]
        # A window that holds the whole image is not shifted.
        shifts = [
            0 if size >= n else shift
            for size, shift, n in zip(module.window_size, module.shift_size, whole, strict=True)
        ]
        back = [-shift for shift in shifts]
        windows_WNC = self._cut(torch.roll(x, back, dims=(1, 2)) if any(shifts) else x)
        count, length, _ = windows_WNC.shape
        bias = module.get_relative_position_bias()
        if any(shifts):
            regions_WN = self._cut(self._regions(whole, shifts, x.device)).squeeze(2)
            apart = regions_WN.unsqueeze(1) != regions_WN.unsqueeze(2)
            bias = bias + (ACROSS * apart.to(bias.dtype)).repeat(batch, 1, 1).unsqueeze(1)
        query, key, value = self._project(windows_WNC).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scale = query.shape[-1] ** -0.5
        if hasattr(module, "logit_scale"):  # Swin V2: cosines, with a scale of each head
            query = normalize(query, dim=-1) * module.logit_scale.clamp(max=MOST).exp()
            key, scale = normalize(key, dim=-1), 1.0
        slot, attention = module._modules[SLOT], slot_of(module)
        assert attention is not None
        out_WNHV, _ = slot(
            query,
            key,
            value,
            mask=AttentionMask(count, length, length, causal=False, device=x.device),
            scale=scale,
            dropout=module.attention_dropout if module.training else 0.0,
            position_bias=bias,
            hidden=windows_WNC if attention.wants_hidden else None,
        )
        out = dropout(module.proj(out_WNHV.flatten(2)), p=module.dropout, training=module.training)
        out = out.view(batch, whole[0] // window_rows, -1, window_rows, window_columns, out.shape[-1])
        out = out.transpose(2, 3).reshape(batch, *whole, -1)
        out = torch.roll(out, shifts, dims=(1, 2)) if any(shifts) else out
        return out[:, :rows, :columns].contiguous()

    def _cut(self, x_BRCE: torch.Tensor) -> torch.Tensor:
        """The windows (B * windows, patches, E) of images (B, rows, columns, E)."""
        module: Any = self
        rows, columns = module.window_size
        x = x_BRCE.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        return x.reshape(-1, rows * columns, x_BRCE.shape[-1])

    def _regions(self, whole: Any, shifts: list[int], device: torch.device) -> torch.Tensor:
        """Numbers (1, rows, columns, 1) of the parts of a shifted image, patches of which see none of another part."""
        module: Any = self
        parts = []
        for n, size, shift in zip(whole, module.window_size, shifts, strict=True):
            place = torch.arange(n, device=device)
            parts.append((place >= n - size).long() + (place >= n - shift) if shift else torch.zeros_like(place))
        return (3 * parts[0].unsqueeze(1) + parts[1]).view(1, *whole, 1)

    def _project(self, windows_WNC: torch.Tensor) -> torch.Tensor:
        module: Any = self
        bias = module.qkv.bias
        if bias is None or not hasattr(module, "logit_scale"):
            return module.qkv(windows_WNC)
        query, key, value = bias.chunk(3)  # Swin V2: keys have no bias, whatever the layer holds
        return linear(windows_WNC, module.qkv.weight, torch.cat([query, torch.zeros_like(key), value]))
