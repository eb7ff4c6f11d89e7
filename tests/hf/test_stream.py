"""A stream of text through one cache: memory stays what it was and so does quality, however long it gets."""

import copy
import os
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from conftest import on_disk
from torch.nn.functional import cross_entropy

import attn_plugins as ap
from attn_plugins.data import demo_model as demo
from attn_plugins.data.text import python_docs
from attn_plugins.hf.caches.cache_layers import cache_bytes

WORDS = 32
PERIOD = 12
LOCAL = {"type": "local", "window_size": 64, "num_sink_tokens": 4}
LINEAR = {"type": "linear"}


def copies(rows, length):
    """A random word in ten, the others repeat the one ``PERIOD`` before: to foretell them, look back just so far."""
    ids, fresh = torch.randint(WORDS, (rows, length)), torch.rand(rows, length) < 0.1
    for start in range(PERIOD, length, PERIOD):
        now = slice(start, min(start + PERIOD, length))
        before = ids[:, start - PERIOD : now.stop - PERIOD]
        ids[:, now] = torch.where(fresh[:, now], ids[:, now], before)
    return ids


def urns(rows, length):
    """Words drawn from an urn, one urn a row: to foretell them, count all that came."""
    concentration = torch.distributions.Dirichlet(torch.full((WORDS,), 0.1))
    return torch.multinomial(concentration.sample((rows,)), length, replacement=True)


def trained(rule, stream, steps):
    """A tiny model that has learned to foretell a stream as far as it can be foretold, on short pieces of it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = tf.LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=64, **heads)
    model = ap.swap_attention(tf.LlamaForCausalLM(config), rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min((step + 1) / 20, max(0.05, 1 - step / steps))
        ids = stream(16, 256)
        logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def losses(model, ids, cache, piece):
    """Loss of every token but the first, a piece at a time, as it is read through the cache."""
    for start in range(0, ids.shape[1] - 1, piece):
        logits = model(input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True).logits
        target = ids[:, start + 1 : start + 1 + piece]
        yield cross_entropy(logits[:, : target.shape[1]].transpose(1, 2), target, reduction="none")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("rule", [LOCAL, LINEAR], ids=lambda rule: rule["type"])
@torch.no_grad()
def test_ten_thousand_tokens_in_constant_memory_are_what_one_pass_makes_of_them(rule, one_thread):
    model = ap.swap_attention(tiny.build("llama"), rule)
    ids = torch.randint(3, tiny.VOCABULARY, (1, 10_000), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids, use_cache=False).logits
    expected = cross_entropy(whole[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    cache, made, sizes = tf.DynamicCache(config=model.config), [], set()
    for part in losses(model, ids, cache, 1024):
        made.append(part)
        sizes.add(cache_bytes(cache))
    torch.testing.assert_close(torch.cat(made, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert len(sizes) == 1
    assert cache.get_seq_length() == 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "stream", "steps"),
    [pytest.param(LOCAL, copies, 120, id="local"), pytest.param(LINEAR, urns, 150, id="linear")],
)
def test_a_million_tokens_in_constant_memory_are_foretold_as_well_as_the_first(rule, stream, steps, one_thread):
    model = trained(rule, stream, steps)
    ids, cache = stream(1, 1_000_000), tf.DynamicCache(config=model.config)
    by_part, held, process = [], set(), []
    with torch.no_grad():
        for part in losses(model, ids, cache, 2048):
            by_part.append(part.mean().item())
            held.add(cache_bytes(cache))
            process.append(resident_bytes() if Path("/proc/self/statm").exists() else 0)
    perplexity = torch.tensor(by_part).unfold(0, 48, 48).mean(-1).exp().tolist()
    print(f"{rule}: perplexity of each 98304 tokens {perplexity}, cache {held}, process {process[::48]}")
    assert len(perplexity) == 10
    assert all(value == pytest.approx(perplexity[0], rel=0.05) for value in perplexity), "also: all are finite"
    assert perplexity[0] < WORDS / 2, "a model that has learned nothing could not get worse"
    assert len(held) == 1
    assert process[-1] - process[48] < 16 * 2**20, "keys and values of all tokens would be 256 MB"
    # Token by token is the same, from here on too.
    after, again = stream(1, 1500), copy.deepcopy(cache)
    with torch.no_grad():
        (at_once,) = losses(model, after, cache, 1500)
        one_by_one = torch.cat(list(losses(model, after, again, 1)), dim=1)
    torch.testing.assert_close(one_by_one, at_once, atol=1e-3, rtol=1e-3)
    assert cache_bytes(again) in held


@pytest.mark.real
@torch.no_grad()
def test_a_real_models_logits_through_the_cache_are_those_of_one_pass():
    folder = on_disk("models", demo.NAME)
    rule = {"type": "local", "window_size": 512, "num_sink_tokens": 4}
    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_plugin=rule)
    text = "\n".join(python_docs()["train"]["text"][:40])
    ids = tf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"][:, :3072]
    assert ids.shape[1] == 3072
    whole, cache = model(input_ids=ids, use_cache=False).logits, tf.DynamicCache(config=model.config)
    for start in range(0, 3072, 512):
        part = model(input_ids=ids[:, start : start + 512], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(part, whole[:, start : start + 512], atol=1e-3, rtol=1e-3)
