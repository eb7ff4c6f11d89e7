"""Pretrained models with real weights: the limit case of an attention is the model's own output, a narrow one is not.

Each test wants a folder of transformers' own format, ``models/NAME`` under the cache (``$ATTN_PLUGINS_CACHE``, else
``~/.cache/attn-plugins``), and skips where it is absent.
"""

import functools
import json
import wave

import pytest
import torch
import transformers as tf
from conftest import on_disk

import attn_plugins as ap
from attn_plugins.data.text import python_docs

pytestmark = pytest.mark.real

CLASSES = {
    "smollm2-135m": tf.AutoModelForCausalLM,
    "gemma3-270m": tf.AutoModelForCausalLM,
    "minilm": tf.AutoModel,
    "mpnet": tf.AutoModel,
    "whisper-tiny-en": tf.AutoModelForSpeechSeq2Seq,
    "dinov2-small": tf.AutoModel,
}
DECODERS = ("smollm2-135m", "gemma3-270m")
LENGTHS = {"minilm": (256, 91), "mpnet": (384, 91)}
"""Tokens of the two rows of a batch; 700 are more than Gemma's own window of 512."""

WINDOW = {"type": "local", "window_size": 700, "num_sink_tokens": 0}
FULL = {"type": "local", "window_size": 1500, "num_sink_tokens": 0}
ALL_ROLES = [{**FULL, "roles": ["encoder", "decoder"]}, {"type": "topk", "topk": 1500, "roles": "cross"}]
GRID = {"type": "neighborhood_2d", "kernel_size": 37}
LIMITS = {
    "smollm2-135m": ["softmax", WINDOW, {"type": "block_topk", "topk": 11}, {"type": "block_local", "block_size": 700}],
    "gemma3-270m": [
        "softmax",
        WINDOW,
        {**WINDOW, "window_size": 512, "layers": ["0-4", "6-10", "12-16"]},  # as wide as its own sliding window
        {**WINDOW, "layers": "every:6+5"},
        {"type": "block_topk", "topk": 11, "layers": "every:6+5"},
    ],
    "minilm": [
        "softmax",
        {**WINDOW, "window_size": 256},
        {"type": "block_topk", "topk": 4},
        {"type": "block_local", "block_size": 256},
    ],
    "mpnet": [
        "softmax",
        {**WINDOW, "window_size": 384},
        {"type": "topk", "topk": 384},
        {"type": "block_local", "block_size": 384},
    ],
    "whisper-tiny-en": [
        *({"type": "softmax", "roles": role} for role in ("encoder", "decoder", "cross")),
        {"type": "softmax", "roles": ["encoder", "decoder", "cross"]},
        *({**FULL, "roles": role} for role in ("encoder", "decoder")),
        {"type": "topk", "topk": 1500, "roles": "cross"},
        ALL_ROLES,
    ],
    "dinov2-small": ["softmax", {**WINDOW, "window_size": 1370}, GRID, {"type": "block_topk", "topk": 22}],
}
NARROW = {
    "smollm2-135m": [{**WINDOW, "window_size": 699}],
    "gemma3-270m": [{**WINDOW, "window_size": 511, "layers": 4}, {**WINDOW, "window_size": 699, "layers": -1}],
    "minilm": [{**WINDOW, "window_size": 255, "layers": 0}],
    "mpnet": [{**WINDOW, "window_size": 383, "layers": 0}],
    "whisper-tiny-en": [
        {**WINDOW, "window_size": 1499, "roles": "encoder"},
        {**WINDOW, "window_size": 11, "roles": "decoder"},
        {"type": "topk", "topk": 1499, "roles": "cross"},
    ],
    "dinov2-small": [{**GRID, "kernel_size": 36}],
}
"""One step inside the limit, which has to show."""


def cases(table):
    return [pytest.param(name, rule, id=f"{name}-{n}") for name, rules in table.items() for n, rule in enumerate(rules)]


def load(name, **flag):
    return CLASSES[name].from_pretrained(on_disk("models", name), dtype=torch.float32, **flag).eval()


@functools.lru_cache(maxsize=1)
def held(name):
    """The model, inputs, its own output, and what it writes; one model at a time is in memory."""
    model, given = load(name), inputs(name)
    return model, given, output(model, given), written(model, given)


