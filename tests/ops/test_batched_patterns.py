"""Index tables: what they hold, in pieces and where no value can be read, and all that one operation returns."""

import math

import pytest
import test_states
import torch
from cases import Case, assert_forms_agree, assert_same, inputs, left_padding, outcome, seeded
from torch._dynamo.testing import CompileCounter

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops import sizes
from attn_plugins.ops.decode import ring_buffer
from attn_plugins.ops.softmax import batched, tables, tile_engine
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.batched import batched_pattern_attention
from attn_plugins.ops.softmax.patterns import random_blocks
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.tiles import dense_pattern, tiled_attention

N = 90
CASES = [
    Case(get_attention(name), options, causal)
    for name, options in {
        "local": {"window_size": 7, "dilation": 2, "num_sink_tokens": 3},
        "longformer": {"window_size": 5, "num_global_tokens": 2},
        "block_local": {"block_size": 6},
        "shifted_block": {"group_size": 10},
        "bigbird": {"block_size": 3, "num_random_blocks": 2},
        "strided": {"stride": 7},
        "fixed": {"stride": 7, "num_summary_columns": 2},
    }.items()
    for causal in (True, False)
]
MASKS = {
    "whole": {},
    "padded": {"padding_BK": left_padding([N, 40], N)},
    "packed": {"segments_BK": torch.tensor([[1] * 13 + [2] * 2 + [3] * 75, [1] * 50 + [2] * 40])},
    "packed and padded": {
        "segments_BK": torch.tensor([[1] * 13 + [2] * 2 + [3] * 75]),
        "padding_BK": left_padding([80, 12], N).flip(1),
    },
}


def patterns(case, mask):
    return [pattern for _, pattern in case.module().patterns(4, mask)]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries", [N, 13])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tables_hold_each_visible_pair_once(case, queries, kind):
    mask = case.mask(2, queries, N, **MASKS[kind])
    for pattern in patterns(case, mask):
        held = torch.zeros(2, queries + 1, N + 1, dtype=torch.long)
        for table in pattern.tables(mask):
            of_rows = zip(*(x.expand(2, *x.shape[1:]) for x in table[:3]), strict=True)
            for row, (q_index, k_index, hidden) in enumerate(of_rows):
                some = q_index[q_index >= 0]
                assert len(some.unique()) == len(some), "a query is twice in a table"
                pairs = (q_index.unsqueeze(2).expand(hidden.shape), k_index.unsqueeze(1).expand(hidden.shape))
                held[row].index_put_(pairs, (~hidden).long(), accumulate=True)
        want = dense_pattern(mask, pattern)[:, 0].expand(2, -1, -1).long()
        wrong = (held[:, :-1, :-1] != want).any(dim=2)  # what padding sees nobody reads
        assert not (wrong if mask.padding_BK is None else wrong & mask.padding_BK[:, -queries:]).any()
        assert not held[:, -1].any()
        assert not held[:, :, -1].any()


