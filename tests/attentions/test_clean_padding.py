"""Padding in the fast forms: infinities and NaN in it stay where they are, and sums pass over it wherever it is."""

import pytest
import torch
from cases import CASES, every_case, inputs, left_padding, rounds


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


def sums_alone(case):
    """Whether all that a query knows of the past is a sum, which has no distances to count padding in."""
    return case.causal and case.cls.family == "linear" and not hasattr(case.cls.Config, "window_size")


@pytest.mark.parametrize("case", [case for case in CASES if sums_alone(case)], ids=str)
@torch.no_grad()
def test_sums_pass_over_padding_between_tokens(case):
    """As a text that was padded on the right has, once more is written: it neither enters, nor fades, nor counts."""
    real = torch.tensor([1] * 5 + [0] * 4 + [1] * 8 + [0] * 2 + [1] * 6).bool()
    given, padding = inputs(1, len(real)), real.unsqueeze(0)
    alone = given.tokens(real)
    want = alone.run(case.module(backend="reference"), case.mask(1, *2 * [int(real.sum())]))
    for backend in ("reference", "torch", "batched"):
        got = given.run(case.module(backend=backend), case.mask(1, *2 * [len(real)], padding_BK=padding))
        torch.testing.assert_close(got[:, real], want, msg=lambda said, backend=backend: f"{backend}: {said}")
    module, outs = case.module(), []
    state = module.new_state()
    for start, end in ((0, 7), (7, 8), (8, 20), (20, len(real))):
        mask = case.mask(1, end - start, end, padding_BK=padding[:, :end])
        outs.append(given.tokens(slice(start, end)).run(module, mask, state=state))
    torch.testing.assert_close(torch.cat(outs, dim=1)[:, real], want)
