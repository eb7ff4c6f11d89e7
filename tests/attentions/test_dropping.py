"""Attention dropout: what declares it keeps the mean of its outputs, what does not leaves it out and says so."""

import dataclasses

import pytest
import torch
from cases import EXACT, every_case, inputs, rounds, seeded


def run_in(form, case, given, **options):
    """out_BQHV of the last 4 of 12 tokens, by a form or from a state of the others; None where there is no state."""
    module, rows = case.module(backend="reference" if form == "reference" else "torch"), len(given.q)
    if form != "state":
        return given.run(module, case.mask(rows, 12, 12), **options)[:, 8:]
    state = module.new_state() if case.causal else None
    if state is None:
        return None
    with torch.no_grad():
        given.tokens(slice(0, 8)).run(module, case.mask(rows, 8, 8), state=state)
    some = given.tokens(slice(8, 11)).run(module, case.mask(rows, 3, 11), state=state, **options)
    one = given.tokens(slice(11, 12)).run(module, case.mask(rows, 1, 12), state=state, **options)
    return torch.cat([some, one], dim=1)


@every_case()
@rounds("form", ["torch", "reference", "state"])
def test_dropout_keeps_the_mean_or_is_left_out_with_a_warning(case, form):
    given = inputs(1, 12)
    want = run_in(form, case, given)
    if want is None:
        return
    if not case.cls.dropout:
        message = f"attention '{case.cls.name}' drops no weights: the model's attention dropout of 0.3 is left out"
        with pytest.warns(UserWarning, match=message):
            assert torch.equal(run_in(form, case, given, dropout=0.3), want)
        return
    draws = given.rows([0] * 400)
    draws.v.requires_grad_()
    torch.manual_seed(0)
    out = run_in(form, case, draws, dropout=0.3)
    spread = out.detach().std(dim=0)
    assert spread.flatten(1).any(dim=1).all(), "nothing is dropped from what one of the tokens sees"
    error = (out.detach().mean(dim=0) - want[0]).abs()
    assert (error <= 6 * spread / 400**0.5 + EXACT).all(), "the mean over what is drawn is not what it is without"
    twice = dataclasses.replace(given, v=2 * given.v)
    if form != "state" and torch.allclose(run_in(form, case, twice), 2 * want):
        # Linear in the values, with weights that the backward has to drop as the forward did.
        cotangent = torch.randn(out.shape, generator=seeded(1), dtype=out.dtype)
        (gradient,) = torch.autograd.grad(out, draws.v, cotangent)
        torch.testing.assert_close((gradient * draws.v).sum(), (cotangent * out).sum())
