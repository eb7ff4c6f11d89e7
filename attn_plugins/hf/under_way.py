"""What is under way in a thread: the notes that hooks around models and modules leave for what they call.

Threads may share a model. All notes of a thread are in one object, so that an attention, which is called in every layer
for every token, sees by a look at it that there is nothing unusual about its call.
"""

import threading
from typing import Any


class UnderWay:
    """The notes of one thread. Each is written by the file that is named beside it, and read through that too."""

    call: Any = None
    """The innermost call of a swapped module: ``hf/call.py``."""
    asking: int | None = None
    """Identity of the outermost model that was asked for attention weights: ``hf/recording.py``."""
    asking_exported = False
    """Whether an export records that model: one that fails runs no hook at the end."""
    observers: tuple[Any, ...] = ()
    """Who sees the calls of some modules, the innermost last: ``hf/observe.py``."""
    packing: Any = None
    """What the innermost model was told of packed texts: ``hf/masks/packing.py``."""
    structure: Any = None
    """The structure that a model was given: ``hf/structures.py``."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.notes = UnderWay()


thread = _Thread()
"""``thread.notes`` are those of the thread that asks.

An attribute of a thread's own object, not of this one, is what torch.compile keeps over the breaks of its graphs."""
