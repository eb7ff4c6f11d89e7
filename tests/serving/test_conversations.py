"""What is held of a conversation: exactly what was read, for whom it is right, in as many bytes as there are."""

import pytest
import tiny
import torch
import transformers as tf
from chatting import LINEAR, LOCAL

import attn_plugins as ap
from attn_plugins.serving.conversations import Conversations

pytestmark = pytest.mark.usefixtures("one_thread")


def made(rule):
    model = tiny.build("llama")
    return model if rule is None else ap.swap_attention(model, rule)


def text(length, seed=0):
    return torch.randint(3, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def given(ids, **settings):
    config = tf.GenerationConfig(**{"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **settings})
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}


def tokens_read(model, call):
    """How many tokens the model is given, call by call."""
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    call()
    hook.remove()
    return read


@pytest.mark.parametrize("rule", [LOCAL, LINEAR, None], ids=["local", "linear", "dense"])
def test_a_prompt_is_read_from_where_it_differs_from_what_is_held(rule):
    model, held, ids = made(rule), Conversations(2**20), text(40)
    assert tokens_read(model, lambda: held.generate(model, **given(ids))) == [39, 1, 1, 1, 1, 1]
    longer = torch.cat([ids, text(20, 1)], dim=1)
    wanted = model.generate(**given(longer))
    got = []
    read = tokens_read(model, lambda: got.append(held.generate(model, **given(longer))))
    assert read == [20, 1, 1, 1, 1, 1]
    assert torch.equal(got[0], wanted)
    again = tokens_read(model, lambda: got.append(held.generate(model, **given(longer))))
    assert again == [1, 1, 1, 1, 1], "the same prompt once more, which is all but its last token"
    assert torch.equal(got[1], wanted)
    other = longer.clone()
    other[0, 30] = (other[0, 30] + 1) % tiny.VOCABULARY
    assert tokens_read(model, lambda: got.append(held.generate(model, **given(other)))) == [59, 1, 1, 1, 1, 1]
    assert torch.equal(got[2], model.generate(**given(other)))
    assert [len(tokens) for tokens, _ in held.held] == [59, 59]


def test_of_two_that_a_prompt_begins_with_the_longer_is_gone_on_from():
    model, held, ids = made(LINEAR), Conversations(2**20), text(80)
    for length in (60, 40, 20):
        held.generate(model, **given(ids[:, :length]))
    assert tokens_read(model, lambda: held.generate(model, **given(ids))) == [20, 1, 1, 1, 1, 1]
    assert sorted(len(tokens) for tokens, _ in held.held) == [19, 39, 79]


def test_a_prompt_is_read_in_pieces():
    model, held, ids = made(LOCAL), Conversations(2**20), text(40)
    read = tokens_read(model, lambda: held.generate(model, **given(ids, prefill_chunk_size=16)))
    assert read == [16, 16, 7, 1, 1, 1, 1, 1]


def test_a_drawn_answer_is_the_one_that_generate_draws():
    model, held, ids = made(LOCAL), Conversations(2**20), text(40)
    drawn = []
    for generate in (model.generate, lambda **options: held.generate(model, **options)):
        torch.manual_seed(3)
        drawn.append(generate(**given(ids, do_sample=True, max_new_tokens=20)))
    assert torch.equal(*drawn)


def test_the_oldest_goes_where_there_is_no_more_room():
    model, cache = made(LOCAL), tf.DynamicCache()
    model(input_ids=text(30), past_key_values=cache)
    held = Conversations(2 * ap.cache_bytes(cache))
    for seed in range(3):
        held.generate(model, **given(text(30, seed)))
    assert held.num_bytes == held.room
    assert [tokens[0] for tokens, _ in held.held] == [text(30, seed)[0, 0] for seed in (1, 2)]
    assert tokens_read(model, lambda: held.generate(model, **given(text(30, 1)))) == [1, 1, 1, 1, 1]
    held.generate(model, **given(text(30, 3)))
    assert [tokens[0] for tokens, _ in held.held] == [text(30, seed)[0, 0] for seed in (1, 3)], "asked for of late"
    held.room = 0
    held.generate(model, **given(text(30, 4)))
    assert held.held == []


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("own", [False, True], ids=["asked", "the model's own"])
def test_what_does_not_go_on_plainly_is_as_generate_does_it(settings, own):
    model, held, ids = made(LOCAL), Conversations(2**20), text(40)
    if own:
        model.generation_config.update(**settings)
    out = []
    for generate in (model.generate, lambda **options: held.generate(model, **options)):
        torch.manual_seed(3)
        out.append(generate(**given(ids, **({"do_sample": settings.get("do_sample", False)} if own else settings))))
    assert torch.equal(*out)
    assert held.held == []


def test_rows_with_padding_and_batches_are_as_generate_does_them():
    model, held, ids = made(LOCAL), Conversations(2**20), text(40)
    padded = given(ids)
    padded["attention_mask"][0, :3] = 0
    assert torch.equal(held.generate(model, **padded), model.generate(**padded))
    several = given(ids.expand(2, -1))
    assert torch.equal(held.generate(model, **several), model.generate(**several))
    assert held.held == []


@pytest.mark.parametrize("name", ["t5", "llava"])
def test_a_model_that_reads_more_than_one_text_is_as_generate_does_it(name):
    model, held, ids = tiny.build(name), Conversations(2**20), text(20)
    assert torch.equal(held.generate(model, **given(ids)), model.generate(**given(ids)))
    assert held.held == []


def test_an_error_leaves_what_others_said_as_it_was():
    model, held, ids = made(LINEAR), Conversations(2**20), text(40)
    held.generate(model, **given(ids))
    with pytest.raises(IndexError):
        held.generate(model, **given(torch.full((1, 10), tiny.VOCABULARY)))
    assert tokens_read(model, lambda: held.generate(model, **given(ids))) == [1, 1, 1, 1, 1]
