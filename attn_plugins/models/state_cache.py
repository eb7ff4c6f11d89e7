"""What a recurrent decoder keeps of the tokens that it has read, as a layer of transformers' caches."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class RecurrentStateLayer(CacheLayerMixin):
    """The state after the last token, of a constant size, and the projected states of the encoder.

    All tensors have the batch first, so that beams are reordered and rows are repeated as in any layer of a cache.
    """

    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.keys: torch.Tensor | None = None
        """(B, H, K, D) of the encoder's states; None without attention."""
        self.values: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None
        """(B, layers, size)."""
        self.cell: torch.Tensor | None = None
        """(B, layers, size) of an LSTM."""
        self.fed: torch.Tensor | None = None
        """(B, size): what the next step reads beside its token, with input feeding."""
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the decoder sets what there is."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("this layer of the cache holds the state of a recurrent decoder; use a new cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.hidden = self.cell = self.fed = None
        self.seen, self.is_initialized = 0, False

    def offload(self) -> None:
        """Nothing to do: a state is small, and every step reads all of it."""

    def prefetch(self) -> None:
        """As ``offload``."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raise a ValueError unless there is nothing to remove: what a state was before is not kept."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}) of the state of a recurrent decoder, which cannot go back; generate without "
                "an assistant, or begin a new cache"
            )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def _apply(self, change: Any) -> None:
        for name in ("keys", "values", "hidden", "cell", "fed"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, change(held))


def state_layer(cache: Cache) -> RecurrentStateLayer:
    """The layer of a cache that holds the state; it takes the place of an empty one.

    Raises:
        ValueError: the cache holds keys of another model.
    """
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    if not layers:
        layers.append(RecurrentStateLayer())
    if not isinstance(layers[0], RecurrentStateLayer):
        if int(layers[0].get_seq_length()):
            raise ValueError("the cache holds keys and values of another model; a recurrent decoder needs a new one")
        layers[0] = RecurrentStateLayer()
    return layers[0]
