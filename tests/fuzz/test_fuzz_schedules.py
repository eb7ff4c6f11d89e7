"""Any schedule of what may happen to a cache: the next tokens' logits equal those of one pass over the same tokens."""

import copy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds import a_round, one_clear_line
from test_generation import CAUSAL, flag
from transformers import DynamicCache, StaticCache

import attn_plugins as ap
from attn_plugins.hf.caches.cache_layers import cache_bytes

pytestmark = pytest.mark.fuzz

ROOM = 48
"""Tokens that the static caches have room for."""


@st.composite
def hybrids(draw):
    """Rules for three layers: each, or each of its two key/value heads, has an attention, or the model's own."""
    name = st.sampled_from([None, *CAUSAL])
    names = [draw(st.one_of(name.map(lambda one: (one, one)), st.tuples(name, name))) for _ in range(3)]
    if not any(one for both in names for one in both):
        names[draw(st.integers(0, 2))] = (draw(st.sampled_from(CAUSAL)), None)
    rules = []
    for layer, both in enumerate(names):
        heads = [[0], [1]] if both[0] != both[1] else [[0, 1]]
        rules += [
            {**flag(one), "layers": layer, "kv_heads": kv_heads}
            for one, kv_heads in zip(both, heads, strict=False)
            if one
        ]
    return rules


def schedules(dynamic):
    feed = st.tuples(st.just("feed"), st.integers(1, 11))
    more = [
        st.tuples(st.just("crop"), st.integers(0, 14)),
        st.tuples(st.just("record"), st.just(0)),
        st.tuples(st.just("repeat"), st.just(2)),
    ]
    changes = [feed, feed, st.tuples(st.just("reorder"), st.integers(0, 5)), st.tuples(st.just("copy"), st.just(0))]
    return st.lists(st.one_of(*changes, *(more if dynamic else [])), min_size=1, max_size=9)


class Talk:
    """A model, a cache, and the tokens that the cache stands for."""

    def __init__(self, model, cache, pads):
        self.model, self.cache = model, cache
        self.ids = torch.zeros(2, 0, dtype=torch.long)
        self.real = torch.zeros(2, 0, dtype=torch.long)
        self.pads = pads
        self.chance = torch.Generator().manual_seed(3)

    def call(self, ids, real, cache):
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        how = {"use_cache": False} if cache is None else {"past_key_values": cache}
        return self.model(input_ids=ids, attention_mask=real, position_ids=positions, **how).logits

    def feed(self, number):
        fresh = torch.randint(3, tiny.VOCABULARY, (len(self.ids), number), generator=self.chance)
        real = torch.ones_like(fresh)
        if not self.ids.shape[1]:
            real[0, : min(self.pads, number - 1)] = 0
        ids, seen = torch.cat([self.ids, fresh], dim=1), torch.cat([self.real, real], dim=1)
        got = self.call(fresh, seen, self.cache)
        want = self.call(ids, seen, None)[:, -number:]
        self.ids, self.real = ids, seen
        torch.testing.assert_close(got[real.bool()], want[real.bool()], atol=2e-5, rtol=1e-4)
        assert self.cache.get_seq_length() == ids.shape[1]

    def crop(self, number):
        self.cache.crop(-number)
        if number:
            self.ids, self.real = self.ids[:, :-number], self.real[:, :-number]

    def record(self, _):
        self.cache.activate_past_recording()

    def reorder(self, number):
        order = torch.tensor([number % len(self.ids), *range(1, len(self.ids))])
        self.cache.reorder_cache(order)
        self.ids, self.real = self.ids[order], self.real[order]

    def repeat(self, times):
        if len(self.ids) < 8:
            self.cache.batch_repeat_interleave(times)
            self.ids, self.real = (x.repeat_interleave(times, dim=0) for x in (self.ids, self.real))

    def copy(self, _):
        self.cache = copy.deepcopy(self.cache)


@torch.no_grad()
def run(rules, steps, pads, make):
    model, refused = tiny.build("llama"), []
    ap.swap_attention(model, rules)
    talk = Talk(model, make(model.config), pads)
    for what, number in steps:
        if what != "feed" and not talk.ids.shape[1]:
            continue
        # What may be refused: going back to where a state can't, a first call for which a static cache can't serve, and
        # more tokens than it has room for.
        before, fixed = (talk.cache.get_seq_length(), cache_bytes(talk.cache)), isinstance(talk.cache, StaticCache)
        if what == "crop" and number > before[0]:
            continue
        if what == "crop" or (fixed and what == "feed" and (not talk.ids.shape[1] or before[0] + number > ROOM)):
            with one_clear_line(refused):
                getattr(talk, what)(number)
                assert not fixed or before[0] + number <= ROOM, "more tokens than there is room for"
        else:
            getattr(talk, what)(number)
            continue
        if refused:
            assert (talk.cache.get_seq_length(), cache_bytes(talk.cache)) == before
            refused.clear()
    if talk.ids.shape[1] and talk.ids.shape[1] + 2 <= ROOM:
        talk.feed(2)


@a_round
@given(rules=hybrids(), steps=schedules(dynamic=True), pads=st.integers(0, 4))
def test_a_dynamic_cache_after_any_schedule(rules, steps, pads):
    run(rules, steps, pads, lambda config: DynamicCache(config=config))


@a_round
@given(rules=hybrids(), steps=schedules(dynamic=False), pads=st.integers(0, 4))
def test_a_static_cache_after_any_schedule(rules, steps, pads):
    run(rules, steps, pads, lambda config: StaticCache(config=config, max_cache_len=ROOM))
