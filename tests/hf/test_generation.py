"""generate() is right for every causal attention through transformers' ordinary caches."""

import pytest
import tiny
import torch
from cases import head_shape
from transformers import DynamicCache

import attn_plugins as ap

CAUSAL = [name for name in ap.list_attentions() if ap.get_attention(name).causal]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def serves(name, model_name):
    """Whether the attention supports what the architecture's self-attention needs."""
    return all(getattr(ap.get_attention(name), need) for need in tiny.NEEDS.get(model_name, ()))


def flag(name):
    """Options at which the pattern bites at the lengths of these tests."""
    attention = ap.get_attention(name)
    return {"type": name, **(attention.examples[-1] if attention.examples else {})}


def kept(name):
    """What a cache has to keep for it, which is all that other architectures than LLaMA's see of an attention."""
    cls, options = ap.get_attention(name), {**flag(name)}
    options.pop("type")
    module = cls(cls.Config(**options), head_shape())
    state = module.new_state()
    return type(state), getattr(state, "window", None) == 0, module.wants_hidden, module.wants_hidden_of_keys


def pairs():
    """All attentions in LLaMA, and in each other architecture one of those that keep the same; the rest are slow."""
    kinds = {}
    for name in CAUSAL:
        kinds.setdefault(kept(name), []).append(name)
    for place, model in enumerate((*tiny.DECODERS, *tiny.OWN_PATTERN, *tiny.ENCODER_DECODERS)):
        for alike in kinds.values():
            served = [name for name in alike if serves(name, model)]
            for number, name in enumerate(served):
                slow = model != "llama" and number != place % len(served)
                yield pytest.param(name, model, id=f"{name}-{model}", marks=[pytest.mark.slow] if slow else [])


PAIRS = list(pairs())


def swapped(name, model_name):
    model = tiny.build(model_name)
    roles = ["decoder"] if "decoder" in {row.role for row in ap.describe_attention(model)} else None
    return ap.swap_attention(model, {**flag(name), "roles": roles})


@pytest.mark.parametrize("model_name", tiny.NEEDS)
def test_what_lacks_a_need_of_the_model_is_refused(model_name):
    model = tiny.build(model_name)
    for name in CAUSAL:
        if not serves(name, model_name):
            with pytest.raises(ValueError, match=rf"attention '{name}' has no '({'|'.join(tiny.NEEDS[model_name])})'"):
                ap.swap_attention(model, {**flag(name), "roles": "decoder"})


@pytest.mark.parametrize(("name", "model_name"), PAIRS)
@torch.no_grad()
def test_cached_equals_uncached_for_greedy_and_beams_with_left_padding(name, model_name):
    model, given = swapped(name, model_name), tiny.inputs(model_name)
    given.pop("decoder_input_ids", None)
    greedy = [{}] if model_name == "llama" else []  # beams are the same steps, and reorder the cache between them
    for how in (*greedy, {"num_beams": 3}):
        made = [
            model.generate(**given, **GREEDY, **how, use_cache=cache, output_logits=True, return_dict_in_generate=True)
            for cache in (True, False)
        ]
        assert torch.equal(made[0].sequences, made[1].sequences)
        for cached, uncached in zip(made[0].logits, made[1].logits, strict=True):
            torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_left_padding_and_company_change_nothing(name):
    model, given = swapped(name, "llama"), tiny.inputs("llama")
    together = model.generate(**given, **GREEDY)[:, 13:]
    for row in range(2):
        real = given["attention_mask"][row].bool()
        alone = {
            "input_ids": given["input_ids"][row][real][None],
            "attention_mask": given["attention_mask"][row][real][None],
        }
        assert torch.equal(model.generate(**alone, **GREEDY)[0, -6:], together[row])
    swapped_rows = {key: value.flip(0) for key, value in given.items()}
    assert torch.equal(model.generate(**swapped_rows, **GREEDY)[:, 13:].flip(0), together)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sizes", [(1,) * 13, (5, 1, 7), (12, 1)])
@torch.no_grad()
def test_prefill_in_pieces_equals_one_pass(name, sizes):
    model, given = swapped(name, "llama"), tiny.inputs("llama")
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole = model(**given, position_ids=positions, use_cache=False).logits
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        end = start + size
        piece = {"input_ids": given["input_ids"][:, start:end], "attention_mask": given["attention_mask"][:, :end]}
        pieces.append(model(**piece, position_ids=positions[:, start:end], past_key_values=cache).logits)
        start = end
    real = given["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sampling_and_several_sequences_are_reproducible():
    model, given = ap.swap_attention(tiny.build("llama"), "local", window_size=4), tiny.inputs("llama")
    made = []
    for cache in (True, False):
        torch.manual_seed(5)
        made.append(model.generate(**given, max_new_tokens=6, do_sample=True, num_return_sequences=2, use_cache=cache))
    assert torch.equal(made[0], made[1])
