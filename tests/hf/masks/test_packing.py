"""Texts packed into one row never see each other, whatever tells of them: each gives what it gives alone."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tf
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

import attn_plugins as ap
from attn_plugins.hf.masks import packing

LENGTHS = (9, 1, 12, 6)
NAMES = ap.list_attentions()
CAUSAL = [name for name in NAMES if ap.get_attention(name).causal]
BIDIRECTIONAL = [name for name in NAMES if ap.get_attention(name).bidirectional]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (1, length), generator=generator) for length in LENGTHS]


def pack(padding=False):
    """A row of texts: ids, positions, number of each token's text, and which tokens are real."""
    parts = [(0, 4 * padding), *((length, 0) for length in LENGTHS)]
    parts = [*parts[:3], (0, 3 * padding), *parts[3:], (0, 2 * padding)]
    ids, positions, numbers, real, held = [], [], [], [], iter(texts())
    for number, (length, pads) in enumerate(parts):
        if length:
            ids.append(next(held))
            positions.append(torch.arange(length).unsqueeze(0))
        ids.append(torch.zeros(1, pads, dtype=torch.long))
        positions.append(torch.full((1, pads), 1))
        numbers.append(torch.full((1, length + pads), number))
        real.append(torch.cat([torch.ones(1, length), torch.zeros(1, pads)], dim=1))
    return SimpleNamespace(
        ids=torch.cat(ids, dim=1),
        positions=torch.cat(positions, dim=1),
        numbers=torch.cat(numbers, dim=1).int(),
        real=torch.cat(real, dim=1).bool(),
    )


def lengths_of(numbers):
    """(cumulative lengths of a row) of texts and stretches of padding."""
    changes = (numbers[0].diff() != 0).nonzero().flatten() + 1
    return torch.tensor([0, *changes.tolist(), numbers.shape[1]]).int()


def telling(by, row):
    lengths = lengths_of(row.numbers)
    return {
        "positions": {},
        "lengths": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 12, "max_length_k": 12},
        "numbers": {"seq_idx": row.numbers},
        "4-D mask": {"attention_mask": seen_in(row)},
    }[by] | {"position_ids": row.positions}


def seen_in(row):
    same = row.numbers.unsqueeze(2) == row.numbers.unsqueeze(1)
    return (same & row.real.unsqueeze(1)).tril().unsqueeze(1)


@torch.no_grad()
def alone(model, **given):
    return torch.cat([model(ids, use_cache=False, **given)[0] for ids in texts()], dim=1)


def swapped(build, name, **rule):
    attention = ap.get_attention(name)
    options = {"grid_size": (4, 7)} if hasattr(attention.Config(), "grid_size") else attention.examples[0]
    return ap.swap_attention(build, {"type": name, **options, **rule})


def small(**changes):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny.GROUPED, "num_hidden_layers": 1, **changes})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


TELLINGS = ["positions", "lengths", "numbers", "4-D mask"]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_texts_of_a_row_are_what_they_are_alone(name):
    model = swapped(small(), name)
    expected = alone(model)
    for by, padding, cache in itertools.product(TELLINGS, (False, True), ("none", "made inside", "given")):
        row = pack(padding)
        given = telling(by, row)
        if padding or cache == "given":
            given.setdefault("attention_mask", row.real.long())
        given |= {
            "none": {"use_cache": False},
            "made inside": {},
            "given": {"past_key_values": DynamicCache(config=model.config)},
        }[cache]
        got = model(row.ids, **given).logits
        assert torch.allclose(got[row.real], expected[0], **CLOSE), (by, padding, cache)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_cache_that_holds_tokens_is_not_continued_by_packed_texts(name):
    """Nor by a new text, and one with packed texts by none: each would see what is not its own."""
    model, row, ids = swapped(small(), name), pack(), texts()[0]
    padded = torch.nn.functional.pad(row.real.long(), (ids.shape[1], 0), value=1)
    for by, mask in itertools.product(("positions", "lengths", "numbers"), (None, padded)):
        cache = model(ids).past_key_values
        named = {"positions": "position_ids", "lengths": "cu_seq_lens", "numbers": "seq_idx"}[by]
        with pytest.raises(
            ValueError, match=f"{named}.* tells? of packed texts beside a cache that holds 9 tokens; give"
        ):
            model(row.ids, attention_mask=mask, past_key_values=cache, **telling(by, row))
        assert cache.get_seq_length() == 9
    for mask in (None, torch.ones(1, 18)):
        with pytest.raises(ValueError, match="position_ids begin a new text in rows of which the cache holds another"):
            model(ids, position_ids=torch.arange(9).unsqueeze(0), past_key_values=cache, attention_mask=mask)
        assert cache.get_seq_length() == 9
    follow = {"position_ids": torch.arange(6, 9).unsqueeze(0)}
    for by in ("positions", "lengths", "numbers"):
        cache = model(row.ids, **telling(by, row)).past_key_values
        for given in ({}, follow, {**follow, "attention_mask": torch.ones(1, row.ids.shape[1] + 3)}):
            with pytest.raises(
                ValueError, match="the cache holds packed texts, and nothing tells which of them goes on"
            ):
                model(ids[:, :3], past_key_values=cache, **given)
        cache.crop(-cache.get_seq_length())
        got = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
