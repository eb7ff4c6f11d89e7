"""Models that compute with their masks: what they make of ours is what they make of their own."""

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from torch import nn
from transformers import masking_utils

import attn_plugins as ap
from attn_plugins.hf.caches.cache_layers import make_tensor
from attn_plugins.hf.masks.mask_function import LazyMask, lazy_mask

TEXT = {**tiny.GROUPED, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 6}
SPEECH = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"num_mel_bins": 16, "subsampling_conv_channels": 8, "max_position_embeddings": 64, "layerdrop": 0.0},
    "conv_kernel_size": 5,
}
QUIET = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout_positions": 0.0}


def _t5gemma2() -> tf.PreTrainedConfig:
    text = {**TEXT, "query_pre_attn_scalar": 8}
    vision = {**tiny.VISION, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    encoder |= {"boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95}
    return tf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=95, eoi_token_index=94)


def _paligemma() -> tf.PreTrainedConfig:
    vision = {**tiny.VISION, "num_attention_heads": 4, "intermediate_size": 48, "model_type": "siglip_vision_model"}
    text = {**tiny.GROUPED, "model_type": "gemma"}
    return tf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=96, projection_dim=32)


def _cohere_asr() -> tf.PreTrainedConfig:
    encoder = {**SPEECH, **QUIET, "model_type": "parakeet_encoder", "subsampling_factor": 4}
    return tf.CohereAsrConfig(**tiny.SMALL, encoder_config=encoder, decoder_start_token_id=1)


MODELS = {
    "doge": lambda: (tf.DogeForCausalLM, tf.DogeConfig(**tiny.SMALL, keep_window_size=8)),
    "lasr": lambda: (tf.LasrForCTC, tf.LasrCTCConfig(vocab_size=97, encoder_config={**SPEECH, **QUIET})),
    "lasr encoder": lambda: (tf.LasrEncoder, tf.LasrEncoderConfig(**SPEECH, **QUIET)),
    "paligemma": lambda: (tf.PaliGemmaForConditionalGeneration, _paligemma()),
    "t5gemma2": lambda: (tf.T5Gemma2ForConditionalGeneration, _t5gemma2()),
    "cohere_asr": lambda: (tf.CohereAsrForConditionalGeneration, _cohere_asr()),
}


def build(name: str, implementation: str = "sdpa") -> Any:
    try:
        cls, config = MODELS[name]()
    except AttributeError:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 or path.endswith(".A"):
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Two rows of which the first is padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    if name in ("lasr", "lasr encoder", "cohere_asr"):
        mask = torch.ones(2, 64, dtype=torch.long)
        mask[0, 40:] = 0
        given = {"input_features": torch.randn(2, 64, 16, generator=generator), "attention_mask": mask}
        return {**given, "decoder_input_ids": ids} if name == "cohere_asr" else given
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "t5gemma2":
        given["attention_mask"] = mask.flip(1)
        given["decoder_input_ids"] = torch.randint(3, 90, (2, 7), generator=generator)
    if name == "paligemma":
        ids = torch.cat([torch.full((2, 16), 96), ids], dim=1)
        mask = torch.cat([torch.ones(2, 16, dtype=torch.long), mask.flip(1)], dim=1)
        kinds = torch.zeros_like(ids)
        kinds[:, 20:] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return given


def output(model: Any, name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says at tokens that are not padding."""
    made = model(**given, use_cache=False) if "input_ids" in given else model(**given)
    out = made.logits if getattr(made, "logits", None) is not None else made.last_hidden_state
    mask = given["attention_mask"].bool()
    if out.shape[:2] == mask.shape:
        return out[mask]
    if name.startswith("lasr"):
        encoder = getattr(model, "encoder", model)
        return out[encoder._get_output_attention_mask(mask.long(), target_length=out.shape[1])]
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_compute_with_masks_are_exact(name, implementation):
    """All layers, and some beside the model's own; with gradients."""
    given, model = inputs(name), build(name, implementation)
    own = output(model, name, given)
    if not own.isfinite().all():
        pytest.skip(f"{name} with {implementation} attention gives NaN by itself in transformers {tf.__version__}")
    own.square().sum().backward()
    expected = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert expected
    rules: list[Any] = ["softmax", {"type": "local", "window_size": 200}, {"type": "softmax", "layers": 0}]
    if name == "t5gemma2":
        rules[1]["modules"] = "encoder.text_model.*"
    for rule in rules:
        ap.swap_attention(model, rule)
        model.zero_grad()
        out = output(model, name, given)
        torch.testing.assert_close(out, own, atol=1e-5, rtol=1e-4)
        out.square().sum().backward()
        for path, parameter in model.named_parameters():
            if path in expected:
                torch.testing.assert_close(parameter.grad, expected[path], atol=2e-4, rtol=1e-3, msg=path)
    ap.restore_attention(model)
    assert torch.equal(output(model, name, given), own)


@pytest.mark.parametrize("rule", ["softmax", {"type": "local", "window_size": 4}])
@pytest.mark.parametrize("name", ["doge", "paligemma", "t5gemma2", "cohere_asr"])
@torch.no_grad()
def test_they_generate_with_a_cache_what_they_generate_without(name, rule):
    """A layer whose module computes with the mask keeps all keys; the state of its attention gives way to them."""
    if name == "t5gemma2" and rule != "softmax":
        rule = {**rule, "modules": "encoder.text_model.*"}
    given, model = inputs(name), ap.swap_attention(build(name), rule)
    given.pop("decoder_input_ids", None)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, **how), model.generate(**given, **how, use_cache=False))


