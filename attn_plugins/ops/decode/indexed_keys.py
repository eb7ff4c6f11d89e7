"""All keys and values, and a small key of each token by which an index chooses among them."""

import torch

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask


class IndexedKeys(State):
    """Keys, values and index keys of all tokens.

    ``tensors``: k (B, G, K, D), v (B, G, K, V) and index (B, 1, K, I), by position; of the length of the text, or of
    ``fixed_length`` with zeros after the last token. Index keys are of the weights of the call that brought them:
    training changes these, so that a cache made before is not to be used after.
    """

    supports_fixed_length = grows = True

    def append(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, index_B1KI: torch.Tensor) -> None:
        """Take the next tokens in."""
        new, given = k_BGKD.shape[2], {"k": k_BGKD, "v": v_BGKV, "index": index_B1KI}
        if self.fixed_length is None:
            # A copy of the first ones too: they may be a view of the keys of all heads.
            self.tensors = {
                name: torch.cat([self.tensors.get(name, x[:, :, :0]), x], dim=2) for name, x in given.items()
            }
        else:
            if not self.tensors:
                self.tensors = {
                    name: x.new_zeros(*x.shape[:2], self.fixed_length, x.shape[3]) for name, x in given.items()
                }
            position = torch.arange(new, device=k_BGKD.device) + self.position
            for name, x in given.items():
                self.write(name, 2, position, x)
        self.advance(new)

    def visible(self, queries: int, mask: AttentionMask) -> torch.Tensor:
        """(B or 1, 1, Q, K): which of the keys held the last ``queries`` tokens see, by causality and padding.

        Args:
            mask: of all tokens, which may end with some that come later.
        """
        held = self.tensors["k"]
        key = torch.arange(held.shape[2], device=held.device)
        seen = key <= torch.arange(queries, device=held.device).unsqueeze(1) + (self.position - queries)
        if mask.padding_BK is None:
            return seen[None, None]
        padding_BK = mask.padding_BK[:, : len(key)]
        padding_BK = torch.nn.functional.pad(padding_BK, (0, len(key) - padding_BK.shape[1]))
        return seen & padding_BK[:, None, None]

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
