"""`attn-plugins serve`: what a client of OpenAI's library gets over HTTP, and what the server holds meanwhile."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chatting import LINEAR, LOCAL, expected, save_model, say, serving
from conftest import WORDS, on_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

import attn_plugins as ap
from attn_plugins.data import demo_model as demo

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = pytest.mark.parametrize("rule", [LOCAL, LINEAR], ids=lambda rule: rule["type"])


def held(server):
    """The conversations of a server's model."""
    return server.loaded()[0].generate.func.__self__


def sentence(chance):
    return " ".join(chance.choices(WORDS, k=8))


def user(text):
    return {"role": "user", "content": text}


@RULES
def test_a_long_conversation_is_answered_in_constant_memory_as_if_it_were_read_anew(rule, tmp_path):
    folder, chance, messages = save_model(tmp_path, rule), random.Random(0), []
    fresh, sizes, read, answers = AutoModelForCausalLM.from_pretrained(folder), set(), [], set()
    with serving(folder) as (server, client):
        hook = server.loaded()[0].model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        for turn in range(20):
            messages.append(user(sentence(chance)))
            answer = say(server, client, messages, stream=turn % 2 == 1)
            assert answer == expected(folder, messages, model=fresh)
            messages.append({"role": "assistant", "content": answer})
            answers.add(answer)
            if turn > 1:
                sizes.add(held(server).num_bytes)
        hook.remove()
        ((tokens, cache),) = held(server).held
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages[:-1], add_generation_prompt=True)
    ids = torch.tensor(ids["input_ids"])[None]
    assert torch.equal(ids[0, :-1], tokens)
    with torch.no_grad():
        went_on = server.loaded()[0](input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(went_on, fresh(input_ids=ids).logits[0, -1], atol=1e-4, rtol=1e-4)
    assert len(answers) > 10, "answers that are all alike would hide what is read wrongly"
    assert len(sizes) == 1
    assert ap.cache_bytes(cache) in sizes
    assert len(tokens) > 19 * 8
    assert sum(read) < 20 * 40, "read anew it would be thousands"


def test_every_endpoint_answers_as_generate_does_streaming_and_not(tmp_path):
    openai, folder = pytest.importorskip("openai"), save_model(tmp_path, LOCAL)
    messages = [user("the cat is good ."), {"role": "assistant", "content": "one two"}, user("a dog")]
    text = "red green blue one two three"
    made, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = made(text, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    wanted, continued = expected(folder, messages), made.decode(out, skip_special_tokens=True)
    with serving(folder) as (server, client):
        assert [one.id for one in client.models.list()] == [folder]
        with pytest.raises(openai.BadRequestError, match="400"):
            client.completions.create(model="other", prompt=text)
        common = {"model": folder, "temperature": 0}
        for stream in (False, True):
            assert say(server, client, messages, stream=stream) == wanted
        asked = {**common, "input": messages, "max_output_tokens": 6}
        assert client.responses.create(**asked, stream=False).output_text == wanted  # by default it streams
        events = client.responses.create(**asked, stream=True)
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == wanted
        asked = {**common, "prompt": text, "max_tokens": 6}
        assert client.completions.create(**asked).choices[0].text == continued
        parts = client.completions.create(**asked, stream=True)
        assert "".join(part.choices[0].text for part in parts) == continued


@RULES
def test_requests_at_once_do_not_get_each_others_answers(rule, tmp_path):
    folder, chance = save_model(tmp_path, rule), random.Random(1)
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    chats = [[user(sentence(chance))] for _ in range(6)]
    with serving(folder) as (server, client), ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda pair: say(server, client, pair[1], stream=pair[0] % 2), enumerate(chats)))
            assert answers == [expected(folder, chat, model=fresh) for chat in chats]
            for chat, answer in zip(chats, answers, strict=True):
                chat += [{"role": "assistant", "content": answer}, user(sentence(chance))]
        assert len(held(server).held) == 6


