"""Dense masks that models and users make: what is plain is found to be, and nothing else."""

import gc
import re
import weakref
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

import attn_plugins as ap
from attn_plugins.hf.masks import dense_masks
from attn_plugins.hf.masks.given import as_mask

Q = 8
CAUSAL = torch.ones(1, 1, Q, Q, dtype=torch.bool).tril()
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * Q]).bool()
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0]]).bool()
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
SAME = (SEGMENTS.unsqueeze(2) == SEGMENTS.unsqueeze(1)).unsqueeze(1)
PADDINGS = {"none": torch.ones(2, Q).bool(), "left": LEFT, "right": RIGHT, "holes": HOLES}


def read(given: torch.Tensor, causal: bool = True, cross: bool = False, keys: int = Q) -> tuple[Any, Any]:
    queries = torch.zeros(2, 4, given.shape[-2], 4)
    return as_mask(given, queries, torch.zeros(2, 4, keys, 4), causal=causal, cross=cross)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_what_is_plain_is_found(padding, causal, packed, dtype):
    seen = (CAUSAL if causal else torch.ones_like(CAUSAL)) & PADDINGS[padding][:, None, None]
    seen = seen & SAME if packed else seen
    given = seen if dtype == torch.bool else dense_masks.additive(seen, dtype)
    mask, bias = read(given, causal=not causal)  # the mask says it, not the module
    assert bias is None
    assert mask.plain
    assert (mask.causal, mask.padding_BK is None) == (causal, padding == "none")
    assert (mask.segments_BK is None) != packed
    assert torch.equal(mask.dense().expand_as(seen), seen)


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_are_the_last_of_the_keys(queries):
    seen = (CAUSAL & LEFT[:, None, None])[:, :, -queries:]
    mask, _ = read(seen)
    assert (mask.plain, mask.causal, mask.q_length, mask.kv_length) == (True, True, queries, Q)
    assert torch.equal(mask.dense(), seen)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("queries", range(1, Q))
