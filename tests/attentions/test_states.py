"""The contract of states: what an attention keeps of the tokens seen stands for all of them."""

import contextlib
import copy
import io

import pytest
import torch
from cases import CASES, EXACT, Inputs, every_class, inputs, left_padding

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask

LENGTH = 41
LENGTHS = (41, 23, 4)
"""Real tokens of the rows: one without padding, one that begins in the midst, one that begins late."""
SPLITS = {
    "single tokens": [1] * LENGTH,
    "prefill, then single tokens": [29] + [1] * 12,
    "pieces": [5, 1, 13, 2, 1, 19],
    "padding alone, then all": [18, 23],
}
KEEPING = [case for case in CASES if case.causal and case.module().new_state() is not None]

every_state = pytest.mark.parametrize("case", KEEPING, ids=str)


def text(lengths=LENGTHS, length=LENGTH):
    return inputs(len(lengths), length), left_padding(lengths, length) if min(lengths) < length else None


def whole(case, module, given, padding):
    with torch.no_grad():
        return given.run(module, case.mask(len(given.q), LENGTH, LENGTH, padding_BK=padding))


def piece(module, state, given, padding, start, end):
    """Outputs of the tokens from ``start`` to ``end``, which the state takes in."""
    mask = AttentionMask(
        len(given.q), end - start, end, causal=True, padding_BK=None if padding is None else padding[:, :end]
    )
    return given.tokens(slice(start, end)).run(module, mask, state=state)


def run(module, state, given, padding, sizes, start=0):
    outs = []
    for size in sizes:
        outs.append(piece(module, state, given, padding, start, start + size))
        start += size
    return torch.cat(outs, dim=1)


def assert_equal(got, want, padding, start=0):
    real = torch.ones(want.shape[:2], dtype=torch.bool) if padding is None else padding[:, start:]
    torch.testing.assert_close(got[real], want[real], atol=EXACT, rtol=EXACT)


@every_state
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_every_split_of_a_text_gives_what_one_pass_gives(case, split):
    module = case.module()
    for lengths in (LENGTHS, (LENGTH,)):
        given, padding = text(lengths)
        state = module.new_state()
        got = run(module, state, given, padding, SPLITS[split])
        assert_equal(got, whole(case, module, given, padding), padding)
        assert state.seen == LENGTH


@every_state
@torch.no_grad()
def test_rows_can_be_reordered_and_repeated(case):
    module, rows = case.module(), torch.tensor([2, 0, 0, 1])
    given, padding = text()
    state = module.new_state()
    run(module, state, given, padding, [20, 3])
    state.apply(lambda tensor: tensor.index_select(0, rows))
    given, padding = given.rows(rows), padding[rows]
    got = run(module, state, given, padding, [1, 1, 16], start=23)
    assert_equal(got, whole(case, module, given, padding)[:, 23:], padding, start=23)


@every_class()
def test_what_is_kept_is_told(cls):
    own = cls.new_state is not Attention.new_state
    assert own or cls.keeps == Attention.keeps, "it has no new_state: leave out `keeps`"
    assert not own or cls.keeps != Attention.keeps, "say in `keeps` what new_state makes"


@every_state
@torch.no_grad()
def test_a_copy_and_a_saved_state_go_on_by_themselves(case):
    module = case.module()
    given, padding = text()
    state = module.new_state()
    run(module, state, given, padding, [20, 1])
    file = io.BytesIO()
    torch.save(state, file)
    copied, saved = copy.deepcopy(state), torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    want = whole(case, module, given, padding)[:, 21:]
    for each in (state, copied, saved):
        assert_equal(run(module, each, given, padding, [1, 19], start=21), want, padding, start=21)


@every_state
@torch.no_grad()
def test_a_reset_state_is_a_new_one(case):
    module = case.module()
    for fixed_length in (None, LENGTH):
        state = module.new_state(fixed_length)
        run(module, state, *text((3, LENGTH, 17)), [11, 1, 1])
        state.reset()
        assert state.seen == 0
        given, padding = text()
        got = run(module, state, given, padding, SPLITS["pieces"])
        assert_equal(got, whole(case, module, given, padding), padding)


@every_state
@pytest.mark.parametrize("lengths", [LENGTHS, (LENGTH,)], ids=["padded", "alone"])
@torch.no_grad()
def test_tokens_can_be_taken_back_where_the_past_is_recorded(case, lengths):
    module = case.module()
    given, padding = text(lengths)
    want = whole(case, module, given, padding)
    state = module.new_state()
    state.recording = True
    wrong = [x.flip(2) for x in given.tensors()]
    start = 0
    # As assisted decoding: some of the tokens are right, the others are taken back, several calls of them at times.
    for sizes, right in (((20,), 17), ((1, 1, 1), 1), ((6,), 0), ((5,), 5), ((4,), 2)):
        end = start + right
        drafted = Inputs(
            *(torch.cat([x[:, :, :end], y[:, :, end:]], dim=2) for x, y in zip(given.tensors(), wrong, strict=True))
        )
        got = run(module, state, drafted, padding, sizes, start)
        assert_equal(got[:, :right], want[:, start:end], padding if padding is None else padding[:, :end], start)
        state.crop(sum(sizes) - right)
        start = end
        assert state.seen == start
    state.recording = False
    assert_equal(run(module, state, given, padding, [1, LENGTH - start - 1], start), want[:, start:], padding, start)
    assert not state.history


