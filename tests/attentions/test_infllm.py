"""InfLLM-V2 beyond the contract: which blocks are chosen, written out for each query, and where it is dense."""

import pytest
import torch
from cases import SCALE, Case, inputs, left_padding, rounds

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention

SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "local_blocks": 2, "dense_len": 11}


def made(**options):
    return Case(get_attention("infllm"), {**SIZES, **options}, causal=True).module()


def written_out(given, length, *, topk=4, init_blocks=1, dense_len=11):
    """(H, Q, K): which keys each query of the first row sees, one query after another."""
    k = given.k[0]
    seen = torch.zeros(4, length, length, dtype=torch.bool)
    starts = range(0, length - 3, 2)
    means = torch.stack([k[:, start : start + 4].mean(1) for start in starts], dim=1)
    for group in (0, 1):
        for t in range(length):
            own, visible = t // 4, [m for m, start in enumerate(starts) if start + 3 <= t]
            blocks = set(range(own + 1))
            if t >= dense_len:
                q = given.q[0, 2 * group : 2 * group + 2, t]
                weight = (SCALE * q @ means[group, visible].T).softmax(-1).sum(0).tolist()
                score = {
                    block: max(
                        (w for w, m in zip(weight, visible, strict=True) if -4 < starts[m] - 4 * block < 4), default=0.0
                    )
                    for block in range(own)
                }
                blocks = {own, own - 1, *range(init_blocks)}
                free = sorted((-score[block], block) for block in score if block not in blocks)
                blocks |= {block for value, block in free[: topk - len(blocks)] if value < 0}
            for block in blocks:
                seen[2 * group : 2 * group + 2, t, 4 * block : min(4 * block + 4, t + 1)] = True
    return seen


@rounds("form", ["reference", "torch", "batched"])
@rounds("options", [{}, {"topk": 3}, {"dense_len": 0}, {"init_blocks": 0}, {"dense_len": 40}])
def test_blocks_are_those_of_the_formula(form, options):
    length = 37
    module, given = made(**options), inputs(1, length)
    module.backend = form
    seen = written_out(given, length, **options)
    s = (given.q[0] @ given.k[0].repeat_interleave(2, dim=0).mT * SCALE).masked_fill(~seen, -torch.inf)
    want = (s.softmax(-1) @ given.v[0].repeat_interleave(2, dim=0)).transpose(0, 1)
    torch.testing.assert_close(given.run(module, AttentionMask(1, length, length, causal=True))[0], want)


@rounds("form", ["reference", "torch", "batched"])
def test_dense_tokens_count_from_the_first_real_one(form):
    module, given = made(dense_len=12), inputs(1, 30)
    module.backend = form
    mask = AttentionMask(1, 30, 30, causal=True, padding_BK=left_padding([20], 30))
    want = given.run(made(dense_len=30), mask)
    got = given.run(module, mask)
    torch.testing.assert_close(got[:, 10:22], want[:, 10:22])
    assert not torch.allclose(got[:, 26:], want[:, 26:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0; allowed: an integer from 1 on"),
        ({"dense_len": -1}, "dense_len=-1; allowed: an integer from 0 on"),
        ({"topk": 32}, r"topk=32; allowed: init_blocks \+ local_blocks = 33 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_attention("infllm").Config(**options)
