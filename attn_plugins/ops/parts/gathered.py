"""All keys and values that a part's queries may see: what dense attention needs."""

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Part
from attn_plugins.ops.parts.halo import Reach, with_halo, within_row


def with_all_keys(
    k_BGTD: torch.Tensor, v_BGTV: torch.Tensor, part: Part
) -> tuple[torch.Tensor, torch.Tensor, AttentionMask]:
    """Keys and values of the row, without those after this part where the mask is causal, and their dense mask.

    Memory for all of them and for T x K booleans, as torch's context parallelism needs with its default, an all-gather;
    packed and padded rows are served too, which that is not able to.
    """
    whole = part.mask
    reach = within_row(Reach(whole.kv_length, 0 if whole.causal else whole.kv_length), part)
    k_BGKD, v_BGKV = with_halo(k_BGTD, v_BGTV, part, reach)
    missing = reach.before - part.start
    stop = missing + (part.stop if whole.causal else whole.kv_length)

    def build() -> AttentionMask:
        query = torch.arange(part.start, part.stop, device=whole.device).view(1, -1, 1)
        key = torch.arange(stop - missing, device=whole.device).view(1, 1, -1)
        sizes = (whole.batch_size, part.length, stop - missing)
        dense_BQK = whole.visible(query, key)
        return AttentionMask(*sizes, causal=whole.causal, plain=False, dense_BQK=dense_BQK, device=whole.device)

    return k_BGKD[:, :, missing:stop], v_BGKV[:, :, missing:stop], whole.cached("all keys of a part", build)