@every_state
@torch.no_grad()
def test_what_is_not_recorded_is_taken_back_rightly_or_refused(case):
    module = case.module()
    given, padding = text()
    state = module.new_state()
    run(module, state, given, padding, [30])
    before = copy.deepcopy(state)
    with contextlib.suppress(ValueError):
        state.crop(7)
    start = state.seen
    if start != 23:
        assert start == 30
        assert all(torch.equal(state.tensors[name], before.tensors[name]) for name in before.tensors)
        with pytest.raises(ValueError, match=r"cannot go back 7 tokens.*activate_past_recording"):
            state.crop(7)
    want = whole(case, module, given, padding)[:, start:]
    assert_equal(run(module, state, given, padding, [1, LENGTH - start - 1], start), want, padding, start)


@every_state
@torch.no_grad()
def test_static_states_keep_their_shapes_and_addresses(case):
    module, state = case.module(), case.module().new_state(LENGTH)
    if not state.supports_fixed_length:
        pytest.skip(f"{case.cls.name} keeps all tokens")
    given, padding = text()
    got = [piece(module, state, given, padding, 0, 20)]
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors.items()}
    room = torch.nn.functional.pad(padding, (0, 5))  # the mask of a static cache tells of tokens to come
    for at in range(20, LENGTH):
        mask = AttentionMask(len(given.q), 1, at + 1, causal=True, padding_BK=room)
        got.append(given.tokens(slice(at, at + 1)).run(module, mask, state=state))
        assert places == {name: (tensor.data_ptr(), tensor.shape) for name, tensor in state.tensors.items()}
    assert_equal(torch.cat(got, dim=1), whole(case, module, given, padding), padding)
    with pytest.raises(ValueError, match=f"room for {LENGTH} tokens, {LENGTH} are in it and 1 more came"):
        piece(module, state, inputs(3, LENGTH + 1), None, LENGTH, LENGTH + 1)


@every_state
@torch.no_grad()
def test_bytes_do_not_grow_where_they_need_not(case):
    module, state = case.module(), case.module().new_state()
    if state.grows:
        pytest.skip(f"{case.cls.name} keeps all tokens")
    window = max((value for value in vars(module.config).values() if isinstance(value, int)), default=1)
    if window > 1000:
        pytest.skip("its window is longer than the text")
    given = inputs(1, 4 * window + 60)
    run(module, state, given, None, [4 * window])
    before = state.num_bytes
    run(module, state, given, None, [1] * 30 + [30], start=4 * window)
    assert state.num_bytes == before > 0


@every_state
def test_gradients_go_through_a_state(case):
    module = case.module()
    given, _ = text((LENGTH,) * 2)
    leaves = [x.detach().requires_grad_() for x in given.tensors()]
    cotangent = torch.randn(2, LENGTH, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one = Inputs(*leaves).run(module, case.mask(2, LENGTH, LENGTH))
    wanted = [*leaves, *module.parameters()]
    want = torch.autograd.grad(one, wanted, cotangent, allow_unused=True)
    pieces = run(module, module.new_state(), Inputs(*leaves), None, [19, 1, 1, 20])
    got = torch.autograd.grad(pieces, wanted, cotangent, allow_unused=True)
    for leaf, *both in zip(wanted, got, want, strict=True):
        a, b = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in both)
        torch.testing.assert_close(a, b)


@every_state
@torch.no_grad()
def test_what_a_state_cannot_continue_is_refused_before_it_changes(case):
    module = case.module()
    given, padding = text()
    state = module.new_state()
    run(module, state, given, padding, [20])
    before = copy.deepcopy(state)
    segments = torch.zeros(3, 21, dtype=torch.long)
    token = given.tokens(slice(20, 21))
    for wrong, mask, message in (
        (given.rows([0, 1]).tokens(slice(20, 21)), AttentionMask(2, 1, 21, causal=True), "another model or batch"),
        (inputs(3, 1, head_dim=12), AttentionMask(3, 1, 21, causal=True), None),
        (token, AttentionMask(3, 1, 21, causal=True, segments_BK=segments), "packed sequences cannot be continued"),
        (token, AttentionMask(3, 1, 21, causal=True, plain=False, rule=lambda b, h, q, k: k <= q - q % 2), None),
    ):
        if message is None and (case.cls.any_mask if not mask.plain else next(module.parameters(), None) is None):
            continue
        with pytest.raises(ValueError, match=message or "cannot honour|was built for|another model or batch"):
            wrong.run(module, mask, state=state)
    with pytest.raises(ValueError, match="weights of tokens that a cache no longer holds"):
        token.call(module, AttentionMask(3, 1, 21, causal=True), state=state, need_weights=True)
    assert state.seen == before.seen
    assert all(torch.equal(state.tensors[name], before.tensors[name]) for name in before.tensors)
    with pytest.raises(ValueError, match="cannot remove 21 tokens of 20"):
        state.crop(21)
