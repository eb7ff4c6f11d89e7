"""examples/stream.py: what it prints is what a model without a cache would say, and its cache stays as it is."""

import importlib.util
import re
import sys
from pathlib import Path

import programs
import pytest
import torch
from conftest import tokenizer
from transformers import AutoModelForCausalLM

from attn_plugins.data import demo_model as demo

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream.py"
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + '</s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
COUNTS = r"\[(\d+) tokens seen, cache (\d+) bytes\]"


@pytest.fixture(scope="module")
def stream():
    spec = importlib.util.spec_from_file_location("stream_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(stream, capsys, monkeypatch, *arguments):
    """What the example prints: the replies, and (tokens, bytes) after each turn."""
    monkeypatch.setattr(sys, "argv", ["stream.py", *arguments])
    stream.main()
    replies = re.split(COUNTS, capsys.readouterr().out)
    return [" ".join(reply.split()) for reply in replies[:-1:3]], [
        (int(n), int(size)) for n, size in zip(replies[1::3], replies[2::3], strict=True)
    ]


def without_a_cache(stream, folder, rule, turns, max_new_tokens):
    """The replies when every token is computed anew from the whole conversation, and the tokens before each end."""
    model, words = AutoModelForCausalLM.from_pretrained(folder, attn_plugin=rule), tokenizer()
    ids, replies, lengths = torch.empty(1, 0, dtype=torch.long), [], []
    for turn in turns:
        ids = torch.cat([ids, stream.encode(words, turn, ids, [2])], dim=1)
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made = model.generate(**known, max_new_tokens=max_new_tokens, do_sample=False, use_cache=False)
        replies.append(words.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        ids = made
        lengths.append(ids.shape[1] - 1)  # the last token has been chosen, and not been read
    return replies, lengths


TURNS = ["the cat is red", "one two three", "a good dog . a bad dog ."]


def test_turns_from_a_pipe_share_one_bounded_cache(llama, stream):
    options = ["--model", llama, "--window-size", "8", "--num-sink-tokens", "2", "--max-new-tokens", "9"]
    ran = programs.run(EXAMPLE, *options, stdin="\n\n".join(TURNS) + "\n", cwd=EXAMPLE.parent.parent)
    assert ran.returncode == 0, ran.stderr
    replies = re.split(COUNTS, ran.stdout)
    rule = {"type": "local", "window_size": 8, "num_sink_tokens": 2, "positions": "cache"}
    expected, lengths = without_a_cache(stream, llama, rule, TURNS, 9)
    assert [" ".join(reply.split()) for reply in replies[:-1:3]] == expected
    assert [int(n) for n in replies[1::3]] == lengths
    assert len(set(replies[2::3])) == 1, "its size stays"


@pytest.mark.parametrize("name", ["null", "linear"])
def test_turns_from_the_command_line_with_any_attention(name, llama, stream, capsys, monkeypatch):
    prompts = [part for turn in TURNS for part in ("--prompt", turn)]
    replies, counts = said(
        stream, capsys, monkeypatch, "--model", llama, "--attention", name, "--max-new-tokens", "5", *prompts
    )
    expected, lengths = without_a_cache(stream, llama, None if name == "null" else name, TURNS, 5)
    assert (replies, [n for n, _ in counts]) == (expected, lengths)
    if name == "null":
        assert [size / n for n, size in counts] == [2 * 2 * 8 * 4] * 3, "layers, k and v, size of a head, bytes"


def test_chat_templates_are_continued_as_if_the_whole_conversation_were_written(stream):
    words = tokenizer()
    words.chat_template = TEMPLATE
    messages, ids = [], []
    for turn, reply, ends in (("red cat", "good", True), ("blue dog", "bad", False), ("one", "two", True)):
        ids += stream.encode(words, turn, torch.tensor([ids], dtype=torch.long), [words.eos_token_id])[0].tolist()
        messages.append({"role": "user", "content": turn})
        text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == words(text, add_special_tokens=False)["input_ids"]
        ids += words(reply)["input_ids"] + [words.eos_token_id] * ends
        messages.append({"role": "assistant", "content": reply})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "lokal"], "unknown attention 'lokal'"),
        (["--attention", "linear", "--window-size", "9"], "window_size"),
        (["--positions", "none"], "positions='none'"),
        (["--attention", "null", "--window-size", "9"], "the model's own attention takes no options, got window_size"),
        (["--model", "./not-there"], "no such model folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, llama, stream, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        said(stream, capsys, monkeypatch, "--model", llama, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.skipif(not (demo.cache_folder() / "models" / demo.NAME).exists(), reason="the demo's model is not here")
def test_a_real_model_answers_and_its_cache_stays(stream, capsys, monkeypatch):
    turns = ["What is the capital of France?", "And of Italy?", "Write a few words about the sea."]
    options = [
        "--window-size",
        "64",
        "--max-new-tokens",
        "40",
        *(part for turn in turns for part in ("--prompt", turn)),
    ]
    replies, counts = said(stream, capsys, monkeypatch, *options)
    assert "Paris" in replies[0]
    assert "Rome" in replies[1], "the second turn makes sense only after the first"
    assert len({size for _, size in counts}) == 1