def test_merged_attention_is_for_those_that_serve_keys_of_another_sequence():
    with pytest.raises(ValueError, match=r"decoder.layers.0.self_attn: its keys are those of the encoder beside its"):
        ap.swap_attention(build("t5gemma2"), "local")


@torch.no_grad()
def test_a_state_does_not_give_way_once_it_has_taken_tokens_in():
    model = ap.swap_attention(build("doge"), "local", window_size=4)
    given = inputs("doge")
    with pytest.raises(
        ValueError, match=r"DogeAttention computes with its mask over the keys of all tokens; use a new"
    ):
        model.generate(**given, max_new_tokens=2, cache_implementation="static")


SIZES = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": masking_utils.causal_mask_function}
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()


@pytest.fixture
def pair() -> tuple[LazyMask, torch.Tensor]:
    """A lazy mask, and what sdpa would get."""
    seen = masking_utils.sdpa_mask(**SIZES, attention_mask=PADDING, allow_is_causal_skip=False)
    return lazy_mask(**SIZES, attention_mask=PADDING), seen


X = torch.arange(64.0).view(8, 8)
USES = {
    "cat": lambda m: torch.cat([m, m], dim=-1),
    "where": lambda m: torch.where(m, 0.0, -1.0),
    "masked_fill": lambda m: X.masked_fill(m, -1.0),
    "pad": lambda m: nn.functional.pad(m, (0, 2)),
    "all": lambda m: torch.all(~m, dim=2),
    "and": lambda m: (m & X.bool()) | (X.bool() & m) ^ m,
    "index": lambda m: m[:, 0, 2:, :3],
    "index with a list": lambda m: m[[1, 0]],
    "index with none": lambda m: m[:, None],
    "as an index": lambda m: X.expand(2, 1, 8, 8)[m],
    "eq": lambda m: m == 0.0,
    "ne": lambda m: m != 0,
    "rmul": lambda m: 2.0 * m,
    "method": lambda m: m.logical_not().any(dim=-1),
    "expand": lambda m: m.expand(-1, 4, -1, -1),
    "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.float16),
    "to like": lambda m: m.to(X),
    "to both": lambda m: m.to(device="cpu", dtype=torch.float32),
    "unpack": lambda m: torch.stack(list(m)),
    "attention": lambda m: nn.functional.scaled_dot_product_attention(*[X.expand(2, 1, 8, 8)] * 3, attn_mask=m),
}


@pytest.mark.parametrize("use", USES)
def test_a_mask_that_is_touched_is_the_tensor_that_it_stands_for(pair, use):
    lazy, seen = pair
    made, expected = USES[use](lazy), USES[use](seen)
    assert type(made) is torch.Tensor
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)


def test_added_to_scores_it_hides_what_it_hides(pair):
    """As transformers' masks for eager attention, of which this is the use."""
    lazy, _ = pair
    expected = X + masking_utils.eager_mask(**SIZES, attention_mask=PADDING)
    assert torch.equal(lazy + X, expected)
    assert torch.equal(X + lazy, expected)
    scores = X.expand(2, 1, 8, 8).clone()
    scores += lazy
    assert torch.equal(scores, expected)
    assert (X.half() + lazy).isfinite().all()


def test_what_does_not_need_the_tensor_makes_none(pair):
    lazy, seen = pair
    assert lazy.shape == seen.shape
    assert (lazy.dtype, lazy.ndim, lazy.dim(), lazy.size(-1)) == (torch.bool, 4, 4, 8)
    assert lazy.size() == seen.shape
    for same in (lazy.to("cpu"), lazy.to(torch.bool), lazy.to(device="cpu", non_blocking=True), lazy.contiguous()):
        assert same is lazy
    for same in (lazy[..., :8], lazy[:, :, :, :20], lazy[:], lazy[...], lazy[:, :, 0:, :]):
        assert same is lazy
    assert lazy.memo == {}
    assert lazy[..., :7].shape == (2, 1, 8, 7)
    assert lazy[:, :, -2:].shape == (2, 1, 2, 8)


def test_a_mask_stays_an_object(pair):
    lazy, seen = pair
    assert not isinstance(lazy, torch.Tensor)
    assert {lazy: 1}[lazy] == 1
    for copied in (copy.copy(lazy), copy.deepcopy(lazy)):
        assert torch.equal(copied + X, lazy + X)
    assert torch.equal(pickle.loads(pickle.dumps(lazy)) & seen, seen)
    for wrong in ("masked_fill_", "no_such_method", "__array__"):
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'"):
            getattr(lazy, wrong)
    with pytest.raises(TypeError, match="item assignment"):
        lazy[0] = True
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(lazy)


def test_a_module_that_asks_for_a_tensor_gets_one_of_its_states_dtype_whatever_its_weights_are():
    module, states = nn.Linear(4, 4).to(torch.float8_e4m3fn), torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    _, given = make_tensor(module, (), {"hidden_states": states, "attention_mask": lazy_mask(1, 3, 3)})
    hidden = torch.full((3, 3), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)
    assert torch.equal(given["attention_mask"], hidden[None, None])
