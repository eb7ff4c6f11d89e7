"""Models that lay themselves out in their own way: keys lent to other layers, stacks run several times, two texts."""

from typing import Any

import pytest
import torch
import transformers as tf

import attn_plugins as ap

SMALL: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 48},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def gemma3n() -> Any:
    """The last two of four layers borrow keys and values from the first two."""
    own = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    layers = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2, "num_key_value_heads": 2}
    sparse = {"activation_sparsity_pattern": [0.0] * 4, "sliding_window": 6}
    config = tf.Gemma3nTextConfig(**{**SMALL, **own, **layers, **sparse, "intermediate_size": [48] * 4})
    return tf.Gemma3nForCausalLM._from_config(config)


def hrm() -> Any:
    """Two stacks of two layers are run several times, with a layer of the cache for each pass."""
    if not hasattr(tf, "HrmTextForCausalLM"):
        pytest.skip(f"transformers {tf.__version__} has no HRM")
    config = tf.HrmTextConfig(**SMALL, num_hidden_layers=2, H_cycles=2, L_cycles=2)
    return tf.HrmTextForCausalLM._from_config(config)


@pytest.mark.parametrize("build", [gemma3n, hrm])
@pytest.mark.parametrize("rule", [{"type": "local", "window_size": 4}, {"type": "linear", "feature_map": "elu"}])
def test_cached_generation_equals_generation_without_a_cache(build, rule):
    torch.manual_seed(0)
    model = build().eval()
    if build is gemma3n and rule["type"] == "linear":
        rule = {**rule, "layers": "every:2+1"}  # where the model's own layers are not sliding
    ap.swap_attention(model, dict(rule))
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_a_model_with_two_texts_is_swapped_in_both():
    t5 = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    codec = tf.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16, upsampling_ratios=[2, 2])
    decoder = tf.MusicgenDecoderConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        num_codebooks=2,
        pad_token_id=31,
        bos_token_id=31,
    )
    config = tf.MusicgenConfig(text_encoder=t5, audio_encoder=codec, decoder=decoder)
    torch.manual_seed(0)
    model = tf.MusicgenForConditionalGeneration._from_config(config).eval()
    given = {"input_ids": torch.randint(3, 90, (2, 9)), "decoder_input_ids": torch.randint(0, 30, (4, 7))}
    with torch.no_grad():
        own = model(**given).logits
        ap.swap_attention(model, {"type": "softmax", "roles": ["encoder", "decoder", "cross"]})
        assert {row.role for row in ap.describe_attention(model)} == {"encoder", "decoder", "cross"}
        assert all(row.plugin == "softmax" for row in ap.describe_attention(model))
        torch.testing.assert_close(model(**given).logits, own, atol=1e-4, rtol=0)


def diffusion_gemma() -> Any:
    """A bidirectional decoder reads the keys that its causal encoder has cached."""
    if not hasattr(tf, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip(f"transformers {tf.__version__} has no DiffusionGemma")
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "patch_size": 8}
    config = tf.DiffusionGemmaConfig(
        text_config={**SMALL, **experts, **kinds, "global_head_dim": 8},
        vision_config={**eyes, "intermediate_size": 48, "num_key_value_heads": 4},
        canvas_length=6,
        image_token_id=96,
        boi_token_id=95,
        eoi_token_id=94,
    )
    return tf.DiffusionGemmaForBlockDiffusion._from_config(config)


def deepseek_v4() -> Any:
    """Compressed keys of what came before follow the keys of its tokens, and its mask is made longer for them."""
    if not hasattr(tf, "DeepseekV4ForCausalLM"):
        pytest.skip(f"transformers {tf.__version__} has no DeepSeek V4")
    ranks = {"q_lora_rank": 16, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    layers = {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 5, "mlp_layer_types": ["moe"] * 3}
    config = tf.DeepseekV4Config(**{**SMALL, **ranks, **experts, **layers})
    return tf.DeepseekV4ForCausalLM._from_config(config)


@pytest.mark.parametrize("build", [diffusion_gemma, deepseek_v4])
@pytest.mark.parametrize("name", ["softmax", "local"])
@torch.no_grad()
def test_keys_that_are_not_of_the_tokens_alone_stay_exact(build, name):
    torch.manual_seed(0)
    model = build().eval()
    if build is deepseek_v4 and name == "local":
        pytest.skip("its layers have sinks, and keys of two sequences")
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    given = {"input_ids": torch.randint(3, 90, (2, 13)), "attention_mask": mask}
    if build is diffusion_gemma:
        given["decoder_input_ids"] = torch.randint(3, 90, (2, 6))
    own = model(**given).logits[mask.bool() if build is deepseek_v4 else ...]
    # Windows serve the causal modules alone, whose keys the others read.
    options: dict[str, Any] = {"roles": ["encoder", "decoder", "cross"], "modules": "*self_attn"}
    ap.swap_attention(model, name, **(options if name == "softmax" else {"roles": ["decoder"], "window_size": 64}))
    got = model(**given).logits[mask.bool() if build is deepseek_v4 else ...]
    torch.testing.assert_close(got, own, atol=1e-4, rtol=0)


def test_layers_that_have_compressed_keys_are_not_self_attention():
    assert [row.role for row in ap.describe_attention(deepseek_v4())] == ["decoder", "cross", "cross"]
