"""Attentions with a pattern that is known before the scores: who sees whom against plain Python, tiles, and costs."""

import functools

import pytest
import torch
from cases import Case, assert_same, inputs, kept_for_backward, left_padding, outcome

from attn_plugins.attentions.local import LocalAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.softmax.patterns.random_blocks import drawn


def case_of(name, causal=True, **options):
    return Case(get_attention(name), options, causal)


def seen_by(case, mask, num_heads=1):
    """(B, H, Q, K) bool: which values the fast form's output depends on."""
    given = inputs(mask.batch_size, mask.q_length, mask.kv_length, num_heads=num_heads, num_key_value_heads=1)
    given.v = torch.eye(mask.kv_length, dtype=torch.float64).expand(mask.batch_size, 1, -1, -1)
    module = case.module(num_heads, 1, value_dim=mask.kv_length)
    return given.run(module, mask).transpose(1, 2) > 0


# Each says whether the token at place i of its sequence of n sees the one at place j, in head h of 2, future or not.


def local(i, j, n, h, *, causal, window_size, look_forward, dilation, num_sink_tokens):
    ahead = window_size - 1 if look_forward is None else look_forward
    window = [i - dilation * t for t in range(window_size)] + [i + dilation * t for t in range(ahead + 1)]
    return j in window or j < num_sink_tokens


def block_local(i, j, n, h, *, causal, block_size, look_backward, look_forward, num_sink_tokens):
    own = i // block_size
    near = (own - look_backward) * block_size <= j < (own + 1 + look_forward) * block_size
    return near or j < num_sink_tokens


def longformer(i, j, n, h, *, causal, window_size, num_global_tokens):
    return abs(i - j) < window_size or i < num_global_tokens or j < num_global_tokens


