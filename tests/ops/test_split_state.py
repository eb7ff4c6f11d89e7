"""States of several attentions as one: changed together or not at all, and all keys for those that keep no state."""

import copy

import pytest
import torch

from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.decode.all_keys import AllKeys
from attn_plugins.ops.decode.split_state import SplitState

ONE_HEAD = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=6)
LENGTH = 20


def local(window_size=4):
    attention = get_attention("local")
    return attention(attention.Config(window_size=window_size, num_sink_tokens=2), ONE_HEAD)


def tokens(number, rows=2, seed=0):
    """Queries, keys and values of two key/value heads."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = ((4, 8), (2, 8), (2, 6))
    return [torch.randn(rows, heads, number, size, generator=generator) for heads, size in sizes]


class Halves:
    """A window for one of two key/value heads, all keys for the other."""

    def __init__(self, fixed_length=None):
        self.local = local()
        self.state = SplitState([self.local.new_state(fixed_length), AllKeys(fixed_length)])

    def take(self, number, seed=0):
        q, k, v = tokens(number, seed=seed)
        window, keys = self.state.parts
        mask = AttentionMask(2, number, self.state.seen + number, causal=True)
        self.state.check(q, k, v, mask)
        out, _ = self.local(q[:, :2], k[:, :1], v[:, :1], mask=mask, scale=0.4, state=window)
        keys.append(k[:, 1:], v[:, 1:])
        return out

    def held(self):
        return [tensor.clone() for tensor in self.state._held()]

    def counts(self):
        return [part.seen for part in self.state.parts]


def unchanged(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


@torch.no_grad()
def test_all_keys_grow_with_the_text_and_are_cropped():
    _, k, v = tokens(LENGTH)
    for fixed_length in (None, LENGTH + 3):
        state = AllKeys(fixed_length)
        assert not state.begun
        for start, end in ((0, 7), (7, 8), (8, LENGTH)):
            state.append(k[:, :, start:end], v[:, :, start:end])
        assert state.seen == LENGTH
        assert state.begun
        for name, x in (("k", k), ("v", v)):
            assert torch.equal(state.tensors[name][:, :, :LENGTH], x)
        assert state.num_bytes == 2 * 2 * (fixed_length or LENGTH) * (8 + 6) * 4
        state.record(True)
        state.crop(5)
        assert state.seen == LENGTH - 5
        state.append(k[:, :, 15:], v[:, :, 15:])
        assert torch.equal(state.tensors["v"][:, :, :LENGTH], v)
        state.reset()
        assert state.seen == 0
        state.append(k[:, :, :2], v[:, :, :2])
        assert torch.equal(state.tensors["k"][:, :, :2], k[:, :, :2])
        assert not state.tensors["k"][:, :, 2:].any()


@torch.no_grad()
def test_all_keys_hold_no_memory_of_other_heads():
    _, k, v = tokens(LENGTH, rows=1)
    state = AllKeys()
    state.append(k[:, :1], v[:, 1:])
    for tensor in state.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@torch.no_grad()
def test_static_keys_keep_their_place():
    _, k, v = tokens(LENGTH)
    state = AllKeys(LENGTH)
    state.append(k[:, :, :9], v[:, :, :9])
    places = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    for at in range(9, LENGTH):
        state.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        assert places == {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    assert torch.equal(state.tensors["k"], k)
    with pytest.raises(ValueError, match="room for 20 tokens, 20 are in it and 1 more came"):
        state.check_room(1)


def test_gradients_go_through_all_keys():
    for fixed_length in (None, LENGTH):
        _, k, v = (x.requires_grad_() for x in tokens(LENGTH))
        state = AllKeys(fixed_length)
        for start, end in ((0, 7), (7, LENGTH)):
            state.append(k[:, :, start:end], v[:, :, start:end])
        (state.tensors["k"].sum() + 2 * state.tensors["v"].sum()).backward()
        assert torch.equal(k.grad, torch.ones_like(k))
        assert torch.equal(v.grad, torch.full_like(v, 2))


@torch.no_grad()
def test_parts_are_counted_and_told_as_one():
    halves = Halves()
    state = halves.state
    assert not state.begun
    assert state.like() is None
    assert state.grows
    assert state.supports_fixed_length
    halves.take(LENGTH)
    assert state.seen == state.length == state.position == LENGTH
    assert state.begun
    assert [x.shape for x in state.like()] == [(2, 2, 0, 8), (2, 2, 0, 6)]
    assert state.num_bytes == sum(part.num_bytes for part in state.parts)
    token = tokens(1, rows=3)
    with pytest.raises(ValueError, match=r"\(rows, heads, size\) = \(2, 2, 8\) and \(2, 2, 6\), got \(3, 2, 8\)"):
        state.check(*token, AttentionMask(3, 1, LENGTH + 1, causal=True))
    static = Halves(LENGTH).state
    assert static.fixed_length == LENGTH
    assert int(static.position) == 0
    with pytest.raises(ValueError, match="room for 20 tokens, 0 are in it and 21 more came"):
        static.check_room(LENGTH + 1)


@torch.no_grad()
def test_a_crop_that_one_part_refuses_changes_none():
    for order in (0, 1):  # whichever comes first
        halves = Halves()
        halves.take(LENGTH)
        halves.state.parts.insert(0, halves.state.parts.pop(order))
        before = halves.held()
        with pytest.raises(ValueError, match="cannot go back 4 tokens"):
            halves.state.crop(4)
        assert unchanged(before, halves.held())
        assert halves.counts() == [LENGTH, LENGTH]


@torch.no_grad()
def test_recorded_tokens_are_taken_back_from_all_parts():
    halves, other = Halves(), Halves()
    for each in (halves, other):
        each.take(12, seed=1)
    halves.state.record(True)
    assert halves.state.recording
    halves.take(5, seed=2)
    halves.state.crop(5)
    assert halves.counts() == [12, 12]
    assert torch.equal(halves.take(3, seed=3), other.take(3, seed=3))
    halves.state.record(False)
    assert not any(part.history or part.recording for part in halves.state.parts)
    assert unchanged(halves.held(), other.held())


@torch.no_grad()
def test_a_token_that_only_some_parts_have_taken_in_is_taken_back_from_them_or_seen():
    halves = Halves()
    halves.take(3)  # fewer than the window has room for
    _, k, v = tokens(1)
    halves.state.parts[1].append(k[:, 1:], v[:, 1:])
    assert halves.state.seen == 4
    halves.state.return_to(3)
    assert halves.counts() == [3, 3]
    halves.take(LENGTH)
    q, k, v = tokens(1)
    mask = AttentionMask(2, 1, LENGTH + 4, causal=True)
    halves.local(q[:, :2], k[:, :1], v[:, :1], mask=mask, scale=0.4, state=halves.state.parts[0])
    halves.state.return_to(LENGTH + 3)  # the window cannot
    assert halves.state.seen == LENGTH + 4


@torch.no_grad()
def test_rows_are_chosen_and_everything_is_forgotten_in_all_parts():
    halves = Halves()
    halves.take(LENGTH)
    copied = copy.deepcopy(halves.state)
    halves.state.apply(lambda tensor: tensor.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(halves.held(), copied._held(), strict=True))
    assert halves.state.to("cpu") is halves.state
    halves.state.reset()
    assert halves.counts() == [0, 0]
    assert not halves.state.begun
