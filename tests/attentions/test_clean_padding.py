"""Padding in the fast forms: infinities and NaN in it stay where they are, and sums pass over it wherever it is."""

import pytest
import torch
from cases import CASES, EXACT, every_case, inputs, left_padding, rounds

from attn_plugins.attentions.fastformer import FastformerAttention
from attn_plugins.attentions.forgetting import ForgettingAttention
from attn_plugins.attentions.path import PathAttention


@every_case(clean_padding=True)
@rounds("value", [float("nan"), float("inf"), -float("inf")])
@rounds("side", ["left", "right"])
@rounds("backend", ["torch", "batched"])
def test_what_padding_holds_reaches_nobody(case, value, side, backend):
    module, padding = case.module(dtype=torch.float32, backend=backend), left_padding([40, 23], 40)
    padding = padding.flip(1) if side == "right" else padding
    given = inputs(2, 40).to(torch.float32)
    want = given.run(module, case.mask(2, 40, 40, padding_BK=padding))
    for x in given.tensors():
        x[1][:, ~padding[1]] = value
    got = given.run(module, case.mask(2, 40, 40, padding_BK=padding))
    torch.testing.assert_close(got[padding], want[padding])


GATED = (FastformerAttention, ForgettingAttention, PathAttention)


def counts_no_distance(case):
    """Whether the past is known by sums, or by what gates of real tokens have made of it: padding has no part in it."""
    sums = case.cls.family == "linear" and not hasattr(case.cls.Config, "window_size")
    return case.causal and (sums or issubclass(case.cls, GATED))


@pytest.mark.parametrize("case", [case for case in CASES if counts_no_distance(case)], ids=str)
@torch.no_grad()
def test_padding_between_tokens_is_passed_over(case):
    """As a cache has it between the turns of a conversation: it neither enters, nor fades, nor counts."""
    real = torch.tensor([1] * 5 + [0] * 4 + [1] * 8 + [0] * 2 + [1] * 6).bool()
    given, padding = inputs(1, len(real)), real.unsqueeze(0)
    alone = given.tokens(real)
    want = alone.run(case.module(backend="reference"), case.mask(1, *2 * [int(real.sum())]))
    for backend in ("reference", "torch", "batched"):
        got = given.run(case.module(backend=backend), case.mask(1, *2 * [len(real)], padding_BK=padding))
        torch.testing.assert_close(
            got[:, real], want, rtol=0, atol=EXACT, msg=lambda said, form=backend: f"{form}: {said}"
        )
    module, outs = case.module(), []
    state = module.new_state()
    for start, end in ((0, 7), (7, 8), (8, 20), (20, len(real))):
        mask = case.mask(1, end - start, end, padding_BK=padding[:, :end])
        outs.append(given.tokens(slice(start, end)).run(module, mask, state=state))
    torch.testing.assert_close(torch.cat(outs, dim=1)[:, real], want, rtol=0, atol=EXACT)
