"""The first tokens of a row as queries that see all of it, wherever they are: global tokens."""

import torch

from attn_plugins.core.part import Part
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, scores, with_dropout


def attend_first(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTV: torch.Tensor,
    part: Part,
    number: int,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of the first ``number`` real tokens of each row to all of its real ones.

    Each part attends with these queries to its own keys, and what it finds is added up: two sums of the size of a few
    tokens, whatever the length.

    Args:
        scale, dropout, softcap, sinks: as in :meth:`attn_plugins.core.attention.Attention.forward`.

    Returns:
        (B, H, T, V) in the dtype of v: what those of them that are in this part find, zeros for other tokens.

    Raises:
        ValueError: packed rows.
    """
    if part.mask.segments_BK is not None:
        raise ValueError("global tokens of packed rows in parts are not served; give each text a row of its own")
    dtype, exchange, device = accumulation_dtype(q_BHTD, k_BGTD, v_BGTV), part.exchange, q_BHTD.device
    place_B1 = part.mask.starts_BK()[:, -1:] - part.start
    token_T = torch.arange(part.length, device=device)
    is_first_BST = (place_B1 + torch.arange(number, device=device)).unsqueeze(2) == token_T
    is_first = is_first_BST.unsqueeze(1).to(dtype)
    q_BHSD = exchange.summed(is_first @ q_BHTD.to(dtype))

    heads, real_BT = q_BHTD.shape[1], part.own(part.mask.padding_BK)
    s_BHST = scores(q_BHSD, k_BGTD, scale=scale, softcap=softcap)
    hidden = None if real_BT is None else ~real_BT[:, None, None]
    if hidden is not None:
        s_BHST = s_BHST.masked_fill(hidden, MASKED_SCORE)
    highest = torch.stack(exchange.gathered(s_BHST.detach().amax(dim=3, keepdim=True))).amax(dim=0)
    e_BHST = torch.exp(s_BHST - highest)
    e_BHST = e_BHST if hidden is None else e_BHST.masked_fill(hidden, 0.0)
    v_BHTV = expand_heads(v_BGTV, heads).to(dtype)
    found = torch.cat([with_dropout(e_BHST, dropout) @ v_BHTV, e_BHST.sum(dim=3, keepdim=True)], dim=3)
    num, den = exchange.summed(found).split([v_BHTV.shape[3], 1], dim=3)
    if sinks is not None:
        den = den + torch.exp(sinks.to(dtype).view(1, -1, 1, 1) - highest)
    return (is_first.mT @ (num / den.masked_fill(den == 0, 1.0))).to(v_BGTV.dtype)
