"""Decode state: what an attention keeps of past tokens where that is less than all of their keys and values.

A state is tensors and a count, and knows no weights: it can be copied, saved, reordered and cut like any cache.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_plugins.core.mask import AttentionMask


class Moment(NamedTuple):
    """A snapshot of a state before a call, and the keys and values of the call."""

    before: "State"
    brought: tuple[torch.Tensor, ...]
    """As :attr:`State.pending`."""


class State:
    """Base of the states. A subclass adds what its attention reads and writes in ``tensors``.

    ``length`` counts the tokens that ``tensors`` stand for; ``position`` is the same, for what is computed with it, and
    a tensor where shapes are fixed, so that the step of one token is compiled once for all of them. Tokens that came
    back from a rollback wait as keys and values, with their hidden states where the attention wants these, and are
    flushed with the next ones.

    Args:
        fixed_length: the most tokens that will ever come, where buffers have to keep their shapes and addresses from
            the first call on (a static cache); None where not.
    """

    supports_fixed_length = False
    """Whether ``fixed_length`` is honoured: shapes don't depend on the number of tokens seen."""
    grows = False
    """Whether it takes more memory the more tokens it has seen, without end, unless ``fixed_length`` is set."""

    def __init__(self, fixed_length: int | None = None):
        self.fixed_length = fixed_length
        self.known_length: int | None = 0
        """As :attr:`length`, None after a compiled step, until that is asked for."""
        self._counter = None if fixed_length is None else torch.zeros((), dtype=torch.long)
        self.tensors: dict[str, torch.Tensor] = {}
        """By name, all with the batch as their first dimension."""
        self.pending: tuple[torch.Tensor, ...] | None = None
        """Keys and values not yet taken in, and their hidden states (B, 1, K, E) where the attention wants these."""
        self.recording = False
        """Whether to keep a snapshot before every call, for :meth:`crop`."""
        self.history: list[Moment] = []

    @property
    def length(self) -> int:
        """Tokens that ``tensors`` stand for. Not to be asked in a compiled step, which holds for any number of them."""
        if self.known_length is None:
            assert self._counter is not None
            self.known_length = int(self._counter)
        return self.known_length

    @length.setter
    def length(self, length: int) -> None:
        self.known_length = length
        if self._counter is not None:
            self._counter.fill_(length)

    @property
    def position(self) -> Any:
        """Where the next token goes: ``length``, as a tensor that changes in place where there is ``fixed_length``."""
        return self.length if self._counter is None else self._counter

    def advance(self, number: int) -> None:
        """Add to the number of tokens that ``tensors`` stand for."""
        if self._counter is None:
            self.known_length = self.length + number
        elif not torch.compiler.is_compiling():
            self.length += number
        else:
            self._counter.add_(number)
            self.known_length = None

    @property
    def begun(self) -> bool:
        """Whether any token has come; known without their number where that is fixed, as a compiled step has none."""
        return self.seen > 0 if self.fixed_length is None else bool(self.tensors)

    @property
    def seen(self) -> int:
        """Tokens seen, pending ones counted."""
        if self.pending is None and self.known_length is not None:
            return self.known_length
        return self.length + self.num_pending

    @property
    def num_pending(self) -> int:
        """Tokens that ``tensors`` do not stand for yet."""
        return 0 if self.pending is None else self.pending[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that the state holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held())

    def record(self, on: bool) -> None:
        """Begin to keep a snapshot before every call, or end it and drop those that there are."""
        self.recording = on
        if not on:
            self.history = []

    def flush_pending(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Prepend the pending tokens to a call's, which come as :attr:`pending` holds them; snapshot if recording.

        Returns:
            the pending tokens followed by the new ones.
        """
        if self.pending is not None:
            new = tuple(torch.cat(both, dim=2) for both in zip(self.pending, new, strict=True))
        if self.recording:
            before = copy.copy(self)
            before.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
            before.pending, before.history = None, []
            before._counter = None if self._counter is None else self._counter.clone()
            self.history.append(Moment(before, new))
        self.pending = None
        return new

    def check_crop(self, number: int) -> None:
        """Raise a ValueError unless :meth:`crop` can do this; nothing changes."""
        target = self.seen - number
        if not 0 <= number <= self.seen:
            raise ValueError(f"cannot remove {number} tokens of {self.seen}; allowed: 0 to {self.seen}")
        if not number or not target or (self.pending is not None and target >= self.length) or self._reaches(target):
            return
        if not any(moment.before.length <= target for moment in self.history):
            raise ValueError(
                f"the cache cannot go back {number} tokens: its state holds no single tokens to remove; call "
                "cache.activate_past_recording() before the tokens that may have to be removed"
            )

    def crop(self, number: int) -> None:
        """Remove the last ``number`` tokens, and all snapshots.

        Raises:
            ValueError: what came before them is no longer known. Nothing has changed then.
        """
        self.check_crop(number)
        target = self.seen - number
        if number and not target:
            self.reset()
        elif number and self.pending is not None and target >= self.length:
            kept = target - self.length
            self.pending = tuple(x[:, :, :kept] for x in self.pending) if kept else None
        elif number and self._reaches(target):
            self._rewind(target)
            self.pending = None
        elif number:
            moment = [moment for moment in self.history if moment.before.length <= target][-1]
            kept = target - moment.before.length
            vars(self).update(vars(moment.before))
            self.pending = tuple(x[:, :, :kept] for x in moment.brought) if kept else None
        self.history = []

    def return_to(self, seen: int) -> None:
        """Remove what came after the first ``seen`` tokens, where it can; else nothing changes."""
        grown = self.seen - seen
        try:
            self.check_crop(grown)
        except ValueError:
            return
        if grown:
            self.crop(grown)

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held by ``change`` of it: another order of rows, another device."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        if self.pending is not None:
            self.pending = tuple(map(change, self.pending))
        for moment in self.history:
            moment.before.apply(change)
        self.history = [Moment(m.before, tuple(map(change, m.brought))) for m in self.history]

    def to(self, device: torch.device | str | int, *args: Any, **kwargs: Any) -> "State":
        """Move what is held to a device, if it is not there.

        Returns:
            itself, as hooks that move the arguments of a module hand on what they get from here (accelerate's).
        """
        device = torch.device(device)
        if self.pending is None and not self.history and self._counter is None:
            held = next(iter(self.tensors.values()), None)  # which is where all of them are: they move together
            if held is not None and held.device == device:
                return self
        if any(tensor.device != device for tensor in self._held()):
            self.apply(lambda tensor: tensor.to(device))
        if self._counter is not None and self._counter.device != device:
            self._counter = self._counter.to(device)
        return self

    def reset(self) -> None:
        """Go back to the state before the first token."""
        self.length, self.pending, self.history = 0, None, []
        if self.fixed_length is None:
            self.tensors = {}
        for tensor in self.tensors.values():
            tensor.zero_()

    def write(self, name: str, axis: int, index: torch.Tensor, x: torch.Tensor) -> None:
        """Write ``x`` at these indices of a tensor, in place unless autograd needs it unchanged."""
        held = self.tensors[name]
        if x.requires_grad or held.requires_grad:
            self.tensors[name] = held.index_copy(axis, index, x)
        else:
            held.index_copy_(axis, index, x)

    def find_starts(self, start_B: torch.Tensor, mask: AttentionMask, number: int) -> bool:
        """Set the first position that is not padding of rows whose start is still -1.

        Args:
            number: of tokens that came.

        Returns:
            whether every row has a start, as far as a compiled step may know.
        """
        if mask.padding_BK is None:
            found_B = torch.zeros_like(start_B)
        else:
            padding_BK = mask.padding_BK.expand(len(start_B), -1)
            here = torch.arange(padding_BK.shape[1], device=padding_BK.device) < self.position + number
            padding_BK = padding_BK & here
            found_B = torch.where(padding_BK.any(dim=1), padding_BK.long().argmax(dim=1), -1)
        start_B.copy_(torch.where(start_B < 0, found_B, start_B))
        return mask.padding_BK is None or (not torch.compiler.is_compiling() and bool((start_B >= 0).all()))

    def check(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        mask: AttentionMask,
        *,
        need_weights: bool = False,
    ) -> None:
        """Raise a ValueError unless these tokens can continue the state; nothing changes."""
        if need_weights:
            raise ValueError(
                "the weights of tokens that a cache no longer holds cannot be returned; ask for them from the first "
                "token on, with output_attentions=True in every call, or call the model without a cache "
                "(use_cache=False)"
            )
        known = self.like()
        if known is not None:
            (k_rows, k_heads, _, k_size), (v_rows, v_heads, _, v_size) = k_BGKD.shape, v_BGKV.shape
            (k_rows_held, k_heads_held, _, k_size_held), (v_rows_held, v_heads_held, _, v_size_held) = (
                known[0].shape,
                known[1].shape,
            )
            got = (k_rows, k_heads, k_size), (v_rows, v_heads, v_size)
            want = (k_rows_held, k_heads_held, k_size_held), (v_rows_held, v_heads_held, v_size_held)
            if got != want:
                raise ValueError(
                    f"the cache holds keys and values of (rows, heads, size) = {want[0]} and {want[1]}, "
                    f"got {got[0]} and {got[1]}; it belongs to another model or batch"
                )
        if self.fixed_length is not None:
            self.check_room(q_BHQD.shape[2])
        if not mask.causal:
            raise ValueError(f"a cache needs a causal mask, got {mask}")
        if mask.segments_BK is not None:
            raise ValueError("packed sequences cannot be continued from a cache; give each its own row")

    def check_room(self, number: int) -> None:
        """Raise a ValueError where there is no room for as many tokens; in a compiled step, an error of torch."""
        if self.fixed_length is not None and torch.compiler.is_compiling():
            assert self._counter is not None
            room = self._counter + self.num_pending + number <= self.fixed_length
            torch._assert_async(
                room, "the static cache has no room for more tokens; make it with a larger max_cache_len"
            )
        elif self.fixed_length is not None and self.seen + number > self.fixed_length:
            raise ValueError(
                f"the static cache has room for {self.fixed_length} tokens, {self.seen} are in it "
                f"and {number} more came; make it with a larger max_cache_len"
            )

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A key and a value tensor of the shapes that have to come, None if any may; the length does not matter."""
        return None if self.pending is None else (self.pending[0], self.pending[1])

    def _reaches(self, target: int) -> bool:
        """Whether it can go back to ``target`` tokens, one at least, without what was recorded."""
        return False

    def _rewind(self, target: int) -> None:
        """Go back to ``target`` tokens, which it reaches."""
        raise NotImplementedError(f"{type(self).__name__} reaches tokens and has nothing that goes back to them")

    def _held(self) -> list[torch.Tensor]:
        moments = [t for m in self.history for t in (*m.before.tensors.values(), *m.brought)]
        return [*self.tensors.values(), *(self.pending or ()), *moments]
