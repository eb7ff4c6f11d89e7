"""Every mask that transformers makes or users pass reaches the attention exactly."""

import functools

import pytest
import tiny
import torch
from transformers import LlamaConfig, masking_utils

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape
from attn_plugins.hf.attention_function import attention_forward
from attn_plugins.hf.masks.given import as_mask
from attn_plugins.hf.masks.mask_function import lazy_mask
from attn_plugins.hf.masks.structure import structure_of
from attn_plugins.ops.decode.all_keys import AllKeys

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()

PACKED = masking_utils.packed_sequence_mask_function(SEGMENTS)

RULES = {
    "causal": (masking_utils.causal_mask_function, True, True),
    "bidirectional": (masking_utils.bidirectional_mask_function, False, True),
    "sliding": (masking_utils.sliding_window_causal_mask_function(3), True, False),
    "chunked": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)), True, False),
    "packed": (masking_utils.and_masks(masking_utils.causal_mask_function, PACKED), True, True),
    "packed sliding": (
        masking_utils.and_masks(masking_utils.sliding_window_causal_mask_function(2), PACKED),
        True,
        False,
    ),
    "prefix": (
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 3),
        False,
        False,
    ),
    "blocks": (
        masking_utils.or_masks(
            masking_utils.causal_mask_function,
            masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1]] * 2)),
        ),
        False,
        False,
    ),
    "unknown": (lambda b, h, q, k: (k <= q) & (k % 2 == 0), False, False),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_lazy_mask_is_the_mask_that_sdpa_would_get(rule, vmap, padded):
    function, causal, plain = RULES[rule]
    batch = 1 if "packed" in rule else 2
    attention_mask = PADDING[:batch] if padded else None
    sizes = {"batch_size": batch, "q_length": 8, "kv_length": 8, "mask_function": function, "use_vmap": vmap}
    mask = lazy_mask(**sizes, attention_mask=attention_mask)
    expected = masking_utils.sdpa_mask(**sizes, attention_mask=attention_mask, allow_is_causal_skip=False)
    assert (mask.causal, mask.plain) == (causal, plain)
    assert torch.equal(mask.dense().expand_as(expected), expected)
    skipped = masking_utils.sdpa_mask(**sizes, attention_mask=attention_mask) is None
    assert mask.native("sdpa") is None if skipped else torch.equal(mask.native("sdpa"), expected)
    if mask.segments_BK is not None:
        assert "packed" in rule
        assert torch.equal(mask.segments_BK, SEGMENTS)


@pytest.mark.parametrize("offset", [0, 2])
def test_lazy_mask_with_a_cache(offset):
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 8 - offset, "q_offset": 5, "kv_offset": offset}
    mask = lazy_mask(**sizes, attention_mask=PADDING)
    expected = masking_utils.sdpa_mask(**sizes, attention_mask=PADDING, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), expected)
    assert torch.equal(mask.padding_BK, PADDING[:, offset:])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_own_attention_of_a_model_gets_the_mask_of_the_keys_that_there_are(padded, queries):
    """Of a static cache's the written ones alone, of a sliding layer's all tokens, where a state keeps these."""
    seen = AllKeys(8)
    seen.length = 5 - queries
    for kv_length, kv_offset in ((8, 0), (3, 5 - 3)):
        sizes = {"batch_size": 2, "q_length": queries, "mask_function": RULES["sliding"][0], "local_size": 3}
        given = {**sizes, "attention_mask": PADDING if padded else None}
        q_offset = torch.tensor(5 - queries) if kv_length == 8 else 5 - queries
        mask = lazy_mask(**given, kv_length=kv_length, kv_offset=kv_offset, q_offset=q_offset)
        whole = mask.over_all_tokens(seen, seen.seen)
        for made in [mask.written(), whole.written()] if queries == 1 and kv_length == 8 else [whole]:
            of_all = {"kv_length": 5, "q_offset": 5 - queries, "allow_is_causal_skip": False}
            want = masking_utils.sdpa_mask(**{**given, **of_all})
            assert torch.equal(made.native("sdpa"), want)
            assert torch.equal(made.dense().expand_as(want), want)
    assert whole.native("eager").shape == (2, 1, queries, 5)


