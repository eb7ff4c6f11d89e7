"""What users do with a cache works on one that holds states: kept over turns, drafted for, reordered, saved, static."""

import contextlib
import copy
import io
import threading

import pytest
import tiny
import torch
from test_generation import CAUSAL, GREEDY, flag, swapped
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaForCausalLM,
    TextGenerationPipeline,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.generation.streamers import BaseStreamer

import attn_plugins as ap
from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.hf.caches.state_layer import StateLayer

BOUNDED = [name for name in CAUSAL if (cls := ap.get_attention(name)) and cls.new_state is not ap.Attention.new_state]
LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 2}

every_causal = pytest.mark.parametrize("name", CAUSAL)
every_bounded = pytest.mark.parametrize("name", BOUNDED)


def prompt(batch=1, length=13):
    return tiny.inputs("llama", batch=batch, length=length, padded=batch > 1)


def uncached(model, given, **how):
    return model.generate(**given, **{**GREEDY, **how}, use_cache=False)


@every_causal
@torch.no_grad()
def test_a_cache_kept_over_turns(name):
    model, given = swapped(name, "llama"), prompt(batch=2)
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        said = model.generate(**given, **GREEDY, past_key_values=cache)
        assert torch.equal(said, uncached(model, given))
        assert cache.get_seq_length() == said.shape[1] - 1
        asked = tiny.inputs("llama", length=5, padded=False, seed=turn + 7)["input_ids"]
        mask = torch.cat([given["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
        given = {"input_ids": torch.cat([said, asked], dim=1), "attention_mask": mask}


@every_causal
def test_training_beside_a_cache_behind_padding_equals_training_without_one(name):
    """Models make a cache in training too, unless they are told not to."""
    model, given, gradients = swapped(name, "llama"), tiny.inputs("llama"), []
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    for cache in (True, False):
        model.zero_grad()
        model(**given, labels=labels, use_cache=cache).loss.backward()
        gradients.append({path: weight.grad for path, weight in model.named_parameters()})
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][path], atol=1e-6, rtol=1e-3, msg=path)


@every_causal
@torch.no_grad()
def test_chunked_prefill(name):
    model, given = swapped(name, "llama"), prompt(batch=2)
    assert torch.equal(model.generate(**given, **GREEDY, prefill_chunk_size=4), uncached(model, given))


@every_causal
@torch.no_grad()
def test_assisted_decoding(name):
    model, given = swapped(name, "llama"), prompt()
    how = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
    want = uncached(model, given, **how)
    # An assistant that is nearly the same model: some drafts are right and some are not.
    assistant = swapped(name, "llama")
    assistant.load_state_dict(model.state_dict())
    assistant.lm_head.weight.add_(
        0.08 * torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    )
    assistant.generation_config.num_assistant_tokens = 4
    assert torch.equal(model.generate(**given, **how, assistant_model=assistant), want)
    assert torch.equal(model.generate(**given, **how, prompt_lookup_num_tokens=3), want)
    repeated = {key: value.repeat(1, 3) for key, value in given.items()}
    want = uncached(model, repeated, **how)
    assert torch.equal(model.generate(**repeated, **how, prompt_lookup_num_tokens=3), want)


@every_bounded
@torch.no_grad()
def test_a_crop_that_was_not_recorded_is_exact_or_refused(name):
    model, given = swapped(name, "llama"), prompt(length=30)
    cache = DynamicCache(config=model.config)
    model(**given, past_key_values=cache)
    try:
        cache.crop(-4)
    except ValueError as error:
        assert "activate_past_recording" in str(error)  # noqa: PT017
        kept = 30
    else:
        kept = 26
    assert cache.get_seq_length() == kept
    token = torch.tensor([[5]])
    ids = torch.cat([given["input_ids"][:, :kept], token], dim=1)
    want = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(token, past_key_values=cache).logits, want, atol=1e-5, rtol=1e-4)


