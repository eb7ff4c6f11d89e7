"""All keys and values with what else is known of each token, as a state: for attentions whose gates are of tokens."""

import torch

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask

ROOM = 64
"""Fewest tokens that there is room for."""


class GatedKeys(State):
    """Keys and values of all tokens, and one number a head of each.

    Buffers have room for tokens to come, and double when it is used up. ``tensors``: k (B, G, room, D) and v likewise,
    gate (B, H, room), all by position, and not_padding (B, room).

    Args:
        moving: whether tokens change the keys before them (:meth:`move`). To go back then takes a copy of the state.
    """

    supports_fixed_length = grows = True

    def __init__(self, fixed_length: int | None = None, *, moving: bool = False):
        super().__init__(fixed_length)
        self.moving = moving

    def flush_pending(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The new tokens; unless keys move, none are ever pending, and nothing has to be recorded for a crop."""
        return super().flush_pending(*new) if self.moving else new

    def append(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, gate_BHK: torch.Tensor, mask: AttentionMask) -> None:
        """Take the next tokens in, of which ``mask`` tells whether they are padding."""
        new = k_BGKD.shape[2]
        position = torch.arange(new, device=k_BGKD.device) + self.position
        not_padding_BK = position.new_ones(len(k_BGKD), new, dtype=torch.bool)
        if mask.padding_BK is not None:
            not_padding_BK = mask.padding_BK.index_select(1, position).expand(len(k_BGKD), -1)
        axes = {"k": (2, k_BGKD), "v": (2, v_BGKV), "gate": (2, gate_BHK), "not_padding": (1, not_padding_BK)}
        held = self.tensors["k"].shape[2] if self.tensors else 0
        if self.fixed_length is None and self.length + new > held:
            room = max(ROOM, 2 * held, self.length + new)
        else:
            room = held or self.fixed_length or 0
        for name, (axis, x) in axes.items():
            if room > held:
                made = x.new_zeros(*x.shape[:axis], room, *x.shape[axis + 1 :])
                self.tensors[name] = (
                    torch.cat([self.tensors[name], made.narrow(axis, held, room - held)], axis) if held else made
                )
            self.write(name, axis, position, x)
        self.advance(new)

    def seen_by(self, mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMask]:
        """Keys, values, gates and the mask of all that is kept, for the last queries; with room for tokens to come."""
        if self.fixed_length is None:
            k, v, gate = (self.tensors[name][:, :, : self.length] for name in ("k", "v", "gate"))
            return k, v, gate, mask
        position = torch.arange(self.fixed_length, device=mask.device).unsqueeze(0)
        not_padding_BK = self.tensors["not_padding"] & (position < self.position)
        held = mask.at(position, not_padding_BK, position.new_zeros(1))
        return self.tensors["k"], self.tensors["v"], self.tensors["gate"], held

    def move(self, by_BGDD: torch.Tensor) -> None:
        """Multiply the keys of all tokens so far by a matrix."""
        held = self.tensors["k"]
        moved = held @ by_BGDD.to(held.dtype).mT
        if self.fixed_length is None or moved.requires_grad:
            self.tensors["k"] = moved
        else:
            held.copy_(moved)

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.tensors["k"], self.tensors["v"]) if self.tensors else super().like()

    def _reaches(self, target: int) -> bool:
        return not self.moving

    def _rewind(self, target: int) -> None:
        self.length = target
