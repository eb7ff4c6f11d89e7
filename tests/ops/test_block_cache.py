"""States that keep all keys and touch few: as one pass, however the text comes; the contract's part is elsewhere."""

import copy
import random

import pytest
import torch
from cases import SCALE, Case, inputs, left_padding

from attn_plugins.attentions.block_topk import BlockTopkAttention
from attn_plugins.attentions.native_sparse import NativeSparseAttention
from attn_plugins.ops.blocks import native_sparse
from attn_plugins.ops.decode import block_cache as key_blocks

LENGTH = 41
CASES = [Case(cls, options, True) for cls in (BlockTopkAttention, NativeSparseAttention) for options in cls.examples]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def short_pieces_are_many_queries(monkeypatch):
    monkeypatch.setattr(key_blocks, "MAX_GATHER_QUERIES", 4)


class Text:
    """Keys, values and queries of some rows, their padding, and what one pass makes of them."""

    def __init__(self, case, reals=(LENGTH, LENGTH - 6, LENGTH - 25), padding=None, length=LENGTH):
        self.case, self.module = case, case.module()
        self.given = inputs(len(reals), length)
        self.padding = left_padding(list(reals), length) if padding is None else padding
        if bool(self.padding.all()):
            self.padding = None
        with torch.no_grad():
            self.want = self.given.run(self.module, self.mask(length, length)).transpose(1, 2)

    def part(self, low, high):
        return self.given.tokens(slice(low, high))

    def mask(self, queries, keys):
        padding = None if self.padding is None else self.padding[:, :keys]
        return self.case.mask(len(self.given.q), queries, keys, padding_BK=padding, device=self.given.k.device)

    @torch.no_grad()
    def go_on(self, state, sizes):
        for size in sizes:
            low, high = state.seen, state.seen + size
            got = self.part(low, high).run(self.module, self.mask(size, high), state=state)
            self.compare(got.transpose(1, 2), low, high)
        return state

    def compare(self, got, low, high):
        real = torch.ones(len(got), high - low, dtype=torch.bool)
        if self.padding is not None:
            real = self.padding[:, low:high]
        torch.testing.assert_close(
            got.transpose(1, 2)[real], self.want[:, :, low:high].transpose(1, 2)[real], atol=1e-9, rtol=1e-9
        )


def split(seed, length=LENGTH):
    chance, sizes = random.Random(seed), []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, chance.choice([1, 1, 1, 2, 3, 4, 5, 11])))
    return sizes


@EVERY
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padded", [True, False])
def test_any_split_equals_one_pass(case, seed, padded):
    text = Text(case) if padded else Text(case, (LENGTH, LENGTH))
    sizes = [1] * LENGTH if seed == 0 else split(seed)
    text.go_on(text.module.new_state(), sizes)
    text.go_on(text.module.new_state(fixed_length=LENGTH + 3), sizes)


@EVERY
def test_many_queries_are_attended_from_in_the_form_of_the_device(case, monkeypatch):
    text = Text(case)
    text.module.backend = "batched"
    monkeypatch.setattr(case.cls, "attend", None)
    monkeypatch.setattr(native_sparse, "native_sparse_attention", None)
    text.go_on(text.module.new_state(), [11, 1, 17, 12])


@EVERY
def test_padding_between_turns_counts_as_in_one_pass(case):
    padding = left_padding([LENGTH, LENGTH - 6], LENGTH)
    padding[0, 13:19] = padding[1, 30:37] = False
    text = Text(case, (LENGTH, LENGTH), padding)
    text.go_on(text.module.new_state(), [9, 1, 1, 1, *[1] * 12, 11, 1, 1, 1, 1])


