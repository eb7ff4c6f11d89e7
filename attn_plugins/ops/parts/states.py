"""What the parts before this one leave behind: sums that are carried along the processes.

In as many rounds as the number of parts has bits, not in as many as there are parts: each process combines what it has
with what the one 1, 2, 4, ... before it has.
"""

import torch

from attn_plugins.core.part import Part


def carried(part: Part, added: torch.Tensor) -> torch.Tensor:
    """Sum over the parts before of what each adds, as far back as the text before this part goes.

    Args:
        added: (B, ...), what this part adds for the text that it ends with, in the shape that all parts have.

    Returns:
        of that shape, zeros in the first part. Sent: :func:`rounds` times the size of ``added``, at most.
    """
    total = part.exchange.shifted(added, 1)
    for parts in _steps(part):
        more, same = part.exchange.shifted(total, parts), part.goes_on(parts)
        total = total + (more if same is None else more * same.view(-1, *[1] * (more.ndim - 1)))
    return total


def carried_by(part: Part, by: torch.Tensor, added: torch.Tensor, *, matrices: bool) -> torch.Tensor:
    """The state S before this part, where each part makes ``by S + added`` of the state before it, from zeros on.

    Args:
        by: (B or 1, G, F or 1, 1) factors, or (B, G, F, F) matrices.
        added: (B, G, F, V).
    """
    times = torch.matmul if matrices else torch.mul
    by, state = part.exchange.shifted(by, 1), part.exchange.shifted(added, 1)
    for parts in _steps(part):
        before, state_before = part.exchange.shifted(by, parts), part.exchange.shifted(state, parts)
        by, state = times(by, before), times(by, state_before) + state
    return state


def _steps(part: Part) -> list[int]:
    return [1 << bit for bit in range((part.exchange.number - 2).bit_length())] if part.exchange.number > 1 else []


def rounds(number: int) -> int:
    """How often a process sends its state on, at most, where there are so many parts."""
    return 0 if number < 2 else 1 + (number - 2).bit_length()


def of_last_text(part: Part, real_BT: torch.Tensor | None) -> torch.Tensor | None:
    """Which of this part's tokens are of the text that it ends with, and real: what :func:`carried` is of.

    Args:
        real_BT: which are no padding, or None where all are.
    """
    if part.mask.segments_BK is None:
        return real_BT
    starts_BT = part.own(part.mask.starts_BK())
    assert starts_BT is not None
    last_BT = starts_BT == starts_BT[:, -1:]
    return last_BT if real_BT is None else real_BT & last_BT


def of_text_before(part: Part, state: torch.Tensor) -> torch.Tensor:
    """The state (B, ...) that came with the text before this part, where that goes on; zeros where another begins."""
    goes_on = part.goes_on()
    return state if goes_on is None else state * goes_on.view(-1, *[1] * (state.ndim - 1))