@pytest.mark.parametrize("padding", PADDINGS)
def test_what_is_plain_is_found_where_a_cache_holds_keys(padding, queries, packed):
    """Also where texts before the first query's are seen by none: what matters is what queries see."""
    seen = (CAUSAL & PADDINGS[padding][:, None, None])[:, :, -queries:]
    seen = seen & SAME[:, :, -queries:] if packed else seen
    mask, bias = read(seen)
    assert bias is None
    assert (mask.plain, mask.causal, mask.q_offset) == (True, True, Q - queries)
    assert torch.equal(mask.dense().expand_as(seen), seen)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_that_sees_itself_alone_is_a_text_of_its_own(padding):
    """So that no row of a softmax is empty."""
    real = PADDINGS[padding]
    seen = CAUSAL & real[:, None, None] & real[:, None, :, None] | torch.eye(Q, dtype=torch.bool)
    mask, _ = read(seen)
    assert (mask.plain, mask.causal) == (True, True)
    assert torch.equal(mask.dense().expand_as(seen), seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", ["least", -torch.inf, -1e4])
def test_additive_masks_hide_in_every_dtype(dtype, hidden):
    seen = CAUSAL & SAME & LEFT[:, None, None]
    given = torch.where(seen, 0.0, torch.finfo(dtype).min if hidden == "least" else hidden).to(dtype)
    mask, bias = read(given)
    assert bias is None
    assert (mask.plain, mask.causal) == (True, True)
    assert torch.equal(mask.dense().expand_as(seen), seen)


@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_sees_does_not_matter_where_it_sees_nothing(causal):
    """Parakeet's masks leave rows of padding empty, older models' ones too."""
    seen = (CAUSAL if causal else torch.ones_like(CAUSAL)) & RIGHT[:, None, None] & RIGHT[:, None, :, None]
    mask, _ = read(seen)
    assert (mask.plain, mask.causal) == (True, causal)
    assert torch.equal(mask.padding_BK, RIGHT)
    assert torch.equal(mask.dense()[RIGHT.unsqueeze(1)], seen[RIGHT.unsqueeze(1)])


@pytest.mark.parametrize("shape", ["causal", "full", "packed", "padded"])
def test_one_element_off_is_not_plain(shape):
    """Or it is another plain mask: whatever is found says exactly what was given, wherever a query sees something."""
    whole = {
        "causal": CAUSAL,
        "full": torch.ones_like(CAUSAL),
        "packed": CAUSAL & SAME,
        "padded": CAUSAL & HOLES[:, None, None],
    }
    kept = 0
    for row in range(Q):
        for column in range(Q):
            given = whole[shape].expand(2, -1, -1, -1).clone()
            given[0, 0, row, column] ^= True
            mask, bias = read(given)
            sees = given.any(dim=-1) | given.any(dim=-2)
            assert bias is None
            assert torch.equal(mask.dense().expand_as(given)[sees], given[sees])
            kept += mask.plain
    assert kept < Q * Q / 4


def test_a_token_that_reads_and_is_not_read_keeps_its_row():
    given = CAUSAL.clone()
    given[..., 3] = False
    given[..., 3, :] = True
    mask, _ = read(given)
    assert not mask.plain
    assert torch.equal(mask.dense(), given)


def test_a_query_without_keys_is_not_padding_if_others_see_it():
    given = CAUSAL.clone()
    given[..., 3, :] = False
    mask, _ = read(given)
    assert not mask.plain
    assert torch.equal(mask.dense(), given)


@pytest.mark.parametrize("kind", ["sliding", "blocks that alternate", "prefix"])
def test_more_than_plain_stays_dense(kind):
    position = torch.arange(Q)
    given = {
        "sliding": CAUSAL & (position[:, None] - position < 3),
        "blocks that alternate": (CAUSAL & (position[:, None] % 2 == position % 2)),
        "prefix": CAUSAL | (position < 3),
    }[kind]
    mask, _ = read(given)
    assert not mask.plain
    assert torch.equal(mask.dense(), given)


def test_cross_attention_is_padding_or_dense():
    given = RIGHT[:, None, None].expand(-1, -1, 3, -1)
    mask, _ = read(given, causal=False, cross=True)
    assert (mask.plain, mask.causal, mask.cross) == (True, False, True)
    assert torch.equal(mask.padding_BK, RIGHT)
    for more in (CAUSAL, SAME):
        assert not read(more, cross=True)[0].plain


def test_one_mask_for_all_heads_and_a_bias_for_each():
    bias = torch.randn(2, 4, Q, Q)
    given = bias.masked_fill(~(CAUSAL & LEFT[:, None, None]), -torch.inf)
    mask, added = read(given)
    assert (mask.plain, mask.causal) == (True, True)
    assert torch.equal(added, bias.masked_fill(given == -torch.inf, 0.0))


def test_a_bias_that_is_learned_from_zero_gets_gradients():
    table = torch.zeros(1, 4, Q, Q, requires_grad=True)
    mask, bias = read(table, causal=False)
    assert mask.plain
    bias.sum().backward()
    assert torch.equal(table.grad, torch.ones_like(table))


def test_one_row_for_all_queries_is_padding_whatever_the_module_is():
    """As torch's own attention: a mask that is given is all of it."""
    row = torch.where(LEFT, 0.5, -torch.inf)[:, None, None]
    mask, bias = as_mask(row, torch.zeros(2, 4, Q, 4), torch.zeros(2, 4, Q, 4), causal=True, cross=False)
    assert (mask.plain, mask.causal) == (True, False)
    assert torch.equal(mask.padding_BK, LEFT)
    assert torch.equal(bias, torch.where(LEFT, 0.5, 0.0)[:, None, None])


def test_it_is_computed_once_for_all_layers_and_again_after_a_change(monkeypatch):
    computed = []
    original = dense_masks.structure
    monkeypatch.setattr(dense_masks, "structure", lambda *args, **how: computed.append(1) or original(*args, **how))
    given = CAUSAL.clone()
    assert all(read(given)[0].plain for _ in range(3))
    assert len(computed) == 1
    given[..., 5, 2] = False
    assert not read(given)[0].plain
    assert not read(given)[0].plain
    assert len(computed) == 2
    gone = weakref.ref(given)
    del given
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3"])
@pytest.mark.parametrize("flag", ["linear", "additive", {"type": "local", "window_size": 4}])
@torch.no_grad()
def test_a_dense_mask_gives_what_its_padding_gives(name, flag):
    """Attentions that refuse masks of which nothing is known serve these."""
    given = tiny.inputs(name)
    padding = given["attention_mask"].bool()
    model = ap.swap_attention(tiny.build(name, is_decoder=False), flag)
    model = getattr(model, "model", getattr(model, "bert", model))
    expected = model(**given).last_hidden_state
    seen = padding[:, None, None].expand(-1, -1, padding.shape[1], -1)
    seen = seen if name == "bert" else seen.tril()
    positions = {} if name == "bert" else {"position_ids": (padding.long().cumsum(1) - 1).clamp(min=0)}
    expected = model(**given, **positions).last_hidden_state
    for mask in (seen, dense_masks.additive(seen, torch.float32)):
        out = model(given["input_ids"], attention_mask=mask, **positions).last_hidden_state
        torch.testing.assert_close(out[padding], expected[padding], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_beside_dense_masks_keeps_all_keys():
    """A state cannot follow masks that it is not told of; the layer is an ordinary one then."""
    model, ids = ap.swap_attention(tiny.build("llama"), "local", window_size=4), tiny.inputs("llama")["input_ids"]
    seen = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril().expand(2, -1, -1, -1)
    expected = model(ids, attention_mask=seen, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :9], attention_mask=seen[:, :, :9, :9], past_key_values=cache).logits
    second = model(ids[:, 9:], attention_mask=seen[:, :, 9:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ap.list_attentions() if ap.get_attention(name).causal])
@torch.no_grad()
def test_packed_texts_come_in_pieces_with_a_mask_each(name):
    """A 4-D mask a call, of padding, two texts and what a cache holds of them, gives what the texts give alone."""
    rule = {"type": name, **ap.get_attention(name).examples[0]}
    model, ids = ap.swap_attention(tiny.build("llama"), rule), tiny.inputs("llama", batch=1)["input_ids"]
    texts = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    seen = (texts.unsqueeze(2) == texts.unsqueeze(1)).tril().unsqueeze(1) & (texts > 0)[:, None, None]
    expected = torch.cat([model(ids[:, 2:7]).logits, model(ids[:, 7:]).logits], dim=1)
    for ends in ((13,), (5, 13), (2, 7, 13), (9, 10, 11, 12, 13)):
        cache, parts = DynamicCache(config=model.config), []
        for low, high in zip((0, *ends[:-1]), ends, strict=True):
            given = {"attention_mask": seen[:, :, low:high, :high], "position_ids": positions[:, low:high]}
            parts.append(model(ids[:, low:high], past_key_values=cache, **given).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1)[:, 2:], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_prefix_that_texts_share_is_more_than_plain():
    """Two continuations of one text in a row, each with the positions after it."""
    model, ids = ap.swap_attention(tiny.build("llama"), "linear"), tiny.inputs("llama", batch=1)["input_ids"]
    texts = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7]])
    seen = ((texts.unsqueeze(2) == texts.unsqueeze(1)) | (texts == 0).unsqueeze(1)).tril().unsqueeze(1)
    with pytest.raises(ValueError, match="this call needs a mask beyond causal, padding and segments"):
        model(ids, attention_mask=seen, position_ids=positions)
    ap.restore_attention(model)
    own = model(ids, attention_mask=seen, position_ids=positions).logits
    ap.swap_attention(model, "local", window_size=64)
    torch.testing.assert_close(
        model(ids, attention_mask=seen, position_ids=positions).logits, own, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("emptied", [lambda cache: cache.reset(), lambda cache: cache.crop(-13)])
@torch.no_grad()
def test_a_cache_that_was_emptied_serves_dense_masks(emptied):
    model, ids = ap.swap_attention(tiny.build("llama"), "local", window_size=14), tiny.inputs("llama")["input_ids"]
    seen = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril().expand(2, -1, -1, -1)
    cache = DynamicCache(config=model.config)
    expected = model(ids, past_key_values=cache).logits
    emptied(cache)
    got = model(ids, attention_mask=seen, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize(
    ("shape", "allowed"),
    [
        ((2, 1, 1, Q - 1), "1 or 2, 1 or 4, 1 or 8, 8 or more"),
        ((2, 1, Q, Q - 1), "1 or 2, 1 or 4, 1 or 8, 8 or more"),
        ((3, 1, Q, Q), "1 or 2, 1 or 4, 1 or 8, 8 or more"),
        ((2, 3, Q, Q), "1 or 2, 1 or 4, 1 or 8, 8 or more"),
        ((2, 1, Q - 1, Q), "1 or 2, 1 or 4, 1 or 8, 8 or more"),
        ((2, Q, Q - 1), "1 or 2, 1 or 8, 8 or more"),
        ((2, Q - 1), "1 or 2, 8 or more"),
        ((3, Q), "1 or 2, 8 or more"),
    ],
)
def test_masks_of_other_sizes_are_refused(shape, allowed, dtype):
    """They would be read as plain: where all is visible, the values don't tell how many keys there are."""
    x = torch.zeros(2, 4, Q, 4)
    with pytest.raises(ValueError, match=re.escape(f"mask is of shape {shape}; allowed here: ({allowed})")):
        as_mask(torch.ones(shape).to(dtype), x, x, causal=True, cross=False)


@pytest.mark.parametrize("shape", [(2, 1, Q, Q), (2, Q, Q)])
def test_dense_masks_of_integers_are_refused(shape):
    """Ones and zeros would be added to scores, and hide nothing; sdpa refuses them too."""
    x = torch.zeros(2, 4, Q, 4)
    with pytest.raises(ValueError, match=r"is of dtype torch.int64, .* allowed: bool"):
        as_mask(torch.ones(shape, dtype=torch.int64).tril(), x, x, causal=True, cross=False)