def test_an_answer_that_a_client_cuts_short_is_no_longer_written(tmp_path):
    folder, messages, calls = save_model(tmp_path, LOCAL), [user("the cat is good .")], []
    with serving(folder) as (server, client):
        server.loaded()[0].model.register_forward_pre_hook(lambda *given: calls.append(1))
        endless = {"max_tokens": 100_000, "logit_bias": {"2": -100.0}}  # no end of its own accord
        parts = client.chat.completions.create(model=folder, messages=messages, temperature=0, stream=True, **endless)
        for number, _ in enumerate(parts):
            if number == 3:
                break
        parts.close()
        messages += [{"role": "assistant", "content": "red"}, user("a dog")]
        assert say(server, client, messages) == expected(folder, messages), "once the one before has ended"
        assert len(calls) < 50_000
        assert len(held(server).held) == 1, "its prompt is what the next turn went on from"


def test_what_was_held_goes_with_the_model(tmp_path):
    folder, messages = save_model(tmp_path, LINEAR), [user("the cat is good .")]
    with serving(folder) as (server, client):
        before, first = server.loaded()[0], say(server, client, messages)
        client.post("/../reset", cast_to=object)
        assert say(server, client, messages) == first
        assert server.loaded()[0] is not before
        assert len(held(server).held) == 1


@pytest.mark.parametrize(("saved", "attention"), [(None, LOCAL), (LOCAL, None), (LOCAL, LINEAR)])
def test_a_model_is_served_with_the_attention_that_is_asked_for(saved, attention, tmp_path):
    folder, messages = save_model(tmp_path, saved), [user("the cat is good . red green blue one two three a a a dog")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    model = ap.restore_attention(model) if attention is None else ap.swap_attention(model, attention)
    torch.manual_seed(5)  # new weights, if there are any, are drawn alike
    with serving(folder, attention=attention) as (server, client):
        assert say(server, client, messages) == expected(folder, messages, model=model)
        assert {row.plugin for row in ap.describe_attention(server.loaded()[0])} == {attention and attention["type"]}


def test_caches_are_not_held_where_there_is_no_room_for_them(tmp_path):
    folder, messages = save_model(tmp_path, LOCAL), [user("the cat is good .")]
    with serving(folder, room=0) as (server, client):
        assert say(server, client, messages) == expected(folder, messages)
        assert "generate" not in vars(server.loaded()[0])


def test_pages_are_served_to_models_with_their_own_attention(tmp_path):
    folder, messages, before = save_model(tmp_path), [user("the cat is good .")], set(threading.enumerate())
    with serving(folder, continuous_batching=True) as (server, client):
        assert say(server, client, messages) == expected(folder, messages)
        assert "generate" not in vars(server.loaded()[0])
    assert [thread for thread in set(threading.enumerate()) - before if not thread.daemon] == []


@pytest.mark.real
def test_a_real_model_talks_past_its_window_in_constant_memory():
    folder = str(on_disk("models", demo.NAME))
    rule = {"type": "local", "window_size": 128, "num_sink_tokens": 4}
    fresh = AutoModelForCausalLM.from_pretrained(folder, attn_plugin=rule)
    topics = ["rivers", "bread", "the moon", "trains", "bees", "glass", "salt", "violins", "maps", "snow"]
    messages, sizes = [], []
    with serving(folder, attention=rule) as (server, client):
        for turn in range(20):
            ask = "Tell me one thing about" if turn < 10 else "And now something else about"
            messages.append(user(f"{ask} {topics[turn % 10]}."))
            answer = say(server, client, messages, stream=turn % 2 == 1, tokens=24)
            if turn % 5 == 4:
                assert answer == expected(folder, messages, tokens=24, model=fresh)
            messages.append({"role": "assistant", "content": answer})
            ((tokens, cache),) = held(server).held
            sizes.append((len(tokens), ap.cache_bytes(cache)))
            print(sizes[-1], repr(answer))
    assert sizes[-1][0] > 5 * 128
    full = {size for read, size in sizes if read > 128 + 4}
    assert len(full) == 1
    assert max(size for _, size in sizes) in full
