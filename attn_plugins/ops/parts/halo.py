"""Keys and values of other parts that a part's queries see: those around it, and the first of the text before it.

They are put together as [first keys | keys before | own keys | keys after]. A place whose key is nowhere (beyond the
ends of the row, or among the first where it is also one of those before) holds zeros.
"""

from typing import NamedTuple

import torch

from attn_plugins.core.part import Part
from attn_plugins.ops.parts.states import carried


class Reach(NamedTuple):
    """How far queries see, in tokens of their row."""

    before: int
    after: int
    first: int = 0
    """First tokens of their text that all of its later queries see."""
    first_see_all: bool = False
    """Whether these see all of it themselves."""


def within_row(reach: Reach, part: Part) -> Reach:
    """The same as far as there are tokens, which all others see: nothing is beyond all other parts.

    Where queries see what follows them, the first tokens of a text see each other.
    """
    most = part.length * (part.exchange.number - 1)
    first = min(reach.first, part.mask.kv_length)
    after = reach.after if part.mask.causal else max(reach.after, first - 1)
    return reach._replace(before=min(reach.before, most), after=min(after, most), first=first)


def with_halo(
    k_BGTD: torch.Tensor, v_BGTV: torch.Tensor, part: Part, reach: Reach
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, values) of this part's tokens and of those that they see, gradients going back to their owners.

    A process sends each of these tokens once to each part that sees it, and the first ones in :func:`carried`.
    """
    own, length, pieces = torch.cat([k_BGTD, v_BGTV], dim=3), part.length, []
    if reach.first:
        pieces.append(_first(own, part, reach.first))
    for parts in range(-(-reach.before // length), 0, -1):
        number = min(reach.before - (parts - 1) * length, length)
        pieces.append(part.exchange.shifted(own[:, :, length - number :], parts))
    pieces.append(own)
    for parts in range(1, -(-reach.after // length) + 1):
        number = min(reach.after - (parts - 1) * length, length)
        pieces.append(part.exchange.shifted(own[:, :, :number], -parts))
    k, v = torch.cat(pieces, dim=2).split([k_BGTD.shape[3], v_BGTV.shape[3]], dim=3)
    return k, v


def _first(own: torch.Tensor, part: Part, number: int) -> torch.Tensor:
    """Keys and values of the first tokens of the text before this part, in their order, as far as they are before."""
    end_B = part.mask.starts_BK()[:, part.stop - 1]  # where the text begins that the part ends with
    index_BS = end_B.unsqueeze(1) + torch.arange(number, device=end_B.device) - part.start
    here = (index_BS >= 0) & (index_BS < part.length)
    index = index_BS.clamp(0, part.length - 1)[:, None, :, None].expand(len(own), own.shape[1], -1, own.shape[3])
    return carried(part, own.gather(2, index) * here[:, None, :, None])


def positions(part: Part, reach: Reach) -> torch.Tensor:
    """Position in the row of each key of :func:`with_halo`, (B or 1, keys), -1 where there is none."""
    device, whole = part.mask.device, part.mask.kv_length
    around = torch.arange(part.start - reach.before, part.stop + reach.after, device=device).unsqueeze(0)
    around = around.masked_fill((around < 0) | (around >= whole), -1)
    if not reach.first:
        return around
    start_B = part.mask.starts_BK()[:, max(part.start - 1, 0)]
    first = start_B.unsqueeze(1) + torch.arange(reach.first, device=device)
    there = first < part.start - reach.before
    if (goes_on := part.goes_on()) is not None:
        there = there & goes_on.unsqueeze(1)
    first = first.masked_fill(~there, -1)
    return torch.cat([first, around.expand(len(first), -1)], dim=1)