@torch.no_grad()
def test_encoders_keep_packed_texts_apart_or_refuse_them(name):
    model = swapped(tiny.build("bert").bert, name)
    row, served = pack(), ap.get_attention(name).segments
    for by in ("positions", "lengths", "numbers"):
        if served:
            got = model(row.ids, **telling(by, row)).last_hidden_state
            torch.testing.assert_close(got, alone(model), **CLOSE)
        else:
            with pytest.raises(ValueError, match="this call needs packed sequences"):
                model(row.ids, **telling(by, row))


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "mistral"])
@torch.no_grad()
def test_layers_that_no_rule_matches_keep_texts_apart_too(name, base):
    model = tiny.build(name)
    model.set_attn_implementation(base)
    ap.swap_attention(model, "local", window_size=4, layers=1)
    expected = alone(model)
    for by, cache, padding in itertools.product(TELLINGS[:3], (False, True), (False, True)):
        row = pack(padding)
        given = {"attention_mask": row.real.long()} if padding else {}
        got = model(row.ids, use_cache=cache, **given, **telling(by, row)).logits
        torch.testing.assert_close(got[row.real], expected[0], **CLOSE)


@torch.no_grad()
def test_positions_run_on_where_only_lengths_are_told():
    """Where tokens are is for the model to say, as without packing; attentions of features see it, softmax does not."""
    model, row = ap.swap_attention(small(), "linear"), pack()
    batch = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)(
        [{"input_ids": ids[0].tolist()} for ids in texts()]
    )
    assert torch.equal(batch["input_ids"], row.ids)
    got = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    starts = itertools.accumulate((0, *LENGTHS[:-1]))
    expected = [
        model(ids, position_ids=torch.arange(start, start + ids.shape[1]).unsqueeze(0)).logits
        for start, ids in zip(starts, texts(), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected, dim=1), **CLOSE)


@torch.no_grad()
def test_rows_are_packed_each_in_its_own_way():
    model, ids = ap.swap_attention(small(), "local", window_size=4), torch.cat(texts(), dim=1)
    both = torch.cat([ids, ids.flip(1)])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((8, 20), (28,))])
    lengths = torch.tensor([0, 8, 28, 56]).int()
    told = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    for given in ({"position_ids": positions}, told, {"position_ids": positions, **told}):
        got = model(both, **given).logits
        parts = [model(part).logits for part in (ids[:, :8], ids[:, 8:])]
        torch.testing.assert_close(got[:1], torch.cat(parts, dim=1), **CLOSE)
        torch.testing.assert_close(got[1:], model(both[1:]).logits, **CLOSE)


@torch.no_grad()
def test_texts_that_only_one_of_two_tells_of_are_kept_apart():
    model, ids = ap.swap_attention(small(), "local", window_size=4), torch.cat(texts(), dim=1)
    positions = torch.cat([torch.arange(8), torch.arange(20)]).unsqueeze(0)
    lengths = torch.tensor([0, 8, 15, 28]).int()
    parts = [model(part).logits for part in (ids[:, :8], ids[:, 8:15], ids[:, 15:])]
    for cache in (False, True):
        got = model(ids, position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, use_cache=cache).logits
        torch.testing.assert_close(got, torch.cat(parts, dim=1), **CLOSE)


