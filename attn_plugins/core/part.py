"""Texts that are cut along their length, a part for each process, and what the processes send each other.

Every process runs the same operations, whether it has a neighbour to hear from or not, so that all of them send in the
same order, in the backward too.
"""

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist

from attn_plugins.core.mask import AttentionMask


class Exchange:
    """Messages among the processes of a group, in the order of their parts.

    Args:
        group: of ``torch.distributed``; its ranks are the numbers of the parts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.index, self.number = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0
        """By this process, to all others together, in forwards and backwards."""

    def shifted(self, x: torch.Tensor, by: int) -> torch.Tensor:
        """What the process ``by`` parts before this one, or after it where negative, gives as ``x``; else zeros.

        The shape is the same for all. Gradients go back to where values came from.
        """
        return _Shift.apply(x, by, self) if x.numel() else x

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what all processes give, for all of them, with a gradient."""
        return _Sum.apply(x, self)

    def gathered(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each process gives, in the order of the parts, for all of them, without a gradient."""
        found = [torch.empty_like(x) for _ in range(self.number)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        self.bytes_sent += x.nbytes * (self.number - 1)
        return found

    def send(self, x: torch.Tensor, by: int) -> torch.Tensor:
        """As :meth:`shifted`, without a gradient."""
        x, received = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
        messages = []
        if 0 <= (to := self.index + by) < self.number:
            messages.append(dist.P2POp(dist.isend, x, dist.get_global_rank(self.group, to), self.group))
            self.bytes_sent += x.nbytes
        if 0 <= (source := self.index - by) < self.number:
            messages.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(self.group, source), self.group))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return received

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`summed`, without a gradient."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        self.bytes_sent += 2 * x.nbytes * (self.number - 1) // self.number
        return total


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: int, exchange: Exchange) -> torch.Tensor:
        ctx.by, ctx.exchange = by, exchange
        return exchange.send(x, by)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        return ctx.exchange.send(d_out, -ctx.by), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.add_up(x)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        return ctx.exchange.add_up(d_out), None


class Part:
    """This process's part of the rows of a batch.

    Args:
        mask: of the whole rows, with as many queries as keys, plain.
        exchange: with the processes that have the other parts, which are all of one length.
    """

    def __init__(self, mask: AttentionMask, exchange: Exchange):
        self.mask, self.exchange = mask, exchange
        self.length = mask.kv_length // exchange.number
        self.start = exchange.index * self.length
        self.stop = self.start + self.length
        self.memo: dict[Hashable, Any] = {}
        """What follows from it for all layers of a call. Nothing in it holds the part, which would outlive the call."""

    def own(self, table_BN: torch.Tensor | None) -> torch.Tensor | None:
        """This part of a table of whole rows."""
        return None if table_BN is None else table_BN[:, self.start : self.stop]

    def goes_on(self, parts: int = 0) -> torch.Tensor | None:
        """Whether the text before this part, the one that its last token is of, is also that before an earlier part.

        Args:
            parts: how much earlier; 0 asks whether it goes on with the first token of this part.

        Returns:
            (B or 1,) bool, or None where all rows are one text.
        """
        if not self.mask.row_starts:
            return None
        starts, before = self.mask.starts_BK(), max(self.start - 1, 0)
        other = self.start if parts == 0 else max(self.start - parts * self.length - 1, 0)
        return starts[:, before] == starts[:, other]