def test_all_ones_is_no_padding():
    assert lazy_mask(2, 4, 4, attention_mask=torch.ones(2, 4, dtype=torch.bool)).padding_BK is None


def test_compositions_of_transformers_are_read_back():
    """Fails when transformers composes its mask functions otherwise; structure_of has to follow then."""
    config = LlamaConfig(**tiny.GROUPED, attn_implementation="attn_plugins")
    embeds = torch.zeros(1, 8, 4)
    packed = masking_utils.create_causal_mask(config, embeds, None, past_key_values=None, position_ids=POSITIONS)
    assert (packed.causal, packed.plain) == (True, True)
    assert torch.equal(packed.segments_BK, SEGMENTS)
    config.sliding_window = 3
    sliding = masking_utils.create_sliding_window_causal_mask(config, embeds, None, past_key_values=None)
    assert (sliding.causal, sliding.plain) == (True, False)
    assert masking_utils.create_bidirectional_mask(config, embeds, None).plain
    assert structure_of(masking_utils.causal_mask_function) == (True, True, None)


def every(number, batch_idx, head_idx, q_idx, kv_idx):
    return (kv_idx % number == 0) | (kv_idx == q_idx)


class Every:
    def __call__(self, *indices):
        return every(2, *indices)


RULES_OF_USERS = {
    "partial": functools.partial(every, 2),
    "callable object": Every(),
    "method": Every().__call__,
    "lambda": lambda *indices: every(2, *indices),
    "compiled": torch.compile(Every(), backend="eager"),
}


@pytest.mark.parametrize("kind", RULES_OF_USERS)
def test_rules_of_users_are_any_callable(kind):
    config = LlamaConfig(**tiny.GROUPED, attn_implementation="sdpa")
    request = (torch.zeros(2, 8, 4), PADDING)
    rules = {"past_key_values": None, "and_mask_function": RULES_OF_USERS[kind]}
    want = masking_utils.create_causal_mask(config, *request, **rules)
    config._attn_implementation = "attn_plugins"
    mask = masking_utils.create_causal_mask(config, *request, **rules)
    assert (mask.causal, mask.plain) == (True, False)
    assert torch.equal(mask.dense(), want)


@pytest.mark.parametrize("kind", ["bool", "float", "legacy", "three dimensions"])
def test_dense_masks_of_users(kind):
    seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril() & PADDING[:, None, None]
    given = {
        "bool": seen,
        "float": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "legacy": torch.where(seen, 0.0, -10000.0),
        "three dimensions": seen[:, 0],
    }[kind]
    mask, bias = as_mask(given, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=True, cross=False)
    assert bias is None
    assert torch.equal(mask.dense(), seen)


def test_additive_masks_become_a_position_bias():
    given = torch.randn(2, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
    mask, bias = as_mask(given, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=True, cross=False)
    assert torch.equal(mask.dense().expand_as(given), given > -1e4)
    assert torch.equal(bias, given.masked_fill(given == -torch.inf, 0.0))


def test_one_mask_a_head():
    given = torch.rand(2, 4, 8, 8) > 0.4
    mask, bias = as_mask(given, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=True, cross=False)
    assert torch.equal(mask.dense() & (bias == 0), given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_one_row_for_all_queries_is_padding(dtype):
    given = PADDING[:, None, None] if dtype == torch.bool else torch.where(PADDING, 0.0, -torch.inf)[:, None, None]
    mask, bias = as_mask(given, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=False, cross=False)
    assert bias is None
    assert mask.plain
    assert torch.equal(mask.padding_BK, PADDING)


def test_a_lazy_row_for_all_queries_is_padding():
    """LightGlue asks for the mask of one query, and gives it to attention of all."""
    row = lazy_mask(2, 1, 8, mask_function=masking_utils.bidirectional_mask_function, attention_mask=PADDING)
    mask, bias = as_mask(row, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=False, cross=False)
    assert bias is None
    assert (mask.q_length, mask.plain, mask.causal) == (8, True, False)
    assert torch.equal(mask.dense(), PADDING[:, None, None].expand(2, 1, 8, 8))
    for other in (lazy_mask(2, 1, 8, q_offset=7), lazy_mask(2, 1, 7, mask_function=row.rule)):
        with pytest.raises(ValueError, match=r"the mask is for [18] queries"):
            as_mask(other, torch.zeros(2, 4, 8, 4), torch.zeros(2, 4, 8, 4), causal=False, cross=False)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("flag", ["softmax", {"type": "local", "window_size": 64}])
@torch.no_grad()
def test_packed_sequences_by_position_ids(name, flag):
    """Packed rows give what each sequence gives alone, and what the model's own attention gives."""
    model = tiny.build(name)
    first, second = (
        tiny.inputs(name, batch=1, length=9, padded=False, seed=2),
        tiny.inputs(name, batch=1, length=5, padded=False),
    )
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(5)]).unsqueeze(0)
    packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    own = model(**packed).logits
    ap.swap_attention(model, flag)
    torch.testing.assert_close(model(**packed).logits, own, atol=3e-6, rtol=1e-5)
    alone = torch.cat([model(**first).logits, model(**second).logits], dim=1)
    torch.testing.assert_close(model(**packed).logits, alone, atol=3e-6, rtol=1e-5)