def shifted_block(i, j, n, h, *, causal, group_size, num_sink_tokens):
    borders = range(group_size - group_size // 2 * h, n + group_size, group_size)
    return sum(i >= border for border in borders) == sum(j >= border for border in borders) or j < num_sink_tokens


def strided(i, j, n, h, *, causal, stride, num_local_blocks, num_sink_tokens):
    return abs(i - j) < stride * num_local_blocks or (i - j) % stride == 0 or j < num_sink_tokens


def fixed(i, j, n, h, *, causal, stride, num_local_blocks, num_summary_columns, num_sink_tokens):
    near = abs(i // stride - j // stride) < num_local_blocks
    return near or j % stride + num_summary_columns >= stride or j < num_sink_tokens


def signed(number):
    return (number + 2**63) % 2**64 - 2**63


def mixed(number):
    number = signed((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9)
    number = signed((number ^ (number >> 27)) * 0x94D049BB133111EB)
    return number ^ (number >> 31)


def bigbird(i, j, n, h, *, causal, block_size, num_random_blocks, num_global_blocks, num_sliding_window_blocks, seed):
    own, block = i // block_size, j // block_size
    if min(own, block) < num_global_blocks:
        return True  # what is in the future is hidden by the caller
    side = num_sliding_window_blocks // 2
    window = range(own - num_sliding_window_blocks + 1, own + 1) if causal else range(own - side, own + side + 1)
    count = own if causal else -(-n // block_size)
    others = [c for c in range(num_global_blocks, count) if c not in window]
    others.sort(key=lambda c: mixed(mixed(mixed(seed) + own) + c))
    return block in window or block in others[:num_random_blocks]


PATTERNS = [
    (local, {"window_size": 5, "look_forward": 2, "dilation": 1, "num_sink_tokens": 0}),
    (local, {"window_size": 3, "look_forward": None, "dilation": 4, "num_sink_tokens": 13}),
    (local, {"window_size": 30, "look_forward": 1, "dilation": 2, "num_sink_tokens": 1}),
    (block_local, {"block_size": 7, "look_backward": 2, "look_forward": 1, "num_sink_tokens": 0}),
    (block_local, {"block_size": 90, "look_backward": 0, "look_forward": 0, "num_sink_tokens": 0}),
    (block_local, {"block_size": 7, "look_backward": 1, "look_forward": 0, "num_sink_tokens": 9}),
    (longformer, {"window_size": 4, "num_global_tokens": 3}),
    (longformer, {"window_size": 9, "num_global_tokens": 70}),
    (shifted_block, {"group_size": 9, "num_sink_tokens": 0}),
    (shifted_block, {"group_size": 9, "num_sink_tokens": 6}),
    (shifted_block, {"group_size": 80, "num_sink_tokens": 0}),
    (strided, {"stride": 6, "num_local_blocks": 2, "num_sink_tokens": 0}),
    (strided, {"stride": 70, "num_local_blocks": 1, "num_sink_tokens": 0}),
    (strided, {"stride": 11, "num_local_blocks": 1, "num_sink_tokens": 3}),
    (fixed, {"stride": 6, "num_local_blocks": 1, "num_summary_columns": 2, "num_sink_tokens": 0}),
    (fixed, {"stride": 20, "num_local_blocks": 2, "num_summary_columns": 1, "num_sink_tokens": 0}),
    (fixed, {"stride": 9, "num_local_blocks": 1, "num_summary_columns": 2, "num_sink_tokens": 4}),
    (
        bigbird,
        {
            "block_size": 5,
            "num_random_blocks": 2,
            "num_global_blocks": 1,
            "num_sliding_window_blocks": 3,
            "seed": 0,
        },
    ),
    (
        bigbird,
        {
            "block_size": 3,
            "num_random_blocks": 4,
            "num_global_blocks": 2,
            "num_sliding_window_blocks": 1,
            "seed": 9,
        },
    ),
]


def every_pattern():
    return pytest.mark.parametrize(
        ("rule", "options"), PATTERNS, ids=[f"{rule.__name__}{index}" for index, (rule, _) in enumerate(PATTERNS)]
    )


@every_pattern()
@pytest.mark.parametrize("causal", [True, False])
def test_each_query_sees_what_the_pattern_says(rule, options, causal):
    length, case = 100, case_of(rule.__name__, causal, **options)

    @functools.cache
    def alone(size):
        """(heads, queries, keys) of a sequence by itself."""
        places = range(size)
        seen = [
            [
                [(j <= i or not causal) and bool(rule(i, j, size, h, causal=causal, **options)) for j in places]
                for i in places
            ]
            for h in ((0, 1) if rule is shifted_block else (0,))
        ]
        return torch.tensor(seen).expand(2, -1, -1)

    # The lengths of what lies in each of two rows, negative for padding, and the mask's tables.
    rows = {
        "whole": ([length], [length]),
        "padding": ([length], [-18, 75, -7]),
        "packed": ([70, 30], [11] * 9 + [1]),
    }
    tables = {
        "padding": {
            "padding_BK": left_padding([length, length - 18], length)
            & (torch.arange(length) < torch.tensor([[100], [93]]))
        },
        "packed": {"segments_BK": torch.stack([torch.arange(length) // 70, torch.arange(length) // 11])},
    }
    for kind, parts in rows.items():
        got = seen_by(case, AttentionMask(2, length, length, causal=causal, **tables.get(kind, {})), num_heads=2)
        for row, sizes in enumerate(parts):
            want, at = torch.zeros(2, length, length, dtype=torch.bool), 0
            for size in sizes:
                here = slice(at, at + abs(size))
                if size > 0:
                    want[:, here, here] = alone(size)
                else:
                    want[:, here] = got[row, :, here]  # what padding sees does not matter
                at = here.stop
            wrong = (got[row] != want).nonzero()
            assert not len(wrong), f"{kind}: row {row}: (head, query, key) {wrong[0].tolist()}"


@every_pattern()
def test_a_cache_that_has_dropped_keys_changes_nothing_but_them(rule, options):
    case = case_of(rule.__name__, **options)
    keys, dropped = 130, 33
    padding = left_padding([keys, keys - 47], keys)
    whole = seen_by(case, AttentionMask(2, keys, keys, causal=True, padding_BK=padding), num_heads=2)
    for queries in (1, 50):
        held = AttentionMask(
            2,
            queries,
            keys - dropped,
            causal=True,
            kv_offset=dropped,
            padding_BK=padding[:, dropped:],
            first_B=torch.tensor([0, 47]) - dropped,
        )
        assert torch.equal(seen_by(case, held, num_heads=2), whole[:, :, -queries:, dropped:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@every_pattern()
def test_fast_form_equals_reference_with_all_extras(rule, options, causal, kind):
    keys = 150
    tables = {}
    if kind == "padded":
        tables["padding_BK"] = left_padding([keys - 17, keys], keys)
        tables["padding_BK"][1, -5:] = False
    if kind == "packed":
        tables["segments_BK"] = torch.stack([torch.arange(keys) // 11, torch.arange(keys) // 90])
    generator = torch.Generator().manual_seed(1)
    case = case_of(rule.__name__, causal, **options)
    for queries, heads, groups in ((keys, 6, 3), (9, 2, 1)) if causal else ((keys, 4, 2),):
        shape = {"num_heads": heads, "num_key_value_heads": groups, "value_dim": 6}
        given = inputs(2, queries, keys, **shape)
        given.extras = {
            "softcap": 2.0,
            "sinks": torch.randn(heads, generator=generator, dtype=torch.float64),
            "position_bias": torch.randn(2, heads, queries, keys, generator=generator, dtype=torch.float64),
        }
        mask = case.mask(2, queries, keys, **tables)
        real = tables.get("padding_BK", torch.ones(2, keys, dtype=torch.bool))[:, -queries:, None, None]
        cotangent = torch.randn(2, queries, heads, 6, generator=generator, dtype=torch.float64) * real
        got, want = (
            outcome(case.module(heads, groups, value_dim=6, backend=form), given, mask, cotangent)
            for form in ("torch", "reference")
        )
        for result in (got, want):
            result["out"] = result["out"] * real
        assert_same(got, want, 1e-9)


@pytest.mark.parametrize("causal", [True, False])
@every_pattern()
def test_tiles_that_are_alike_share_a_mask(rule, options, causal):
    length, shape = 420, {"num_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "value_dim": 4}
    case = case_of(rule.__name__, causal, **options)
    for queries in (length, 330) if causal else (length,):
        given, mask = inputs(1, queries, length, **shape), case.mask(1, queries, length)
        cotangent = torch.ones(1, queries, 2, 4).cumsum(dim=1)
        got, want = (
            outcome(case.module(**shape, backend=form), given, mask, cotangent) for form in ("torch", "reference")
        )
        assert_same(got, want, 1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 90, 90), (4, 90, 90), (90, 90)])
@pytest.mark.parametrize("name", ["bigbird", "strided", "shifted_block"])
def test_position_bias_may_have_fewer_dimensions(name, shape):
    case = case_of(name, **{"bigbird": {"block_size": 4}, "strided": {"stride": 7}}.get(name, {"group_size": 8}))
    given = inputs(2, 90)
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given.extras = {"position_bias": bias}
    mask = case.mask(2, 90, 90, padding_BK=left_padding([90, 80], 90))
    cotangent = torch.ones(2, 90, 4, 8, dtype=torch.float64) * mask.padding_BK[:, :, None, None]
    got, want = (outcome(case.module(backend=form), given, mask, cotangent) for form in ("torch", "reference"))
    for result in (got, want):
        result["out"] = result["out"] * mask.padding_BK[:, :, None, None]
    assert_same(got, want, 1e-9)


N = 2048


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["whole", "padded"])
@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("local", {"window_size": 32}, 64),
        ("local", {"window_size": 32, "dilation": 8, "num_sink_tokens": 4}, 64 + 4),
        ("block_local", {"block_size": 32}, 3 * 32),
        ("longformer", {"window_size": 32, "num_global_tokens": 2}, 64 + 2 + 2),
        ("strided", {"stride": 64}, 2 * 64 + N // 64),
        ("fixed", {"stride": 64, "num_summary_columns": 2}, 64 + N // 64 * 2),
        ("bigbird", {"block_size": 16}, 7 * 16 + 16),
    ],
    ids=str,
)
def test_tiles_hold_little_more_than_the_pattern(name, options, keys, causal, kind):
    case = case_of(name, causal, **options)
    padding = left_padding([N - 5], N) if kind == "padded" else None
    mask = case.mask(1, N, N, padding_BK=padding)
    ((_, pattern),) = case.module().patterns(4, mask)
    tiles = list(pattern.tiles(mask))
    pairs = 0
    for tile in tiles:
        rows = len(range(N)[tile.queries]) if isinstance(tile.queries, slice) else tile.queries.shape[1]
        extra = 0 if tile.extra is None else tile.extra.shape[1]
        pairs += rows * (extra + sum(len(range(N)[part]) for part in tile.keys))
    # A tile of 64 queries holds 63 keys more than one of them sees; strided ones twice.
    assert pairs <= N * (keys + 2 * 64)


def test_nothing_but_inputs_output_and_normaliser_is_kept_for_the_backward():
    given = inputs(1, 512)
    sizes = given.q.numel() + given.k.numel() + given.v.numel()
    parts = given.q.numel() + given.q[..., 0].numel()
    for name, options, more in (
        ("bigbird", {"block_size": 16}, 0),
        ("fixed", {"stride": 16, "num_sink_tokens": 0}, 0),
        ("fixed", {"stride": 16, "num_sink_tokens": 4}, parts),
        ("strided", {"stride": 16, "num_sink_tokens": 0}, parts),
        ("strided", {"stride": 16, "num_sink_tokens": 4}, parts),
    ):
        case = case_of(name, **options)
        assert 0 < kept_for_backward(case.module(), given, case.mask(1, 512, 512)) <= sizes + more, name


@pytest.mark.parametrize(("name", "options"), [("strided", {"stride": 3}), ("bigbird", {"block_size": 2})])
def test_dropout_keeps_the_mean_and_the_backward_draws_the_same(name, options):
    case = case_of(name, **options)
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, mask, module = inputs(1, 8, **shape), case.mask(1, 8, 8), case.module(**shape)
    torch.manual_seed(0)
    mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(200)]).mean(dim=0)
    torch.testing.assert_close(mean, given.run(module, mask), rtol=0, atol=0.4)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=mask, scale=0.4, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (given.q, given.k, given.v)])


def test_random_blocks_stay_as_a_sequence_grows_and_differ_between_seeds():
    number = torch.arange(60)
    short = drawn(number[:30], number[:30], 30, 1, (2, 0), 3, 0)
    long = drawn(number, number, 60, 1, (2, 0), 3, 0)
    assert torch.equal(long[:30], short)
    assert not torch.equal(drawn(number, number, 60, 1, (2, 0), 3, 1), long)
    # Each candidate about as often as every other: 3 of 56 for each of 2000 seeds.
    last, count = torch.tensor([59]), torch.zeros(60)
    for seed in range(2000):
        count[drawn(last, last, 60, 1, (2, 0), 3, seed)[0]] += 1
    assert count[1:57].min() > 60
    assert count[1:57].max() < 160
    assert count.sum() == count[1:57].sum() == 6000


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("local", "look_forward", -1, "None or an integer from 0 on"),
        ("local", "dilation", 0, "an integer from 1 on"),
        ("block_local", "block_size", 0, "an integer from 1 on"),
        ("block_local", "look_backward", -1, "an integer from 0 on"),
        ("block_local", "look_forward", -1, "an integer from 0 on"),
        ("longformer", "window_size", 0, "None or an integer from 1 on"),
        ("longformer", "num_global_tokens", -1, "None or an integer from 0 on"),
        ("block_local", "num_sink_tokens", -1, "None or an integer from 0 on"),
        ("strided", "num_sink_tokens", -1, "None or an integer from 0 on"),
        ("fixed", "num_sink_tokens", -1, "None or an integer from 0 on"),
        ("shifted_block", "group_size", 1, "an integer from 2 on"),
        ("strided", "stride", 0, "an integer from 1 on"),
        ("strided", "num_local_blocks", 0, "an integer from 1 on"),
        ("fixed", "stride", 0, "an integer from 1 on"),
        ("fixed", "num_local_blocks", 0, "an integer from 1 on"),
        ("fixed", "num_summary_columns", 129, "an integer from 1 to stride"),
        ("bigbird", "block_size", 0, "None or an integer from 1 on"),
        ("bigbird", "num_random_blocks", -1, "None or an integer from 0 on"),
        ("bigbird", "num_global_blocks", -1, "an integer from 0 on"),
        ("bigbird", "num_sliding_window_blocks", 2, "an odd integer from 1 on"),
        ("bigbird", "seed", -1, r"an integer from 0 to 2\*\*63 - 1"),
    ],
)
def test_options_out_of_range_are_refused(name, option, value, allowed):
    with pytest.raises(ValueError, match=f"{option}={value}; allowed: {allowed}"):
        get_attention(name).Config(**{option: value})


def test_longformer_is_that_of_transformers():
    """Theirs has a second set of projections for global tokens, here made the same as the first."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    length, number = 48, 3
    config = LongformerConfig(
        hidden_size=32, num_attention_heads=4, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).eval()
    for part in ("query", "key", "value"):
        getattr(theirs, f"{part}_global").load_state_dict(getattr(theirs, part).state_dict())
    hidden = torch.randn(2, length, 32)
    real = torch.arange(length) < torch.tensor([[length], [41]])
    is_global = (torch.arange(length) < number).expand(2, -1)
    want = theirs(
        hidden,
        attention_mask=torch.where(real, 0.0, -10000.0).masked_fill(is_global, 10000.0),
        is_index_masked=~real,
        is_index_global_attn=is_global,
        is_global_attn=True,
    )[0]
    q, k, v = (
        projection(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
        for projection in (theirs.query, theirs.key, theirs.value)
    )
    ours = case_of("longformer", window_size=8 // 2 + 1, num_global_tokens=number).module(dtype=torch.float32)
    got, _ = ours(q, k, v, mask=AttentionMask(2, length, length, causal=False, padding_BK=real), scale=8**-0.5)
    torch.testing.assert_close(got.flatten(2)[real], want[real], rtol=1e-4, atol=1e-5)


def test_bigbird_is_that_of_transformers():
    """Theirs makes the last block global as well, here hidden as padding; and it is given our random blocks."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    torch.manual_seed(0)
    size, blocks, number = 4, 13, 2
    length = size * blocks
    config = BigBirdConfig(hidden_size=32, num_attention_heads=4, block_size=size, num_random_blocks=number)
    theirs = BigBirdBlockSparseAttention(config, seed=0).eval()
    hidden = torch.randn(1, length, 32)
    real = torch.arange(length).unsqueeze(0) < length - size
    inner = torch.arange(1, blocks - 1)
    random = drawn(inner, torch.full_like(inner, blocks - 1), blocks, 1, (1, 1), number, 3)
    assert (random >= 0).all()
    theirs._bigbird_block_rand_mask_with_head = lambda **options: [random.numpy()] * 4
    blocked, band, start, end = BigBirdModel.create_masks_for_block_sparse_attn(real.float(), size)
    want, _ = theirs(
        hidden, band_mask=band, from_mask=start, to_mask=end, from_blocked_mask=blocked, to_blocked_mask=blocked
    )
    q, k, v = (
        projection(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
        for projection in (theirs.query, theirs.key, theirs.value)
    )
    ours = case_of("bigbird", block_size=size, num_random_blocks=number, seed=3).module(dtype=torch.float32)
    got, _ = ours(q, k, v, mask=AttentionMask(1, length, length, causal=False, padding_BK=real), scale=8**-0.5)
    torch.testing.assert_close(got.flatten(2)[real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("causal", [True, False])
def test_block_local_is_that_of_local_attention(causal):
    peer = pytest.importorskip("local_attention", reason="pip install local-attention")
    size, length = 8, 48
    theirs = peer.LocalAttention(
        window_size=size, causal=causal, look_backward=1, look_forward=0 if causal else 1, use_rotary_pos_emb=False
    )
    given = inputs(2, length, num_key_value_heads=4).to(torch.float32)
    want = theirs(given.q, given.k, given.v)
    case = case_of("block_local", causal, block_size=size)
    got, _ = case.module(dtype=torch.float32)(
        given.q, given.k, given.v, mask=case.mask(2, length, length), scale=8**-0.5
    )
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-4, atol=1e-5)


def test_a_dilated_window_has_as_many_keys():
    case = Case(LocalAttention, {"window_size": 5, "dilation": 7, "num_sink_tokens": 0}, True)
    seen = seen_by(case, case.mask(1, 100, 100))[0, 0]
    assert seen[99].nonzero().flatten().tolist() == [71, 78, 85, 92, 99]
