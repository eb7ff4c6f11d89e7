"""What padding holds: infinities and NaN stay where they are in the fast forms that say so."""

import torch
from cases import every_case, inputs, left_padding, rounds


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
