"""What is not a number stays visible: it comes out where it was read, and is not turned into zeros."""

import torch
from cases import every_case, inputs, rounds


@every_case()
@rounds("form", ["torch", "batched", "reference", "state"])
@rounds("name", ["q", "k", "v"])
def test_inputs_that_are_not_numbers_give_no_numbers(case, form, name):
    if name != "v" and case.cls.family == "dense" and form != "reference":
        return  # torch's fused attention turns them into zeros by itself
    module = case.module(backend="torch" if form == "state" else form, dtype=torch.float32)
    given = inputs(2, 9).to(torch.float32)
    getattr(given, name)[0] = torch.nan
    state = None
    if form == "state":
        state = module.new_state() if case.causal else None
        if state is None:
            return
    out = given.run(module, case.mask(2, 9, 9), **({} if state is None else {"state": state}))
    assert out[0].isnan().all(), f"what is not a number in {name} gives {out[0].isfinite().sum()} numbers"
