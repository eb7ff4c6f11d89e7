"""Every weight has a gradient in every call, zero at least: data-parallel training waits for each of them."""

import itertools

import torch
from cases import cases_together, inputs, left_padding, rounds


@cases_together()
@rounds("form", ["torch", "reference"])
def test_every_weight_gets_a_gradient_whatever_the_length(case, form):
    """Data-parallel training waits for each of them, also where a text is too short for some of the weights."""
    module = case.module(backend=form)
    weights = dict(module.named_parameters())
    if not weights:
        return
    branches = [None, *case.cls.branches]
    for length, branch in itertools.product((1, 4, 8, 9, 40), branches):
        if branch is not None:
            module.branch = branch
        for padding in (None, left_padding([length, length // 2], length), left_padding([0, 0], length)):
            given = inputs(2, length)
            given.q.requires_grad_(padding is None)  # else the weights alone are trained
            out = given.run(module, case.mask(2, length, length, padding_BK=padding))
            gradients = torch.autograd.grad(out.sum(), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                what = f"{name}, {length} tokens, padding {padding}, branch {branch}"
                assert gradient is not None, f"no gradient to {what}"
                assert gradient.isfinite().all(), f"the gradient is not finite to {what}"


@cases_together(causal=True)
def test_every_weight_gets_a_gradient_from_a_state(case):
    module = case.module()
    state = module.new_state()
    if state is None or not list(module.parameters()):
        return
    given = inputs(2, 12)
    for low, high in ((0, 1), (1, 4), (4, 12)):
        mask = case.mask(2, high - low, high)
        out = given.tokens(slice(low, high)).run(module, mask, state=state)
        for name, weight in module.named_parameters():
            (gradient,) = torch.autograd.grad(out.sum(), weight, retain_graph=True, allow_unused=True)
            assert gradient is not None, f"no gradient to {name} from tokens {low} to {high}"