@every_bounded
@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(name):
    model, given = swapped(name, "llama"), prompt(batch=2)
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    for cache in caches:
        model(**given, position_ids=positions, past_key_values=cache)
    caches[0].batch_repeat_interleave(2)
    caches[1].batch_select_indices(torch.tensor([1]))
    caches[2].reorder_cache(torch.tensor([1, 0]))
    for cache, rows in zip(caches, ([0, 0, 1, 1], [1], [1, 0]), strict=True):
        ids = torch.cat([given["input_ids"], torch.full((2, 1), 9)], dim=1)[rows]
        mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)[rows]
        at = (mask.cumsum(-1) - 1).clamp(min=0)
        want = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits[:, -1:]
        got = model(ids[:, -1:], attention_mask=mask, position_ids=at[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@every_bounded
@torch.no_grad()
def test_copies_saved_offloaded_and_reset_caches(name):
    model, given = swapped(name, "llama"), prompt(length=20)
    cache = DynamicCache(config=model.config)
    model(**given, past_key_values=cache)
    file = io.BytesIO()
    torch.save(cache, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    copied = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    token = torch.tensor([[5]])
    want = model(torch.cat([given["input_ids"], token], dim=1), use_cache=False).logits[:, -1:]
    for each in (cache, copied, saved):
        torch.testing.assert_close(model(token, past_key_values=each).logits, want, atol=1e-5, rtol=1e-4)
        assert each.get_seq_length() == 21
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(**given, past_key_values=cache).logits
    torch.testing.assert_close(again, model(**given, use_cache=False).logits, atol=1e-5, rtol=1e-4)


class Words(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


@torch.no_grad()
def test_streamers_get_every_token():
    model, given, streamer = ap.swap_attention(tiny.build("llama"), LOCAL), prompt(), Words()
    said = model.generate(**given, **GREEDY, streamer=streamer)
    assert streamer.seen == said[0].tolist()
    assert streamer.ended


def test_pipelines(tokenizer_of_words):
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    made = [
        TextGenerationPipeline(model, tokenizer_of_words, batch_size=2)(
            ["the red cat is good .", "a dog"],
            generation_config=GenerationConfig(**GREEDY, pad_token_id=3, use_cache=use),
        )
        for use in (True, False)
    ]
    assert made[0] == made[1]


@pytest.fixture
def tokenizer_of_words():
    from conftest import tokenizer

    made = tokenizer()
    made.padding_side = "left"
    return made


@torch.no_grad()
def test_hybrids_mix_by_layer_and_report_their_size():
    model, given = tiny.build("llama"), prompt()
    ap.swap_attention(model, [{**LOCAL, "layers": [0, 2]}, {"type": "softmax", "layers": 1}])
    sizes = []
    for new_tokens in (6, 40):
        cache = DynamicCache(config=model.config)
        model.generate(
            **given, **{**GREEDY, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}, past_key_values=cache
        )
        assert [type(layer).__name__ for layer in cache.layers] == ["StateLayer", "DynamicLayer", "StateLayer"]
        assert "local(window_size=4" in repr(cache)
        sizes.append(
            [layer.num_bytes if isinstance(layer, StateLayer) else layer.keys.nbytes * 2 for layer in cache.layers]
        )
        assert cache_bytes(cache) == sum(sizes[-1])
    assert sizes[0][0] == sizes[1][0] > 0
    assert sizes[0][1] < sizes[1][1]


@every_bounded
@torch.no_grad()
def test_tokens_are_counted_where_every_layer_holds_a_state(name):
    model, given = swapped(name, "llama"), prompt()
    cache = model(**given).past_key_values  # made by the model itself
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 13
    bare = DynamicCache()  # has no layers before the first call
    model(**given, past_key_values=bare)
    assert all(isinstance(layer, StateLayer) for layer in bare.layers)
    assert bare.get_seq_length() == 13
    assert bare.get_mask_sizes(2, 0) == (15, 0)
    assert cache_bytes(bare) == cache_bytes(cache) > 0


@torch.no_grad()
def test_a_cache_filled_before_the_swap_goes_on_with_all_its_keys():
    model, given = tiny.build("llama"), prompt()
    cache = DynamicCache(config=model.config)
    model(**given, past_key_values=cache)
    ap.swap_attention(model, "local", window_size=64)  # of the length of the text: as before
    want = model(torch.cat([given["input_ids"], torch.tensor([[5]])], dim=1), use_cache=False).logits[:, -1:]
    got = model(torch.tensor([[5]]), past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_caches_of_other_rules_models_and_batches_are_refused_and_stay_as_they_are():
    model, given = tiny.build("llama"), prompt()
    ap.swap_attention(model, LOCAL)
    cache = DynamicCache(config=model.config)
    model(**given, past_key_values=cache)
    token, held = torch.tensor([[5]]), copy.deepcopy(cache)

    other = ap.swap_attention(tiny.build("llama"), {**LOCAL, "window_size": 5})
    with pytest.raises(ValueError, match=r"holds the state of local\(window_size=4.*not of local\(window_size=5"):
        other(token, past_key_values=cache)
    mixed = ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": [0]})
    plain = tiny.build("llama")
    for without in (mixed, plain):
        with pytest.raises(ValueError, match=r"holds the state of local.*does not have"):
            without(token, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match=r"\(rows, heads, size\) = \(1, 2, 8\).*got \(3, 2, 8\)"):
        model(token.repeat(3, 1), past_key_values=cache)
    small = tiny.config_of("llama")
    small.num_hidden_layers = 1
    with pytest.raises(ValueError, match="the cache has 1 layers and layer 1 needs one"):
        model(token, past_key_values=DynamicCache(config=small))
    want = model(token, past_key_values=held).logits
    assert torch.equal(model(token, past_key_values=cache).logits, want)


@torch.no_grad()
def test_restored_models_have_caches_as_before():
    model = ap.restore_attention(ap.swap_attention(tiny.build("llama"), LOCAL))
    cache = model(**prompt()).past_key_values
    assert not any(isinstance(layer, StateLayer) for layer in cache.layers)
    assert not model.model._forward_pre_hooks
    assert not model.model.layers[0].self_attn._forward_pre_hooks


@torch.no_grad()
def test_decoders_of_encoder_decoder_models_are_bounded_and_t5_is_not():
    given = tiny.inputs("bart")
    given.pop("decoder_input_ids")
    for name, bounded in (("bart", True), ("t5", False)):
        model = ap.swap_attention(tiny.build(name), {**LOCAL, "roles": ["decoder"]})
        made = model.generate(**given, **GREEDY, return_dict_in_generate=True)
        cache = made.past_key_values
        assert isinstance(cache, EncoderDecoderCache)
        assert all(isinstance(layer, StateLayer) == bounded for layer in cache.self_attention_cache.layers)
        assert not any(isinstance(layer, StateLayer) for layer in cache.cross_attention_cache.layers)
        assert cache_bytes(cache) > cache_bytes(cache.self_attention_cache) > 0


@every_bounded
@torch.no_grad()
def test_whisper_takes_its_cache_apart_and_generates_all_the_same(name):
    model, given = (
        ap.swap_attention(tiny.build("whisper"), {**flag(name), "roles": ["decoder"]}),
        tiny.inputs("whisper"),
    )
    model.generation_config.pad_token_id = 0
    how = {**GREEDY, "return_dict_in_generate": True}
    for more in ({}, {"num_beams": 3}):
        made, want = (model.generate(**given, **how, **more, use_cache=use).sequences for use in (True, False))
        assert torch.equal(made, want)


@torch.no_grad()
def test_threads_have_their_own_caches():
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    prompts = [tiny.inputs("llama", batch=1, length=9 + n, padded=False, seed=n) for n in range(4)]
    want = [uncached(model, given) for given in prompts]
    got = [None] * 4

    def work(n):
        for _ in range(3):
            got[n] = model.generate(**prompts[n], **GREEDY)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Counting(DynamicLayer):
    """A kind of layer that a user chose."""


class Rounded(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, q_tensor):
        return q_tensor.float()


@torch.no_grad()
def test_layers_of_kinds_that_are_not_known_keep_all_keys_and_say_so_once():
    model, given = ap.swap_attention(tiny.build("llama"), LOCAL), prompt(batch=2)
    want = uncached(model, given)
    for kind in (Counting, Rounded):
        for times in range(2):
            cache = Cache(layers=[kind() for _ in range(3)])
            said = rf"{kind.__name__} keeps the keys and values of all tokens.*use the default cache"
            with pytest.warns(UserWarning, match=said) if not times else contextlib.nullcontext():
                got = model.generate(**given, **GREEDY, past_key_values=cache)
            assert [type(layer) for layer in cache.layers] == [kind] * 3
            assert torch.equal(got, want)
    ap.swap_attention(model, "softmax")  # needs all keys in any case
    model.generate(**given, **GREEDY, past_key_values=Cache(layers=[Counting() for _ in range(3)]))


REINDEXED = {"type": "local", "window_size": 4, "num_sink_tokens": 3, "positions": "cache"}


@pytest.mark.parametrize("model_name", ["llama", "gpt_neox", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_positions_counted_within_the_cache_are_the_same_without_one(model_name):
    model, given = ap.swap_attention(tiny.build(model_name), REINDEXED), tiny.inputs(model_name)
    how = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**given, **how, use_cache=False)
    alone = {key: value[1:] for key, value in given.items()}
    for got, rows in (
        (model.generate(**given, **how), slice(2)),
        (model.generate(**given, **how, prefill_chunk_size=5), slice(2)),
        (model.generate(**given, **how, cache_implementation="static"), slice(2)),
        (model.generate(**alone, **how, prompt_lookup_num_tokens=3), slice(1, 2)),
    ):
        assert torch.equal(got.sequences, want.sequences[rows])
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b[rows], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_counted_within_the_cache_are_those_of_a_plain_run_over_what_is_kept():
    config = tiny.config_of("llama")
    config.num_hidden_layers = 1  # in more layers, what is kept has seen what is not
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    ids, cache = tiny.inputs("llama", batch=1, length=30, padded=False)["input_ids"], DynamicCache(config=config)
    plain = [
        model(torch.cat([ids[:, :3], ids[:, max(3, end - 4) : end]], dim=1), use_cache=False).logits[:, -1]
        for end in range(4, 31)
    ]
    ap.swap_attention(model, REINDEXED)
    kept = [model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1] for at in range(30)][3:]
    at_once = model(ids, use_cache=False).logits[0, 3:].unsqueeze(1)
    ap.swap_attention(model, {**REINDEXED, "positions": "true"})
    true = model(ids, use_cache=False).logits[0, 3:].unsqueeze(1)
    for number, want in enumerate(plain):
        torch.testing.assert_close(kept[number], want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(at_once[number], want, atol=1e-5, rtol=1e-4)
    assert (true[-1] - plain[-1]).abs().max() > 1e-2


@torch.no_grad()
def test_positions_within_the_cache_need_rotary_positions_and_a_cache_of_their_own():
    with pytest.raises(ValueError, match=r"needs rotary positions, and transformer.h.0.attn .*has none"):
        ap.swap_attention(tiny.build("gpt2"), REINDEXED)
    model, given = tiny.build("llama"), prompt()
    cache = model(**given).past_key_values
    ap.swap_attention(model, REINDEXED)
    with pytest.raises(ValueError, match="got 1 queries and 14 keys; allowed: as many keys as queries, or a cache"):
        model(torch.tensor([[5]]), past_key_values=cache)
