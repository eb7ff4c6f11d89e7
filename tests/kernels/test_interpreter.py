"""What the tests of this folder rest on: kernels run on CPU tensors, as written."""

import pytest
import torch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("interpreted")]


def test_loops_have_tensors_for_indices_and_autotuners_take_what_comes_first():
    import triton
    import triton.language as tl

    @triton.autotune(configs=[triton.Config({"BLOCK": size}) for size in (16, 32)], key=["length"])
    @triton.jit
    def add_rows(x, out, length, rows, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for row in range(rows):
            total += tl.load(x + row.to(tl.int64) * length + at, mask=at < length, other=0)
        tl.store(out + at, total + BLOCK, mask=at < length)

    x, out = torch.randn(3, 21), torch.zeros(21)
    add_rows[lambda meta: (triton.cdiv(21, meta["BLOCK"]),)](x, out, 21, 3)
    torch.testing.assert_close(out, x.sum(0) + 16)