@functools.cache
def inputs(name):
    generator = torch.Generator().manual_seed(0)
    if name == "dinov2-small":
        coarse = torch.randn(2, 3, 12, 12, generator=generator)
        return {"pixel_values": torch.nn.functional.interpolate(coarse, size=518, mode="bicubic")}
    if name == "whisper-tiny-en":
        extractor = tf.AutoFeatureExtractor.from_pretrained(on_disk("models", name))
        noise = (0.1 * torch.randn(2, 16000 * 5, generator=generator)).numpy()
        features = extractor(list(noise), sampling_rate=16000, return_tensors="pt")["input_features"]
        ids = torch.randint(1000, 20000, (2, 12), generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    tokenizer = tf.AutoTokenizer.from_pretrained(on_disk("models", name))
    tokenizer.padding_side = "left" if name in DECODERS else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    text = "\n".join(python_docs()["train"]["text"])
    long, short = LENGTHS.get(name, (700, 233))
    rows = [
        tokenizer(part, truncation=True, max_length=size)["input_ids"]
        for part, size in ((text[:9000], long), (text[9000:], short))
    ]
    assert [len(row) for row in rows] == [long, short]
    return dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


@torch.no_grad()
def output(model, given):
    """Logits or states at tokens that are not padding."""
    made = model(**given)
    out = made.logits if getattr(made, "logits", None) is not None else made.last_hidden_state
    return out[given["attention_mask"].bool()] if "attention_mask" in given else out


def written(model, given):
    """Tokens of greedy decoding after the last 200 of the prompt, or None where a model writes nothing."""
    if not model.can_generate():
        return None
    prompt = {k: v if k == "input_features" else v[:, -200:] for k, v in given.items() if "decoder" not in k}
    return model.generate(**prompt, max_new_tokens=16, do_sample=False)


def difference(got, own):
    """Largest difference, as a share of the largest output."""
    return float((got - own).abs().max() / own.abs().max())


@pytest.mark.parametrize(("name", "rule"), cases(LIMITS))
def test_the_limit_case_is_the_models_own_with_padding(name, rule):
    model, given, own, own_text = held(name)
    ap.swap_attention(model, rule)
    try:
        assert any(row.plugin for row in ap.describe_attention(model))
        gap = difference(output(model, given), own)
        assert gap < 1e-5, rule
        if own_text is not None:
            assert torch.equal(written(model, given), own_text)
    finally:
        ap.restore_attention(model)
    assert torch.equal(output(model, given), own), "restored bit for bit"


@pytest.mark.parametrize(("name", "rule"), cases(NARROW))
def test_one_step_inside_the_limit_is_not(name, rule):
    model, given, own, _ = held(name)
    ap.swap_attention(model, rule)
    try:
        gap = difference(output(model, given), own)
        assert gap > 1e-5, rule
    finally:
        ap.restore_attention(model)


@pytest.mark.parametrize("name", CLASSES)
def test_the_flag_loads_them_and_restoring_gives_the_original(name, tmp_path):
    _, given, own, _ = held(name)
    rule = (
        {**GRID, "kernel_size": 5}
        if name == "dinov2-small"
        else {"type": "local", "window_size": 8, "num_sink_tokens": 0}
    )
    model = load(name, attn_plugin=rule)
    changed = output(model, given)
    gap = difference(changed, own)
    assert gap > 1e-2
    model.save_pretrained(tmp_path)
    again = CLASSES[name].from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(output(again, given), changed)
    assert torch.equal(output(ap.restore_attention(model), given), own)


def words_wrong(want, got):
    """Least insertions, deletions and substitutions."""
    before = list(range(len(got) + 1))
    for i, word in enumerate(want, 1):
        row = [i]
        for j, other in enumerate(got, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
        before = row
    return before[-1]


def test_whisper_hears_as_well_with_a_window_in_its_encoder():
    """On clips in ``data/speech/validation.jsonl`` (audio, text) under the cache."""
    name, data = "whisper-tiny-en", on_disk("data", "speech")
    model, *_ = held(name)
    extractor, tokenizer = (
        auto.from_pretrained(on_disk("models", name)) for auto in (tf.AutoFeatureExtractor, tf.AutoTokenizer)
    )
    clips = []
    for row in map(json.loads, (data / "validation.jsonl").read_text("utf-8").splitlines()):
        with wave.open(str(data / row["audio"])) as file:
            samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        audio = (samples.float() / 2**15).numpy()
        clips.append((extractor(audio, sampling_rate=16000, return_tensors="pt")["input_features"], row["text"]))

    def error_rate():
        wrong = total = 0
        for features, text in clips:
            heard = tokenizer.decode(model.generate(features, max_new_tokens=64)[0], skip_special_tokens=True)
            heard = "".join(c if c.isalnum() else " " for c in heard.lower()).replace(" mr ", " mister ").split()
            wrong, total = wrong + words_wrong(text.split(), heard), total + len(text.split())
        return wrong / total

    own = error_rate()
    found = {}
    try:
        for window in (1500, 192, 8):
            ap.swap_attention(model, "local", window_size=window, num_sink_tokens=0, roles=["encoder"])
            found[window] = error_rate()
    finally:
        ap.restore_attention(model)
    assert own < 0.1
    assert found[1500] == own
    assert found[192] < own + 0.1, found
    assert found[8] > own + 0.1, f"a window too narrow has to show: {found}"
