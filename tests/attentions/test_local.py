"""What is particular to windows and sinks; the contract is in test_contract.py."""

import pytest
import torch
from cases import SCALE, Case, assert_same, inputs, kept_for_backward, left_padding, outcome

from attn_plugins.attentions.local import LocalAttention
from attn_plugins.core.mask import AttentionMask


def local(causal=True, **options):
    return Case(LocalAttention, options, causal)


def seen_by(module, mask):
    """(B, Q, K) bool: which values the fast form's output depends on."""
    given = inputs(mask.batch_size, mask.q_length, mask.kv_length, num_heads=1, num_key_value_heads=1)
    given.v = torch.eye(mask.kv_length, dtype=torch.float64).expand(mask.batch_size, 1, -1, -1)
    return given.run(module, mask)[:, :, 0] > 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window_size", "num_sink_tokens"), [(1, 0), (3, 0), (4, 2), (2, 7), (90, 1)])
@pytest.mark.parametrize("kind", ["whole", "left padding", "packed"])
def test_each_query_sees_its_window_and_its_sinks(causal, window_size, num_sink_tokens, kind):
    length, pads = 150, (0, 20)
    segments = [[j // 70 for j in range(length)], [j // 9 for j in range(length)]]
    options = {
        "whole": {},
        "left padding": {"padding_BK": left_padding([length - pad for pad in pads], length)},
        "packed": {"segments_BK": torch.tensor(segments)},
    }[kind]
    module = local(window_size=window_size, num_sink_tokens=num_sink_tokens).module(1, 1, value_dim=length)
    got = seen_by(module, AttentionMask(2, length, length, causal=causal, **options)).tolist()
    for b in range(2):
        start = pads[b] if kind == "left padding" else 0
        number = segments[b] if kind == "packed" else [0] * length
        for i in range(start, length):
            for j in range(length):
                first = max(start, number.index(number[j]))
                want = abs(i - j) < window_size or j - first < num_sink_tokens
                want = want and j >= first and number[i] == number[j] and (j <= i or not causal)
                assert got[b][i][j] == want, f"row {b}, query {i}, key {j}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extras", ["", "softcap sinks position_bias"])
@pytest.mark.parametrize("kind", ["whole", "padded", "packed", "both"])
@pytest.mark.parametrize("queries", [1, 70, 200])
def test_fast_form_equals_reference_over_many_tiles(causal, extras, kind, queries):
    keys = 200
    padding = left_padding([keys - 17, keys], keys)
    padding[1, -5:] = False
    options = {"padding_BK": padding} if kind in ("padded", "both") else {}
    if kind in ("packed", "both"):
        options["segments_BK"] = torch.stack([torch.arange(keys) // 23, torch.arange(keys) // 90])
    given = inputs(2, queries, keys, value_dim=6)
    generator = torch.Generator().manual_seed(1)
    every = {
        "softcap": 2.0,
        "sinks": torch.randn(4, generator=generator, dtype=torch.float64),
        "position_bias": torch.randn(1, 4, queries, keys, generator=generator, dtype=torch.float64),
    }
    given.extras = {name: every[name] for name in extras.split()}
    for window_size, num_sink_tokens in ((5, 0), (4, 3), (2, 6), (100, 2)):
        case = local(causal, window_size=window_size, num_sink_tokens=num_sink_tokens)
        mask = case.mask(2, queries, keys, **options)
        real = padding[:, -queries:] if "padding_BK" in options else torch.ones(2, queries, dtype=torch.bool)
        cotangent = torch.randn(2, queries, 4, 6, generator=generator, dtype=torch.float64) * real[:, :, None, None]
        got = outcome(case.module(value_dim=6), given, mask, cotangent)
        want = outcome(case.module(value_dim=6, backend="reference"), given, mask, cotangent)
        for result in (got, want):
            result["out"] = result["out"] * real[:, :, None, None]
        assert_same(got, want, 1e-9, f"{case}: ")


def test_position_bias_may_differ_between_rows_and_have_fewer_dimensions():
    for shape in ((2, 4, 90, 90), (1, 1, 90, 90), (4, 90, 90), (90, 90)):
        case = local(window_size=6, num_sink_tokens=3)
        given = inputs(2, 90)
        given.extras = {
            "position_bias": torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        }
        mask = case.mask(2, 90, 90, padding_BK=left_padding([90, 80], 90))
        cotangent = torch.ones(2, 90, 4, 8, dtype=torch.float64) * mask.padding_BK[:, :, None, None]
        got, want = (outcome(case.module(backend=form), given, mask, cotangent) for form in ("torch", "reference"))
        for result in (got, want):
            result["out"] = result["out"] * mask.padding_BK[:, :, None, None]
        assert_same(got, want, 1e-9)


def test_wide_windows_have_wider_tiles():
    case = local(window_size=1030, num_sink_tokens=2)
    shape = {"num_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, mask = inputs(1, 1300, **shape), case.mask(1, 1300, 1300)
    got, want = (given.run(case.module(**shape, backend=form), mask) for form in ("torch", "reference"))
    assert_same({"out": got}, {"out": want}, 1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoding_step_reads_the_window_and_the_sinks_only(padded):
    keys, pad = 3000, 40 if padded else 0
    case = local(window_size=16, num_sink_tokens=4)
    given = inputs(1, 1, keys)
    mask = case.mask(1, 1, keys, padding_BK=left_padding([keys - pad], keys) if padded else None)
    want = given.run(case.module(backend="reference"), mask)
    unread = torch.ones(keys, dtype=torch.bool)
    unread[pad : pad + 4] = False
    unread[-16:] = False
    given.k[:, :, unread] = float("nan")
    given.v[:, :, unread] = float("nan")
    assert_same({"out": given.run(case.module(), mask)}, {"out": want}, 1e-9)


def test_a_cache_that_has_dropped_keys_changes_nothing_but_them():
    keys, dropped = 60, 25
    case = local(window_size=8, num_sink_tokens=3)
    given = inputs(2, keys)
    padding = left_padding([keys, keys - 27], keys)
    out = given.run(case.module(), case.mask(2, keys, keys, padding_BK=padding))
    held = given.tokens(slice(dropped, None))
    held.q = held.q[:, :, -1:]
    first = torch.tensor([0, 27]) - dropped
    mask = case.mask(2, 1, keys - dropped, kv_offset=dropped, padding_BK=padding[:, dropped:], first_B=first)
    got = held.run(case.module(), mask)
    # The second row's sinks are still there, the first row's are gone, and nothing takes their place.
    assert_same({"out": got[1, 0]}, {"out": out[1, -1]}, 1e-9)
    without = local(window_size=8, num_sink_tokens=0).module()
    alone = given.run(without, case.mask(2, keys, keys, padding_BK=padding))
    assert_same({"out": got[0, 0]}, {"out": alone[0, -1]}, 1e-9)


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_sinks_that_a_cache_has_dropped_in_part_are_counted_once(dropped):
    case = local(window_size=4, num_sink_tokens=3)
    given = inputs(1, 1, 30)
    mask = case.mask(1, 1, 30, kv_offset=dropped)
    assert_same(
        {"out": given.run(case.module(), mask)}, {"out": given.run(case.module(backend="reference"), mask)}, 1e-9
    )


def test_layers_share_what_is_computed_from_the_mask():
    asked = []

    def rule(b, h, q, k):
        asked.append(q.shape)
        return k <= q

    mask = AttentionMask(1, 150, 150, causal=True, plain=False, rule=rule)
    case = local(window_size=20, num_sink_tokens=2)
    given = inputs(1, 150)
    given.run(case.module(), mask)
    first = len(asked)
    given.run(case.module(), mask)
    assert first > 0
    assert len(asked) == first, "the second layer evaluates the mask again"
    given.run(local(window_size=21, num_sink_tokens=2).module(), mask)
    assert len(asked) > first, "another window has masks of its own"


def test_nothing_but_inputs_is_kept_for_the_backward():
    case = local(window_size=32, num_sink_tokens=4)
    given = inputs(1, 512)
    kept = kept_for_backward(case.module(), given, case.mask(1, 512, 512))
    assert 0 < kept <= given.q.numel() + given.k.numel() + given.v.numel()


def test_dropout_keeps_the_mean_and_the_backward_draws_the_same():
    case = local(window_size=6, num_sink_tokens=2)
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, mask, module = inputs(1, 70, **shape), case.mask(1, 70, 70), case.module(**shape)
    torch.manual_seed(0)
    mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(300)]).mean(dim=0)
    torch.testing.assert_close(mean, given.run(module, mask), rtol=0, atol=0.3)
    small = inputs(1, 7, **shape)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=case.mask(1, 7, 7), scale=SCALE, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (small.q, small.k, small.v)])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="window_size=0; allowed: an integer from 1 on"):
        LocalAttention.Config(window_size=0)
    with pytest.raises(ValueError, match="num_sink_tokens=-1; allowed: None or an integer from 0 on"):
        LocalAttention.Config(num_sink_tokens=-1)
