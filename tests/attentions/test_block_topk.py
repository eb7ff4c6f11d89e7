"""What is particular to choosing blocks; the contract is in test_contract.py."""

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, kept_for_backward, left_padding

from attn_plugins.attentions.block_topk import BlockTopkAttention
from attn_plugins.ops.blocks import gather as gathered
from attn_plugins.ops.blocks.gather import block_layout, choose_blocks


def block_topk(causal=True, **options):
    return Case(BlockTopkAttention, options, causal)


def seen_by(module, mask, given):
    """(B, Q, H, K) bool: where the fast form's output depends on a value."""
    groups = given.k.shape[1]
    given.v = torch.eye(mask.kv_length, dtype=torch.float64).expand(mask.batch_size, groups, -1, -1)
    return given.run(module, mask) > 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("block_size", "topk", "init_blocks"),
    [(4, 3, 0), (5, 1, 0), (1, 4, 0), (7, 2, 0), (64, 2, 0), (4, 3, 1), (4, 4, 2), (5, 1, 1), (7, 2, 3)],
)
@pytest.mark.parametrize("kind", ["whole", "left padding", "packed"])
def test_each_head_of_each_query_sees_its_own_block_and_the_best_others(causal, block_size, topk, init_blocks, kind):
    length, pad = 45, 9
    given = inputs(2, length)
    segments = torch.stack([torch.arange(length) // 20, torch.arange(length) // 30])
    starts = [[0] * length for _ in range(2)]
    options = {}
    if kind == "left padding":
        options["padding_BK"] = left_padding([length, length - pad], length)
        starts[1] = [pad] * length
    if kind == "packed":
        options["segments_BK"] = segments
        starts = [[int((row == row[j]).nonzero()[0]) for j in range(length)] for row in segments]
    case = block_topk(causal, block_size=block_size, topk=topk, init_blocks=init_blocks)
    got = seen_by(case.module(value_dim=length), case.mask(2, length, length, **options), given)
    for b in range(2):
        for i in range(pad if kind == "left padding" and b else 0, length):
            same = [j for j in range(min(starts[b]), length) if starts[b][j] == starts[b][i]]
            blocks = [same[low : low + block_size] for low in range(0, len(same), block_size)]
            (own,) = (block for block in blocks if i in block)
            others = [block for block in blocks if block is not own and (block[-1] < i or not causal)]
            for h in range(4):
                q, k = given.q[b, h, i], given.k[b, h // 2]
                first = [block for block in blocks[: min(init_blocks, topk - 1)] if block in others]
                rest = [block for block in others if block not in first]
                best = [*first, *sorted(rest, key=lambda block: -(q @ k[block].mean(dim=0)).item())][: topk - 1]
                want = {j for block in [own, *best] for j in block if j <= i or not causal}
                assert set(got[b, i, h].nonzero().flatten().tolist()) == want, f"row {b}, query {i}, head {h}"


def test_padding_inside_a_block_has_no_part_in_its_mean():
    given = inputs(1, 12)
    padding = torch.ones(1, 12, dtype=torch.bool)
    padding[0, 5] = False
    case = block_topk(False, block_size=4, topk=2)
    chosen = []
    for junk in (0.0, 1e6):
        given.k[:, :, 5] = junk
        mask = case.mask(1, 12, 12, padding_BK=padding)
        chosen.append(choose_blocks(given.q, given.k, block_layout(mask, 4), 2))
    assert torch.equal(*chosen)


def test_blocks_are_scored_a_few_queries_at_a_time(monkeypatch):
    case = block_topk(block_size=3, topk=4)
    given, mask = inputs(2, 50), case.mask(2, 50, 50, padding_BK=left_padding([50, 41], 50))
    whole = choose_blocks(given.q, given.k, block_layout(mask, 3), 4)
    out = given.run(case.module(), mask)
    monkeypatch.setattr(gathered, "SCORES_AT_ONCE", 200)
    assert torch.equal(choose_blocks(given.q, given.k, block_layout(mask, 3), 4), whole)
    assert_same({"out": given.run(case.module(), mask)}, {"out": out}, 1e-12)


def test_layers_share_the_blocks_of_a_mask():
    mask = block_topk().mask(1, 50, 50)
    assert block_layout(mask, 8) is block_layout(mask, 8)
    assert block_layout(mask, 8) is not block_layout(mask, 4)


def test_nothing_of_topk_times_the_keys_is_kept_for_the_backward():
    case = block_topk(block_size=16, topk=4)
    given = inputs(1, 512)
    kept = kept_for_backward(case.module(), given, case.mask(1, 512, 512))
    # Inputs, the output and one number a query and head.
    assert 0 < kept <= 2 * given.q.numel() + given.k.numel() + given.v.numel() + 4 * 512


def test_dropout_keeps_the_mean_and_the_backward_draws_the_same():
    case = block_topk(block_size=3, topk=3)
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, mask, module = inputs(1, 40, **shape), case.mask(1, 40, 40), case.module(**shape)
    torch.manual_seed(0)
    mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(300)]).mean(dim=0)
    torch.testing.assert_close(mean, given.run(module, mask), rtol=0, atol=0.3)
    small = inputs(1, 8, **shape)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=case.mask(1, 8, 8), scale=SCALE, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (small.q, small.k, small.v)])


@pytest.mark.parametrize("causal", [True, False])
def test_scores_may_lie_any_distance_above_a_query_s_own(causal, monkeypatch):
    case = block_topk(causal, block_size=4, topk=3)
    given, mask = inputs(2, 40), case.mask(2, 40, 40, padding_BK=left_padding([40, 31], 40))
    given.k *= 30
    passes = []
    monkeypatch.setattr(gathered._Inputs, "max_scores", spy(gathered._Inputs.max_scores, passes))
    assert_forms_agree(case, given.to(torch.float32).to(torch.float64), mask, dtype=torch.float32, tolerance=1e-4)
    assert len(passes) == 1, "exp overflows, so the maximum is needed"
    assert_forms_agree(case, inputs(2, 40), mask)
    assert len(passes) == 1, "the level of a query's own key serves"


def spy(function, calls):
    def run(*args):
        calls.append(args)
        return function(*args)

    return run


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="block_size=0; allowed: an integer from 1 on"):
        BlockTopkAttention.Config(block_size=0)
    with pytest.raises(ValueError, match="topk=0; allowed: an integer from 1 on"):
        BlockTopkAttention.Config(topk=0)
