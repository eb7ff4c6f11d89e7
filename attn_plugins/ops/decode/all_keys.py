"""All keys and values, as a state: for heads whose attention keeps no state, beside others whose attention does."""

import torch

from attn_plugins.core.decode_state import State


class AllKeys(State):
    """Keys and values of all tokens.

    ``tensors``: k (B, G, K, D) and v (B, G, K, V), by position; of the length of the text, or of ``fixed_length`` with
    zeros after the last token.
    """

    supports_fixed_length = grows = True

    def append(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor) -> None:
        """Take the next tokens in."""
        new = k_BGKD.shape[2]
        self.to(k_BGKD.device)  # it may have been offloaded
        if self.fixed_length is None:
            # A copy of the first ones too: they may be a view of the keys of all heads.
            self.tensors = {
                name: torch.cat([self.tensors.get(name, x[:, :, :0]), x], dim=2)
                for name, x in (("k", k_BGKD), ("v", v_BGKV))
            }
        else:
            if not self.tensors:
                self.tensors = {
                    name: x.new_zeros(*x.shape[:2], self.fixed_length, x.shape[3])
                    for name, x in (("k", k_BGKD), ("v", v_BGKV))
                }
            position = torch.arange(new, device=k_BGKD.device) + self.position
            self.write("k", 2, position, k_BGKD)
            self.write("v", 2, position, v_BGKV)
        self.advance(new)

    def flush_pending(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The new tokens: none are ever pending, and nothing has to be recorded for a crop."""
        return new

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.tensors["k"], self.tensors["v"]) if self.tensors else None

    def _reaches(self, target: int) -> bool:
        return True

    def _rewind(self, target: int) -> None:
        self.length = target
        if self.fixed_length is None:
            self.tensors = {name: tensor[:, :, :target] for name, tensor in self.tensors.items()}
