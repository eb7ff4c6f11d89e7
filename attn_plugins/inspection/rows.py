"""Rows of effective weights for chosen queries, from the form whose cost an attention promises.

While its weights stay as they are, ``out[q, d] = sum_k w[q, k] v[k, d]``: linear in the values, and each of their V
dimensions goes by itself. So the derivative of ``out[q, d]`` with respect to ``v[:, d]`` is the row ``w[q, :]``, exact
whatever the attention is made of. One backward gives V rows of a head in each group, at the memory of a training
step; nothing of Q x K is made where the attention makes none.

Letters beside the legend's: h of the heads and q of the queries that are chosen, R rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Weighing:
    """An output that is linear in its values, and the way back from it."""

    out_BQHV: torch.Tensor
    value_BGKV: torch.Tensor
    """The leaf that the output has a gradient to."""

    @classmethod
    def of(cls, attend: Callable[[torch.Tensor], torch.Tensor], value_BGKV: torch.Tensor) -> "Weighing":
        """Run ``attend``, a function of values alone: out_BQHV, with a gradient to them."""
        with torch.enable_grad(), torch.autocast(value_BGKV.device.type, enabled=False):
            leaf = value_BGKV.detach().clone().requires_grad_()
            return cls(attend(leaf), leaf)

    def pulled(self, cotangent_BQHV: torch.Tensor) -> torch.Tensor:
        """``sum_q w[q, k] cotangent[q]`` over queries and the heads that share a key/value head, (B, G, K, V)."""
        cotangent_BQHV = cotangent_BQHV.to(self.out_BQHV.dtype)
        (gradient,) = torch.autograd.grad(self.out_BQHV, self.value_BGKV, cotangent_BQHV, retain_graph=True)
        return gradient

    def mixed(self, mix_BQHR: torch.Tensor) -> torch.Tensor:
        """Sums of rows over queries and the heads that share a key/value head, (B, G, R, K).

        Args:
            mix_BQHR: R sums, by the coefficient of each query's and head's row.
        """
        sums, size = [], self.value_BGKV.shape[3]
        for some_BQHR in mix_BQHR.split(size, dim=3):
            cotangent_BQHV = torch.nn.functional.pad(some_BQHR, (0, size - some_BQHR.shape[3]))
            sums.append(self.pulled(cotangent_BQHV)[..., : some_BQHR.shape[3]].transpose(2, 3))
        return torch.cat(sums, dim=2)

    def rows(self, queries: Sequence[int], heads: Sequence[int]) -> torch.Tensor:
        """Weights of these queries in these query heads, (B, h, q, K).

        Cost: H / G backwards for every V queries.
        """
        batch, length, num_heads, _ = self.out_BQHV.shape
        groups, keys, size = self.value_BGKV.shape[1:]
        shared = num_heads // groups
        rows_BhqK = self.value_BGKV.new_zeros(batch, len(heads), len(queries), keys)
        for start in range(0, len(queries), size):
            some = torch.tensor(queries[start : start + size])
            for member in range(shared):  # one head of each group at a time: a group's heads share the gradient
                places = [place for place, head in enumerate(heads) if head % shared == member]
                chosen = torch.tensor([heads[place] for place in places], dtype=torch.long)
                if not places:
                    continue
                mix = self.value_BGKV.new_zeros(batch, length, num_heads, len(some))
                mix[:, some[:, None], chosen[None], torch.arange(len(some))[:, None]] = 1.0
                found_BGRK = self.mixed(mix)
                rows_BhqK[:, places, start : start + size] = found_BGRK[:, chosen // shared]
        return rows_BhqK