@pytest.mark.parametrize("kind", ["packed", "packed and padded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_values_to_read_bounds_are_those_that_always_hold(case, kind, monkeypatch):
    given, mask = inputs(2, N), case.mask(2, N, N, **MASKS[kind])
    cotangent = torch.ones(2, N, 4, 8, dtype=torch.float64)
    want = outcome(case.module(backend="reference"), given, mask, cotangent)
    for module in (tables, random_blocks):
        monkeypatch.setattr(module, "readable", lambda *tensors: False)
    got = outcome(case.module(backend="batched"), given, case.mask(2, N, N, **MASKS[kind]), cotangent)
    assert_same(got, want, 1e-9)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_pieces_give_the_same(case, monkeypatch):
    given, mask = inputs(2, N), case.mask(2, N, N, padding_BK=left_padding([N, 40], N))
    bias = torch.randn(2, 4, N, N, generator=seeded(1), dtype=torch.float64)
    given.extras = {"position_bias": bias, "softcap": 0.7}
    monkeypatch.setattr(sizes, "SCORES_AT_ONCE_ELSEWHERE", 4000)
    gathered, count = batched._Call.gathered, []
    monkeypatch.setattr(batched._Call, "gathered", lambda *given: count.append(0) or gathered(*given))
    assert_forms_agree(case, given, mask, backend="batched")
    assert len(count) > 6


@pytest.mark.parametrize("pattern", [Band(6, 5), Band(6, 5, num_first=3, first_see_all=True)], ids=str)
def test_parts_of_a_softmax_and_their_gradients(pattern):
    """Log-sum-exp and highest score too, where keys of a query are in several tables, and where it sees nothing."""
    given, mask = inputs(2, 40), AttentionMask(2, 40, 40, causal=False, padding_BK=left_padding([40, 9], 40))
    real = mask.padding_BK[:, None, :, None]

    def run(attend):
        leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
        parts = attend(*leaves, mask, pattern, scale=0.4, return_lse=True)
        parts = [torch.where(real, x, 0.0) for x in parts]
        loss = sum((part * math.pi**number).sin().sum() for number, part in enumerate(parts))
        return dict(enumerate([*parts, *torch.autograd.grad(loss, leaves)]))

    def dense(q, k, v, mask, pattern, *, scale, return_lse):
        scores = (scale * q @ k.repeat_interleave(2, dim=1).mT).masked_fill(~dense_pattern(mask, pattern), -torch.inf)
        top = scores.max(dim=-1, keepdim=True).values
        out = scores.masked_fill(top == -torch.inf, 0.0).softmax(-1) @ v.repeat_interleave(2, dim=1)
        return tile_engine.SoftmaxParts(out, scores.logsumexp(-1, keepdim=True), top)

    assert_same(run(batched_pattern_attention), run(dense), 1e-9)
    if not pattern.num_first:
        assert_same(run(batched_pattern_attention), run(tiled_attention), 1e-9)


@pytest.mark.parametrize(
    "case", [case for case in test_states.KEEPING if issubclass(case.cls, PatternAttention)], ids=str
)
def test_a_state_goes_on_by_tables(case, monkeypatch):
    """As on devices that are not a CPU: the pieces of a text, after what a window has kept."""
    used = []

    def by_tables(*given, **options):
        used.append(0)
        return batched_pattern_attention(*given, **options)

    monkeypatch.setattr(ring_buffer, "pattern_attention", by_tables)
    monkeypatch.setattr(ring_buffer, "rows_for", lambda window: 8)
    for split in ("prefill, then single tokens", "pieces", "padding alone, then all"):
        test_states.test_every_split_of_a_text_gives_what_one_pass_gives(case, split)
    assert len(used) > 10


@pytest.mark.slow
def test_a_compiled_call_holds_for_other_lengths():
    case, count = CASES[0], CompileCounter()
    module = case.module(backend="batched", dtype=torch.float32)

    def attend(q, k, v, padding_BK):
        mask = case.mask(2, q.shape[2], k.shape[2], padding_BK=padding_BK, device="cpu")
        return module(q, k, v, mask=mask, scale=0.4)[0]

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=count, fullgraph=True)
    for length in (N, 110, 155):
        given, padding = inputs(2, length).to(torch.float32), left_padding([length, 70], length)
        got, want = (run(given.q, given.k, given.v, padding)[padding] for run in (compiled, attend))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert count.frame_count == 2, "one for the first length, one for all"


def with_labels(table):
    labels = torch.randint(-1, 3, table.hidden_BTRC.shape, generator=seeded(4))
    return table._replace(label_BTRC=labels)


def test_the_operation_keeps_what_torch_asks_of_operations():
    given, mask = inputs(1, 20).to(torch.float32), AttentionMask(1, 20, 20, causal=True)
    flat = [x for table in Band(4, 3, num_first=2).tables(mask) for x in table]
    leaves = [x.requires_grad_() for x in (given.q, given.k, given.v)]
    bias, sinks, seed = (
        torch.randn(1, 1, 20, 20, requires_grad=True),
        torch.randn(4, requires_grad=True),
        torch.tensor(3),
    )
    labelled = [x for table in Band(4, 3, num_first=2).tables(mask) for x in with_labels(table)]
    label_bias = torch.randn(4, 3, requires_grad=True)
    for extras, tables_ in (((None,) * 4, flat), ((bias, sinks, label_bias, seed), labelled)):
        arguments = (*leaves, *extras, tables_, 0.5, None if extras[0] is None else 2.0, 0.1, 0, True)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(batched.attend_at_once, arguments, test_utils=checks)


def test_what_is_dropped_is_spread_evenly_and_differs_between_seeds():
    given, mask = inputs(2, 256), AttentionMask(2, 256, 256, causal=False)
    flat = [x for table in Band(256, 255).tables(mask) for x in table]

    def dropped(seed):
        call = batched._Call(given.q, given.k, given.v, None, torch.tensor(seed), flat, 0.5, None, 0.25)
        (piece,) = call.pieces(call.parts[0])
        return call.unflattened(call.dropped(piece)).double()

    first = dropped(5)
    assert torch.equal(first, dropped(5))
    n = first.numel()
    assert abs(first.mean() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    centred = first - 0.25
    for other in (dropped(6), first.flip(0), first.flip(1), first.roll(1, -1), first.roll(1, -2), first.roll(1, 3)):
        assert abs((centred * (other - 0.25)).mean() / (0.25 * 0.75)) < 5 / n**0.5
    for dim in (4, 5):  # rows and columns of the tiles
        spread = first.mean(dim=dim).std() / (0.25 * 0.75 / first.shape[dim]) ** 0.5
        assert 0.9 < spread < 1.1
