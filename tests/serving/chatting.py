"""A model to talk to, tiny and random, and a server in a thread of this process with a client of OpenAI's library."""

import contextlib
import threading
import time

import pytest
import torch
from conftest import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import attn_plugins as ap
from attn_plugins.serving.server import Server

TEMPLATE = (
    "{% for message in messages %}<s> {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<s> {% endif %}"
)
LOCAL = {"type": "local", "window_size": 16, "num_sink_tokens": 2}
LINEAR = {"type": "linear"}


def save_model(folder, rule=None, *, chat_template=TEMPLATE):
    """A Llama whose answers follow from all that was said, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **heads, **ids))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 5
    if rule is not None:
        ap.swap_attention(model, rule)
    model.save_pretrained(folder)
    made = tokenizer()
    made.chat_template = chat_template
    made.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def serving(source, **options):
    """A server, and a client of it."""
    openai = pytest.importorskip("openai", reason="an environment from before it was asked for: make setup")
    log, level = logging.get_logger("transformers"), logging.get_verbosity()
    server = Server(source, host="127.0.0.1", port=0, device="cpu", log_level="error", **options)
    server.server.config.log_config = None
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started and thread.is_alive():
            time.sleep(0.01)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield server, client
    finally:
        server.server.should_exit = True
        thread.join()
        log.setLevel(level)


def say(server, client, messages, *, stream=False, tokens=6, **options):
    """What the server answers to a chat at temperature 0."""
    given = {"model": server.model_id, "messages": messages, "temperature": 0, "max_tokens": tokens, **options}
    if not stream:
        return client.chat.completions.create(**given).choices[0].message.content
    parts = client.chat.completions.create(stream=True, **given)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def expected(folder, messages, *, tokens=6, model=None):
    """What ``generate`` of a model that is loaded anew answers to all of a chat."""
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    made = AutoTokenizer.from_pretrained(folder)
    given = made.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return made.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