@torch.no_grad()
def test_own_sliding_layers_stay_exact_under_local():
    """A window wider than the model's own changes nothing; a narrower one does, and hides what lies beyond it."""
    given, model = tiny.inputs("gemma3"), tiny.build("gemma3")
    own = tiny.output(model, given)
    ap.swap_attention(model, {"type": "local", "window_size": 64})
    torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)
    ap.swap_attention(model, {"type": "local", "window_size": 2})
    assert not torch.allclose(tiny.output(model, given), own, atol=1e-3)


@torch.no_grad()
def test_mask_of_the_base_implementation_is_made_once_a_forward(monkeypatch):
    made = []
    original = masking_utils.sdpa_mask
    mapping = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(mapping, "sdpa", lambda **kwargs: made.append(1) or original(**kwargs))
    tiny.output(ap.swap_attention(tiny.build("llama"), "softmax", layers=0), tiny.inputs("llama"))
    assert len(made) == 1


def test_a_mask_made_for_one_query_serves_all_of_them():
    mask = lazy_mask(2, 1, 8, mask_function=RULES["bidirectional"][0], attention_mask=PADDING)
    read, bias = as_mask(mask, torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 8, 4), causal=False, cross=True)
    assert bias is None
    assert torch.equal(read.dense(), PADDING[:, None, None].expand(-1, -1, 5, -1))
    causal = lazy_mask(2, 1, 8, q_offset=7, attention_mask=PADDING)
    with pytest.raises(ValueError, match="1 queries and 8 keys"):
        as_mask(causal, torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 8, 4), causal=True, cross=False)


def attending(name, base, role):
    """The least that an attention module is."""
    module = torch.nn.Module()
    module._attn_plugin_base, module._attn_plugin_role = base, role
    attention = ap.get_attention(name)
    heads = HeadShape(num_heads=2, num_key_value_heads=2, head_dim=4, value_dim=4)
    module.attn_plugin = attention(attention.Config(), heads)
    return module


@pytest.mark.parametrize("name", ["softmax", "linear", "additive"])
def test_queries_that_all_rows_share(name):
    """Learned queries have a batch of 1; a model's own attention broadcasts them."""
    torch.manual_seed(0)
    module = attending(name, "sdpa", "cross")
    query, key = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 8, 4)
    shared, _ = attention_forward(module, query, key, key, None)
    repeated, _ = attention_forward(module, query.repeat(5, 1, 1, 1), key, key, None)
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_without_any_mask_a_causal_module_is_what_its_base_implementation_makes_of_it(base):
    torch.manual_seed(0)
    module = attending("softmax", base, "decoder")
    module.is_causal, query = True, torch.randn(2, 2, 6, 4)
    got, _ = attention_forward(module, query, query, query, None)
    own = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=base == "sdpa")
    torch.testing.assert_close(got, own.transpose(1, 2))
