"""The layer of a cache that holds the state of an attention in place of all keys and values."""

import weakref
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from attn_plugins.core.attention import Attention
from attn_plugins.core.decode_state import State
from attn_plugins.hf.call import innermost
from attn_plugins.hf.under_way import thread


class StateLayer(CacheLayerMixin):
    """One layer of a cache, with the state of the attention that it was made for."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, state: State, slot: Attention, max_length: int = -1, replaced: CacheLayerMixin | None = None):
        super().__init__()
        self.state, self.max_length, self.replaced = state, max_length, replaced
        self.first_tokens: tuple[weakref.ref, weakref.ref] | None = None
        """The first keys and values, for as long as the module that brought them holds them."""
        self.attention = rule_of(slot)
        """Name, options and backend, which have to be the same in every call."""
        self.owner = description_of(slot)
        """The same, for messages."""
        self.is_compileable = state.fixed_length is not None
        self.is_sliding = getattr(replaced, "is_sliding", False)
        """As the layer in whose place it is: models size their masks by the first layer of a kind, for all of them."""

    def __repr__(self) -> str:
        return f"StateLayer({self.owner}, {self.state.seen} tokens, {self.num_bytes} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "first_tokens": None}

    @property
    def num_bytes(self) -> int:
        return self.state.num_bytes

    @property
    def is_initialized(self) -> bool:
        return self.state.begun

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """The base class sets it; a state knows by itself."""

    @property
    def keys(self) -> torch.Tensor | None:
        """No keys, in the shapes that they would have: some models take caches apart row by row (Whisper)."""
        like = self.state.like()
        return None if like is None else like[0][:, :, :0]

    @keys.setter
    def keys(self, value: Any) -> None:
        """The base class sets it; a state has its own tensors."""

    @property
    def values(self) -> torch.Tensor | None:
        """As ``keys``."""
        like = self.state.like()
        return None if like is None else like[1][:, :, :0]

    @values.setter
    def values(self, value: Any) -> None:
        """As for ``keys``."""

    @property
    def record_past(self) -> bool:
        return self.state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.record(value)

    def activate_past_recording(self) -> None:
        self.state.record(True)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the state makes its tensors when the first tokens come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are; the attention takes them in."""
        call = thread.notes.call
        if call is not None and call.exported:
            call = innermost()
        if call is None or call.state is not self.state or not call.awaiting_update:
            raise ValueError(
                f"this layer of the cache holds the state of {self.owner}, which the module that is to use it does not "
                "have; use a new cache"
            )
        call.awaiting_update = False
        # A state of fixed length is in place of a static layer, and a compiled step is not to ask for its number.
        begun = self.state.fixed_length is not None or self.state.known_length or self.state.begun
        if not begun and not torch.compiler.is_compiling():
            self.first_tokens = weakref.ref(key_states), weakref.ref(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the layer in whose place it is: other modules' keys lie in layers of its kind."""
        if self.is_sliding and self.replaced is not None:
            for counter in ("cumulative_length", "cumulative_length_int"):
                if isinstance(getattr(self.replaced, counter, None), int):
                    setattr(self.replaced, counter, self.state.seen)
            return self.replaced.get_mask_sizes(query_length)
        return (self.state.seen + query_length if self.max_length < 0 else self.max_length), 0

    def get_seq_length(self) -> Any:
        """As a static layer's: a tensor, which a compiled step takes for any number; a copy, which stays as it is."""
        if self.state.fixed_length is None or not self.is_initialized:
            return self.state.seen
        return self.state.position + self.state.num_pending

    def get_max_length(self) -> int:
        return self.max_length

    def offload(self) -> None:
        """Move what is held to the CPU; it comes back with the next tokens."""
        self.state.apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the state comes back when it is used."""

    def reset(self) -> None:
        self.state.reset()
        self.first_tokens = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.apply(lambda tensor: tensor[indices.to(tensor.device)])

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise a ValueError unless :meth:`crop` can do this; nothing changes."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}); allowed: a negative number, of tokens to remove")
        self.state.check_crop(-int(tokens_to_remove))  # transformers 5.17 counts the tokens of a draft in a tensor

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        self.state.crop(-int(tokens_to_remove))
        self.first_tokens = None


def rule_of(slot: Attention) -> tuple[Any, ...]:
    """Name, options and backend of an attention, by which its state is known; compared at every token."""
    return slot.name, slot.config, slot.backend


def description_of(slot: Attention) -> str:
    return f"{slot.name}({slot.extra_repr()})"
