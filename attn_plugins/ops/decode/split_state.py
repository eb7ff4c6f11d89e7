"""The state of a module whose heads several attentions share: what each of them keeps of its own heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_plugins.core.decode_state import State


class SplitState(State):
    """States that all take in the same tokens, each of them the keys and values of other heads.

    It holds nothing itself. What is asked of it is asked of all: they are changed together, or, where one of them
    refuses, not at all. After an error between them some have taken in tokens that others have not; ``seen`` is then
    that of the one ahead.

    Args:
        parts: at least one, with the same ``fixed_length``.
    """

    def __init__(self, parts: Sequence[State]):
        super().__init__(parts[0].fixed_length)
        self.parts = list(parts)
        self.supports_fixed_length = all(part.supports_fixed_length for part in parts)
        self.grows = any(part.grows for part in parts)

    @property  # type: ignore[misc]
    def length(self) -> int:
        return max(part.seen for part in self.parts)

    @property
    def seen(self) -> int:
        return self.length

    @property
    def position(self) -> Any:
        return self.parts[0].position + self.parts[0].num_pending

    @property
    def begun(self) -> bool:
        return any(part.begun for part in self.parts)

    def record(self, on: bool) -> None:
        super().record(on)
        for part in self.parts:
            part.record(on)

    def check_crop(self, number: int) -> None:
        for part in self.parts:
            part.check_crop(number)

    def crop(self, number: int) -> None:
        self.check_crop(number)
        for part in self.parts:
            part.crop(number)

    def return_to(self, seen: int) -> None:
        for part in self.parts:
            part.return_to(seen)

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for part in self.parts:
            part.apply(change)

    def to(self, device: torch.device | str | int, *args: Any, **kwargs: Any) -> "SplitState":
        for part in self.parts:
            part.to(device, *args, **kwargs)
        return self

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def check_room(self, number: int) -> None:
        for part in self.parts:
            part.check_room(number)

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of all heads, those of a part after those of another, and without tokens."""
        found = [like for part in self.parts if (like := part.like()) is not None]
        if not found:
            return None
        k, v = (torch.cat([like[side][:, :, :0] for like in found], dim=1) for side in (0, 1))
        return k, v

    def _held(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part._held()]
