"""Softmax over sinks and a window, linear attention over what has left it, for a part of longer rows.

The window's keys come as those of any window do; they are also those that leave it during this part. What has left it
before is carried along the parts as one sum.
"""

import functools
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Part
from attn_plugins.ops.linear import window
from attn_plugins.ops.linear.attention import absorb, projections, sums_shapes
from attn_plugins.ops.linear.window import Prepare
from attn_plugins.ops.parts.halo import Reach, with_halo, within_row
from attn_plugins.ops.parts.pattern import in_part
from attn_plugins.ops.parts.states import carried, of_text_before
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.patterns.band import Band, in_row


def attend_part(
    attention: Any,
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTV: torch.Tensor,
    *,
    part: Part,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.linear.window.linear_window_attention`, causal: out_BHTV in the dtype of v.

    Args:
        attention: whose method it is; it has ``prepare`` and the sizes in its ``config``.

    Raises:
        ValueError: queries see what follows them.
    """
    prepare: Prepare = functools.partial(attention.prepare, mask=mask, scale=scale)
    chunk_size, forms = (
        attention.config.chunk_size,
        window.BATCHED if attention.prefers_batched(q_BHTD) else window.PLAIN,
    )
    if not mask.causal:
        raise ValueError("attention 'linear_window' serves rows in parts where it is causal; allowed else: 'local'")
    window_size, num_sink_tokens = attention.config.window_size, attention.config.num_sink_tokens
    reach = within_row(Reach(window_size, 0, num_sink_tokens), part)
    k_BGKD, v_BGKV = with_halo(k_BGTD, v_BGTV, part, reach)
    prepared, options = prepare(q_BHTD, k_BGKD[:, :, reach.first :])
    near, far, branch = None, None, options["branch"]
    if branch != "linear":
        heads = slice(0, q_BHTD.shape[1])
        around, rules = in_part([(heads, Band(window_size, 0, num_first=num_sink_tokens))], part, reach)
        near = window.near_parts(q_BHTD, k_BGKD, v_BGKV, around, rules[0][1], options["scale"], forms)
    if branch != "window":
        v_BGKV = v_BGKV[:, :, reach.first :]
        enters_BK, text_BK = _entering(part, reach.before, num_sink_tokens)
        number = max(0, reach.before + part.length - window_size)
        state = None
        if number:
            seen_BK = enters_BK[:, :number]
            if text_BK is not None:
                seen_BK = seen_BK & (text_BK[:, :number] == text_BK[:, -1:])
            shape = sums_shapes(prepared, v_BGKV)["sums"]
            empty = v_BGKV.new_zeros(len(v_BGKV), *shape, dtype=accumulation_dtype(prepared.k_BGKD, v_BGKV))
            _, w_k = projections(prepared)
            tokens = (prepared.k_BGKD[:, :, :number], v_BGKV[:, :, :number], w_k)
            own, _ = absorb(empty, None, *tokens, prepared.options["feature_map"], seen_BK)
            state = of_text_before(part, carried(part, own))
        sizes = (part.mask.batch_size, part.length, reach.before + part.length)
        held = AttentionMask(*sizes, causal=True, segments_BK=text_BK, device=mask.device)
        far = window.far_sums(prepared, v_BGKV, held, enters_BK, window_size, chunk_size, state, forms)
    return window.joined(near, far, options["log_factor_H"], prepared.options["eps"]).to(v_BGTV.dtype)


def _entering(part: Part, before: int, num_sink_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For this part's tokens and those ``before`` it.

    Returns:
        (which of them enter the sums when they leave the window, (B, K); a number for the text that each is of, (B, K),
        or None where rows are not packed).
    """

    def build() -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = part.mask
        position = torch.arange(part.start - before, part.stop, device=mask.device)
        at = position.clamp(min=0)
        enters = (position >= 0) & (in_row(mask, at.unsqueeze(0)) >= num_sink_tokens)
        if mask.padding_BK is not None:
            enters = enters & mask.padding_BK.index_select(1, at)
        text = None if mask.segments_BK is None else mask.starts_BK().index_select(1, at)
        every = (mask.batch_size, -1)
        return enters.expand(every), None if text is None else text.expand(every)

    return part.mask.cached(("entering", before, num_sink_tokens), build)