@EVERY
@pytest.mark.parametrize("fixed_length", [None, 50])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_removed_anywhere_without_recording(case, fixed_length, seed):
    text, other = Text(case), Text(case)
    for x in other.given.of_tokens():
        x.copy_(x.roll(1, dims=2))  # the tokens that are removed again are others
    chance, state = random.Random(seed), text.module.new_state(fixed_length)
    state.recording = True
    for back in (0, 3, 0, 40, 1, 6, 4, 0, 2):
        text.go_on(state, [min(LENGTH - state.seen, chance.choice([1, 2, 7, 12]))])
        kept, wrong = state.seen, min(LENGTH - state.seen, chance.choice([1, 1, 3, 9]))
        if wrong:
            other.part(kept, kept + wrong).run(other.module, other.mask(wrong, kept + wrong), state=state)
        state.crop(wrong + min(back, kept))
    text.go_on(state, [1] * (LENGTH - state.seen))
    assert state.history == []
    with pytest.raises(ValueError, match="cannot remove"):
        state.crop(LENGTH + 1)


@EVERY
def test_what_comes_after_a_removal_may_begin_elsewhere(case):
    text, other = Text(case, (LENGTH, 16)), Text(case, (LENGTH, 19))
    state = text.go_on(text.module.new_state(), [18, 12])
    state.crop(10)
    other.go_on(state, [1, 1, 1, 3, 9, 1, 1, 1, 1, 1, 1])


@EVERY
@pytest.mark.parametrize("fixed_length", [None, 70])
@torch.no_grad()
def test_a_step_touches_no_key_of_other_blocks(case, fixed_length):
    text = Text(case, (61, 58), length=61)
    if case.cls is NativeSparseAttention:  # what the compressed branch sees would be everything
        text.module.compressed_gate.fill_(-1e4)
        text.module.gate_weight.zero_()
    _, weights = text.part(0, 61).call(text.module, text.mask(61, 61), need_weights=True)
    for queries in (1, 3):
        state = text.module.new_state(fixed_length)
        text.part(0, 61 - queries).run(text.module, text.mask(61 - queries, 61 - queries), state=state)
        untouched = (weights[:, :, -queries:].unflatten(1, (2, 2)) == 0).all(dim=2).all(dim=2)
        untouched[:, :, -queries - 5 :] = False  # a block that is just complete is summed up
        assert untouched.sum() > 60
        clean = copy.deepcopy(state)
        for name in "kv":
            held = state.tensors[name][:, :, :61]
            held.masked_fill_(untouched.unsqueeze(3), torch.nan)
            assert held.isnan().any()
            if case.cls is BlockTopkAttention:  # nor what is not there yet; compressed blocks look ahead in vain
                state.tensors[name][:, :, 61:] = torch.nan
        part = text.part(61 - queries, 61)
        got, want = (part.run(text.module, text.mask(queries, 61), state=s) for s in (state, clean))
        assert torch.equal(got, want)


@EVERY
@torch.no_grad()
def test_buffers_grow_by_doubling(case):
    state, places = case.module().new_state(), {}
    given = inputs(1, 1)
    for length in range(1, 1001):
        state.append(
            given.k, given.v, case.mask(1, 1, length), (torch.ones(2, case.options.get("kernel_size", 1)),) * 2
        )
        for name, tensor in state.tensors.items():
            places.setdefault(name, [tensor])
            if places[name][-1] is not tensor:
                places[name].append(tensor)
    assert {len(tensors) for tensors in places.values()} == {5}  # 64, 128, .., 1024
    assert state.num_bytes < 3 * 1024 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
@torch.no_grad()
def test_a_static_step_is_one_graph_and_keeps_addresses(case):
    text = Text(case, (LENGTH, LENGTH))
    state = text.go_on(text.module.new_state(fixed_length=LENGTH + 5), [6])
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    graphs = []

    def count(graph, given):
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def step(q, k, v, hidden, seen):
        wanted = {"hidden": hidden.squeeze(1)} if text.module.wants_hidden else {}
        return text.module(q, k, v, mask=text.mask(1, seen + 1), scale=SCALE, state=state, **wanted)[0]

    for low in range(6, 18):
        text.compare(step(*text.part(low, low + 1).of_tokens(), low).transpose(1, 2), low, low + 1)
    assert len(graphs) <= 3
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == addresses
