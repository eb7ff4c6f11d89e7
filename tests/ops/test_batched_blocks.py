"""Attention to chosen keys in operations of a fixed number: what its pieces, its tiles and its dropout are made of."""

import pytest
import torch
from cases import Case, assert_forms_agree, assert_same, inputs, left_padding, outcome, seeded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attn_plugins.core.registry import get_attention
from attn_plugins.ops import sizes
from attn_plugins.ops.blocks import batched, batched_native_sparse
from attn_plugins.ops.blocks.batched import PairTiles, batched_gathered_attention, not_visible, pairs_by_block
from attn_plugins.ops.dropout import draw_seed, dropped

CASES = [
    Case(cls, options, causal)
    for cls in map(get_attention, ["block_topk", "native_sparse", "vertical_slash", "lsh"])
    for options in cls.examples
    for causal in ([True, False] if cls.causal else [False])
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_add_up_to_the_same(case, monkeypatch):
    given, mask = inputs(2, 65), case.mask(2, 65, 65, padding_BK=left_padding([65, 40], 65))
    assert_forms_agree(case, given, mask, backend="batched")
    module, cotangent = case.module(backend="batched"), torch.randn(2, 65, 4, 8, generator=seeded(1))
    whole = outcome(module, given, mask, cotangent)
    monkeypatch.setattr(sizes, "SCORES_AT_ONCE_ELSEWHERE", 1 << 11)
    assert_same(outcome(module, given, case.mask(2, 65, 65, padding_BK=mask.padding_BK), cotangent), whole, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_half_precision_are_exact_enough(case, monkeypatch):
    """As on a GPU: operands are rounded to their inputs' dtype, and sums are not."""
    for module in (batched, batched_native_sparse):
        monkeypatch.setattr(module, "operand_dtype", lambda *tensors: tensors[0].dtype)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        given = inputs(2, 65).to(dtype).to(torch.float64)
        mask = case.mask(2, 65, 65, padding_BK=left_padding([65, 40], 65))
        assert_forms_agree(case, given, mask, dtype=dtype, tolerance=tolerance, backend="batched")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=300), st.sampled_from([1, 4, 128]))
@example([*range(7)] * 41, 128)  # as many tiles as there can be
def test_every_pair_is_in_one_tile_of_its_block(blocks, largest):
    number, block_P = 7, torch.tensor(blocks)
    pair_TR, block_T = pairs_by_block(block_P, number, largest)
    assert pair_TR.shape[1] <= largest
    assert ((block_T >= 0) & (block_T < number)).all()
    placed = pair_TR < len(blocks)
    assert torch.equal(pair_TR[placed].sort().values, (block_P < number).nonzero().squeeze(1))
    assert (block_P[pair_TR.clamp(max=len(blocks) - 1)] == block_T.unsqueeze(1))[placed].all()


def test_parts_are_one_softmax_and_its_log_sum_exp_has_a_gradient():
    """Pairs of two parts, with 2 and 1 a query, are those of dense attention; a query without any gives zeros."""
    q, k, v = (x[:1, :1, :4].clone().requires_grad_() for x in inputs(1, 4).of_tokens()[:3])
    tables = (torch.tensor([[0, 1], [2, 3], [3, 9]]), torch.tensor([3, 3, 3, -1, -1]))
    keys_XC = torch.tensor([[0, 1], [2, 3], [3, 4]])
    blocks = [[0, 1], [1], [0], [0, 1]]
    first = PairTiles(torch.tensor([[0, 4], [1, 2], [6, 8]]), torch.tensor([0, 1, 0]), keys_XC, 2, not_visible, tables)
    second = PairTiles(torch.tensor([[2], [4]]), torch.tensor([2, 2]), keys_XC, 1, not_visible, tables)
    out, lse = batched_gathered_attention(q, k, v, [first, second], scale=0.7)
    seen = torch.zeros(4, 4, dtype=torch.bool)
    for query, chosen in enumerate(blocks[:3]):
        for block in chosen:
            seen[query, 2 * block : 2 * block + 2] = True
    seen[2, 3] = True
    scores = (0.7 * q @ k.mT)[0, 0].masked_fill(~seen, -torch.inf)[:3]
    want = torch.cat([scores.softmax(-1) @ v[0, 0], torch.zeros(1, 8, dtype=v.dtype)])
    torch.testing.assert_close(out[0, 0], want)
    torch.testing.assert_close(lse[0, 0], torch.cat([scores.logsumexp(-1), lse.new_full((1,), -torch.inf)]))
    along = torch.randn(4, 9, generator=seeded(3), dtype=v.dtype)
    sides = (torch.cat([out[0, 0], lse[0, 0, :, None]], 1)[:3], torch.cat([want[:3], scores.logsumexp(-1)[:, None]], 1))
    got, expected = (torch.autograd.grad((side * along[:3]).sum(), [q, k, v], retain_graph=True) for side in sides)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_takes_its_share_and_pairs_are_independent():
    torch.manual_seed(0)
    index = torch.arange(600)
    taken = [dropped(draw_seed(index.device), index[:, None], index, 0.3).double() for _ in range(2)]
    for x in taken:
        for by in (x.mean(), *x.mean(0)[:9], *x.mean(1)[:9]):
            assert abs(by - 0.3) < 0.1
        assert abs(x.mean() - 0.3) < 0.005
    for other in (taken[1], taken[0].T, taken[0].roll(1, 0), taken[0].roll(1, 1), taken[0].roll((1, -1), (0, 1))):
        assert abs(((taken[0] - 0.3) * (other - 0.3)).mean()) < 0.002