@torch.no_grad()
def test_one_text_a_row_is_not_packed():
    """Also with padding anywhere, positions that skip some, and lengths of whole rows beside a cache."""
    model, ids = ap.swap_attention(small(), "linear"), torch.cat(texts(), dim=1)[:, :8]
    cache = model(ids[:, :5]).past_key_values
    whole = {"cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 8])}
    got = model(ids[:, 5:], past_key_values=cache, **whole).logits
    torch.testing.assert_close(got, model(ids).logits[:, 5:], **CLOSE)
    for real in ([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 1, 1], [1] * 8):
        mask = torch.tensor([real])
        for positions in (
            mask.cumsum(1) - 1,
            torch.where(mask.bool(), mask.cumsum(1) - 1, 1),
            torch.arange(8).view(1, 8),
        ):
            assert packing.read(ids, None, mask, None, positions, None, None, None)[1] is None
    skipping = torch.tensor([[0, 1, 2, 6, 7, 8, 11, 12]])
    assert packing.read(ids, None, torch.ones(1, 8), None, skipping, None, None, None)[1] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": [0, 8, 27]}, r"cu_seq_lens=\[0, 8, 27\]; allowed: lengths summed up, from 0 to 28 tokens"),
        ({"cu_seq_lens_q": [0, 9, 8, 28]}, r"cu_seq_lens=\[0, 9, 8, 28\]; allowed: lengths summed up"),
        ({"cu_seq_lens_q": [[0, 28]]}, r"cu_seq_lens=\[\[0, 28\]\]; allowed: lengths summed up"),
        ({"cu_seq_lens_q": [0, 8, 28], "cu_seq_lens_k": [0, 9, 28]}, r"cu_seq_lens_k=\[0, 9, 28\]; allowed: the same"),
        ({"seq_idx": torch.zeros(1, 27)}, r"seq_idx is of shape \(1, 27\); allowed: \(1, 28\)"),
        (
            {"cu_seq_lens_q": [0, 8, 28], "attention_mask": torch.ones(1, 1, 28, 28).bool().tril()},
            r"cu_seq_lens tells of packed texts beside a mask \(1, 1, 28, 28\) that may say otherwise",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(given, message):
    model = ap.swap_attention(small(), "local")
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        model(torch.cat(texts(), dim=1), **given)
    assert packing.running() is None


def test_an_export_that_fails_leaves_nothing_told():
    model = ap.swap_attention(small(), "local")

    def fail(*_):
        raise KeyError("a layer that fails")

    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="a layer that fails"):
        torch.export.export(model, (torch.cat(texts(), dim=1),), {"use_cache": False}, strict=False)
    assert packing.running() is None


def test_a_text_across_rows_is_refused():
    model, lengths = ap.swap_attention(small(), "local"), torch.tensor([0, 12, 28])
    with pytest.raises(ValueError, match=r"cu_seq_lens=\[0, 12, 28\] has a text across rows of 14 tokens"):
        model(torch.cat(texts(), dim=1).view(2, 14), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@torch.no_grad()
def test_packed_texts_and_caches_of_fixed_length():
    row = pack()
    for name in ("local", "softmax"):
        model = ap.swap_attention(small(), name)
        cache = StaticCache(config=model.config, max_cache_len=40)
        with pytest.raises(ValueError, match="position_ids tells of packed texts beside a cache of fixed length"):
            model(row.ids, position_ids=row.positions, past_key_values=cache)


@torch.no_grad()
def test_packed_texts_are_not_generated_from():
    model, row = ap.swap_attention(small(), "local"), pack()
    with pytest.raises(ValueError, match="the cache holds packed texts"):
        model.generate(row.ids, position_ids=row.positions, max_new_tokens=3, pad_token_id=0)


@torch.no_grad()
def test_decoders_with_cross_attention_refuse_packed_texts():
    model, row = ap.swap_attention(tiny.build("whisper"), "local", roles="decoder"), pack()
    given = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": row.ids}
    with pytest.raises(
        ValueError, match="position_ids tells of packed texts to a model with cross-attention; give each"
    ):
        model(**given, decoder_position_ids=row.positions)


@torch.no_grad()
def test_a_models_own_chunks_are_counted_from_each_text():
    config = tf.Llama4TextConfig(
        **{**tiny.GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 1},
        attention_chunk_size=4,
        no_rope_layers=[1] * 3,
    )
    torch.manual_seed(0)
    model, row = tf.Llama4ForCausalLM(config).eval(), pack()
    ap.swap_attention(model, "softmax")
    with pytest.raises(
        ValueError, match="position_ids tells of packed texts to a model whose own attention counts chunks"
    ):
        model(row.ids, position_ids=row.positions)
    if not packing.COUNTS_TEXTS:
        pytest.skip("these transformers count chunks from the beginning of a row")
    got = model(row.ids, position_ids=row.positions, use_cache=False).logits
    torch.testing.assert_close(got, alone(model), **CLOSE)


@torch.no_grad()
@torch.no_grad()
def test_one_position_for_all_tokens_tells_nothing():
    """Decision Transformer gives its GPT-2 zeros, since it has no positions."""
    model, given = tiny.build("gpt2"), tiny.inputs("gpt2")
    given["position_ids"] = torch.zeros_like(given["input_ids"])
    own = tiny.output(model, given)
    torch.testing.assert_close(tiny.output(ap.swap_attention(model, "softmax"), given), own, **CLOSE)


def test_images_positions_are_no_texts():
    """Models of images and text pass three positions a token, four where they tell of texts too."""
    row = pack()
    three = row.positions.expand(3, 1, -1)
    assert packing.read(row.ids, None, None, None, three, None, None, None)[1] is None
    four = torch.cat([row.positions.unsqueeze(0), three])
    told = packing.read(row.ids, None, None, None, four, None, None, None)
    assert told[0] == "position_ids"
    assert torch.equal(lengths_of(told[1]), lengths_of(row.numbers))


@torch.no_grad()
def test_a_model_that_makes_its_masks_without_texts_is_refused(monkeypatch):
    """Where a model hands on no mask, or one of its own, nothing keeps texts apart."""
    model, row = ap.swap_attention(small(), "local"), pack()
    for made in (None, torch.ones(1, 1, 28, 28, dtype=torch.bool).tril()):
        monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda made=made, **_: made)
        with pytest.raises(ValueError, match="tells LlamaModel of packed texts, and it makes masks without them"):
            model(row.ids, position_ids=row.positions)
        model(row.ids)


@torch.no_grad()
def test_masks_of_flash_attention_cannot_hold_texts_and_padding():
    row = pack(padding=True)
    model = ap.swap_attention(tiny.build("llama"), "local", layers=0)
    for module in model.modules():
        if getattr(module, "_attn_plugin_base", None):
            module._attn_plugin_base = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot keep packed texts apart in rows with padding"):
        model(row.ids, position_ids=row.positions, attention_mask=row.real)


def test_gradients_do_not_leak_with_and_without_checkpointing():
    model, row = ap.swap_attention(tiny.build("llama"), "linear").train(), pack()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        embeds = model.get_input_embeddings()(row.ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, position_ids=row.positions, use_cache=False).logits
        logits[:, 10:22].square().sum().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(found[1], found[0])
    inside = found[0].abs().sum(dim=-1)[0] > 0
    assert torch.equal(inside, (torch.arange(28) >= 10) & (torch.arange(28) < 22))


def test_threads_share_a_model():
    model, row = ap.swap_attention(small(), "local"), pack()
    packed = {"position_ids": row.positions, "use_cache": False}
    with torch.no_grad():
        expected = [model(row.ids, **given).logits for given in (packed, {})]
    got = {}

    def run(number):
        with torch.no_grad():
            got[number] = [model(row.ids, **(packed if number % 2 == 0 else {})).logits for _ in range(10)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, held in got.items():
        for logits in held:
            torch.testing.assert_close(logits, expected[number % 2])


def test_a_restored_model_listens_no_more():
    model = tiny.build("llama")
    before = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    for _ in range(2):
        ap.swap_attention(model, "local", layers=0)
    listening = [list(part._forward_hooks.values()).count(packing.end) for part in (model, model.model)]
    assert listening == [1, 1]
    ap.restore_attention(model)
    assert [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()] == before


@pytest.mark.slow
@torch.no_grad()
def test_a_model_compiled_whole_keeps_texts_apart():
    model, row = ap.swap_attention(small(), "softmax"), pack()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(row.ids, attention_mask=row.real.long(), use_cache=False, **telling("lengths", row)).logits
    torch.testing.assert_close(got, alone(model), **CLOSE)
    torch._dynamo.reset()
