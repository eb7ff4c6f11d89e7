"""How far a new attention is from the model's own on the same queries, keys and values."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.learned_choice import LearnsChoice
from attn_plugins.hf.names import ROLE
from attn_plugins.hf.observe import Observed, own_attention
from attn_plugins.transfer.body import run_body

Loss = Literal["output", "weights"]

TINY = 1e-12
"""The least weight that a logarithm is taken of."""


class Error(NamedTuple):
    """Errors of the heads in each row of a batch."""

    of_BH: torch.Tensor
    counts_BH: torch.Tensor
    """False where there is none: no real query, or none of which the model's own output is other than zeros."""

    def mean_H(self) -> torch.Tensor:
        """The mean over the rows that have one; 0 without any."""
        return self.of_BH.where(self.counts_BH, 0).sum(0) / self.counts_BH.sum(0).clamp_min(1)


def output_error(out_BQHV: torch.Tensor, own_BQHV: torch.Tensor, real_BQ: torch.Tensor | None) -> Error:
    """Squared error of outputs over the squared length of the model's own, both summed over real queries.

    0 is equality, 1 is as wrong as zeros.
    """
    own_BQHV = own_BQHV.to(out_BQHV.dtype)
    off_BQHV = out_BQHV - own_BQHV
    if real_BQ is not None:
        padding = ~real_BQ[:, :, None, None]
        off_BQHV, own_BQHV = off_BQHV.masked_fill(padding, 0), own_BQHV.masked_fill(padding, 0)
    length_BH = own_BQHV.square().sum((1, 3))
    least = torch.finfo(length_BH.dtype).tiny
    return Error(off_BQHV.square().sum((1, 3)) / length_BH.clamp_min(least), length_BH > least)


def weights_error(weights_BHQK: torch.Tensor, own_BHQK: torch.Tensor, real_BQ: torch.Tensor | None) -> Error:
    """Cross-entropy of weights against the model's own, the mean over real queries."""
    return _cross_entropy(weights_BHQK.clamp_min(TINY).log(), own_BHQK, real_BQ)


def _cross_entropy(log_weights_BHQK: torch.Tensor, own_BHQK: torch.Tensor, real_BQ: torch.Tensor | None) -> Error:
    entropy_BHQ = -(own_BHQK.to(log_weights_BHQK.dtype) * log_weights_BHQK).sum(-1)
    if real_BQ is None:
        return Error(entropy_BHQ.mean(-1), torch.ones_like(entropy_BHQ[..., 0], dtype=torch.bool))
    real_BHQ = real_BQ[:, None].expand_as(entropy_BHQ)
    queries_BH = real_BHQ.sum(-1)
    return Error(entropy_BHQ.where(real_BHQ, 0).sum(-1) / queries_BH.clamp_min(1), queries_BH > 0)


def choice_error(observed: Observed, real_BQ: torch.Tensor | None, dtype: torch.dtype) -> Error | None:
    """Cross-entropy of the softmax of a slot's scores of keys against the model's own weights, averaged over its heads.

    Of one head (B, 1), with gradients to the slot's weights; None where these do not choose keys.
    """
    slot = observed.slot
    if not isinstance(slot, LearnsChoice):
        return None
    seen = observed.in_dtype(dtype)
    options: dict[str, Any] = {"mask": seen.mask, "scale": seen.scale}
    if slot.wants_hidden:
        options["hidden_BQE"] = seen.options["hidden"]
    scores_BQK = slot.choice_scores(seen.query_BHQD, seen.key_BGKD, **options)
    hidden = scores_BQK == -torch.inf
    # A query that sees nothing is not a number, and nothing of it is let through, neither here nor in backward.
    log_weights_BQK = scores_BQK.log_softmax(-1).masked_fill(hidden, 0.0)
    return _cross_entropy(log_weights_BQK.unsqueeze(1), observed.own_weights().mean(1, keepdim=True), real_BQ)


def real_queries(observed: Observed, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, Q) or (1, Q), False for queries that are padding; None where none is known to be.

    Cross-attention's mask tells of keys alone. Its queries are the decoder's tokens, of which the batch may tell.
    """
    if getattr(observed.module, ROLE) != "cross":
        return observed.real_BQ
    mask, rows = batch.get("decoder_attention_mask"), observed.query_BHQD
    if not isinstance(mask, torch.Tensor) or mask.shape != (rows.shape[0], rows.shape[2]):
        return None
    return mask.to(rows.device).bool()


def measure_errors(
    model: Any,
    slots: Mapping[str, Attention],
    batches: Iterable[Mapping[str, Any]],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, list[float] | None]:
    """Errors of outputs by path and head (see :func:`output_error`), the mean over rows of what slots would return.

    Each module gets what reaches it in the model as it was before the swap. None for one that was not called.

    Args:
        dtype: what the model computes in around its slots, by autocast; they compute in the dtype of their weights.
    """
    sums: dict[nn.Module, torch.Tensor] = {}
    rows: dict[nn.Module, torch.Tensor] = {}
    for batch in batches:

        def see(observed: Observed, batch: Mapping[str, Any] = batch) -> None:
            with torch.autocast(observed.query_BHQD.device.type, enabled=False):
                out, _ = observed.attend(dtype=computed_in(observed))
                error = output_error(out, observed.own_BQHV, real_queries(observed, batch))
            module = observed.module
            sums[module] = sums.get(module, 0) + error.of_BH.where(error.counts_BH, 0).sum(0)
            rows[module] = rows.get(module, 0) + error.counts_BH.sum(0)

        with own_attention(model, see):
            run_body(model, slots, batch, dtype)
    found = {path: model.get_submodule(path) for path in slots}
    return {
        path: (sums[module] / rows[module].clamp_min(1)).tolist() if module in sums else None
        for path, module in found.items()
    }


def computed_in(observed: Observed) -> torch.dtype:
    """What a slot computes in while it learns: float32, or what its weights are in where that is more."""
    return next((weight.dtype for weight in observed.slot.parameters()), torch.float32)
