"""Running maxima of exponents: sums of exponentials that stay finite, whatever is added to them.

FAVOR+'s features are exponentials. A sum of e^x over keys is kept as one of e^(x - m) beside m, the largest x so far of
each feature, which cancels in numerator and denominator.
"""

import torch

from attn_plugins.ops.reference import MASKED_SCORE


def max_exponent(exponents_BGKF: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Largest exponent of each feature over the keys seen, (B, G, 1, F), at least MASKED_SCORE. Has no gradient.

    Args:
        seen: bool, broadcastable to (B, G, K, 1), or None for all.
    """
    u = exponents_BGKF.detach()
    if seen is not None:
        u = u.masked_fill(~seen, MASKED_SCORE)
    return u.amax(dim=2, keepdim=True).clamp(min=MASKED_SCORE)


def exp_minus_max(exponents: torch.Tensor, running_max: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries for keys' features that are ``exp(exponents - running_max)``.

    What a query reads is a sum over features of ``exp(its exponent + running_max) * (what the keys add up to)``. The
    largest of these exponents is taken out, which scales numerator and denominator alike.

    Returns:
        (features, the exponent (..., 1) that was taken out).
    """
    raised = exponents + running_max
    top = raised.detach().amax(dim=-1, keepdim=True)
    return torch.exp(raised - top), top


def rescale(
    sums_BGFV: torch.Tensor | None, running_max_BGF: torch.Tensor | None, new_max_BGF: torch.Tensor | None
) -> torch.Tensor | None:
    """Sums above one running maximum as those above a higher one; unchanged where the features are no exponentials."""
    if sums_BGFV is None or running_max_BGF is None or new_max_BGF is None:
        return sums_BGFV
    return sums_BGFV * torch.exp(running_max_BGF - new_max_BGF).unsqueeze(-1)


def add_sums(
    sums_BGFV: torch.Tensor,
    running_max_BGF: torch.Tensor | None,
    more_BGFV: torch.Tensor,
    max_of_more_BGF: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the sums of both, the maximum of both)."""
    if running_max_BGF is None or max_of_more_BGF is None:
        return sums_BGFV + more_BGFV, None
    new_max = torch.maximum(running_max_BGF, max_of_more_BGF)
    before, more = (
        x * torch.exp(old - new_max).unsqueeze(-1)
        for x, old in ((sums_BGFV, running_max_BGF), (more_BGFV, max_of_more_BGF))
    )
    return before + more, new_max
