"""Stage 1 in models of each kind: encoders, encoder-decoder models, images, speech."""

import tiny
import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.transfer.body import slots_of, what_runs

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}
EVERYWHERE = {**HEDGEHOG, "roles": ["encoder", "decoder", "cross"]}


def swapped(cls, config, rules=HEDGEHOG):
    torch.manual_seed(1)
    model = cls(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return ap.swap_attention(model, rules)


def bart():
    return swapped(tf.BartForConditionalGeneration, tf.BartConfig(**tiny.HALVES), EVERYWHERE)


def drawn(*shape, seed=0):
    return torch.randint(3, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def falls(model, batches, steps=30):
    report = ap.transfer_attention(model, batches, steps, progress=False)
    for layer in report.layers:
        assert sum(layer.after) < sum(layer.before), layer
    return report


def test_an_encoder():
    model = swapped(tf.BertModel, tf.BertConfig(**tiny.SMALL))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    report = falls(model, [{"input_ids": drawn(2, 20, seed=seed), "attention_mask": mask} for seed in range(4)])
    assert {layer.role for layer in report.layers} == {"encoder"}
    assert report.tokens == 30 * 32


def test_encoder_decoder_and_what_is_between_them():
    batches = [{"input_ids": drawn(2, 20, seed=seed), "labels": drawn(2, 11, seed=seed)} for seed in range(4)]
    report = falls(bart(), batches)
    assert {layer.role for layer in report.layers} == {"encoder", "decoder", "cross"}
    assert report.tokens == 30 * 40


def test_a_decoders_padding_is_none_of_cross_attentions_queries():
    found = []
    for seed in range(2):
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[1, 6:] = 0
        ids = drawn(2, 11).where(mask.bool(), drawn(2, 11, seed=seed))
        batch = {"input_ids": drawn(2, 20), "decoder_input_ids": ids, "decoder_attention_mask": mask}
        model = bart()
        ap.transfer_attention(model, [batch], 2, progress=False)
        found.append(
            {path: torch.cat([w.flatten() for w in slot.parameters()]) for path, slot in slots_of(model).items()}
        )
    assert any("encoder_attn" in path for path in found[0])
    for path, weights in found[0].items():
        torch.testing.assert_close(found[1][path], weights, rtol=0, atol=1e-6)


def test_images():
    config = tf.ViTConfig(**tiny.VISION, num_attention_heads=4, intermediate_size=48)
    model = swapped(tf.ViTForImageClassification, config)
    images = torch.randn(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    report = falls(model, [{"pixel_values": image, "labels": torch.zeros(2, dtype=torch.long)} for image in images])
    assert report.tokens == 30 * 2 * 17


def test_speech():
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30, "vocab_size": tiny.VOCABULARY}
    config = tf.WhisperConfig(**{**tiny.HALVES, **sizes})
    model = swapped(tf.WhisperForConditionalGeneration, config, EVERYWHERE)
    sounds = torch.randn(4, 2, 8, 40, generator=torch.Generator().manual_seed(0))
    report = falls(model, [{"input_features": sound, "labels": drawn(2, 9)} for sound in sounds])
    assert {layer.role for layer in report.layers} == {"encoder", "decoder", "cross"}


def test_a_layer_that_all_share_counts_once():
    model = swapped(tf.AlbertModel, tf.AlbertConfig(**tiny.SMALL, embedding_size=16))
    report = falls(model, [{"input_ids": drawn(2, 20)}])
    assert len(report.layers) == len(slots_of(model)) == 1


def test_what_runs_is_the_model_without_its_head_where_that_can_be_told():
    model = swapped(tf.LlamaForCausalLM, tf.LlamaConfig(**tiny.GROUPED))
    ids = drawn(2, 9)
    part, given = what_runs(model, slots_of(model), {"input_ids": ids, "labels": ids})
    assert part is model.model
    assert given == {"input_ids": ids, "use_cache": False}
    part, given = what_runs(model, slots_of(model), {"input_ids": ids, "more": 1})
    assert part is model
    assert given == {"input_ids": ids, "more": 1, "use_cache": False, "logits_to_keep": 1}
    model = bart()
    part, given = what_runs(model, slots_of(model), {"input_ids": ids, "labels": ids})
    assert part is model.model
    assert torch.equal(given["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels=ids))
    assert "labels" not in given
    model = swapped(tf.BertForQuestionAnswering, tf.BertConfig(**tiny.SMALL))
    part, given = what_runs(model, slots_of(model), {"input_ids": ids, "start_positions": ids, "end_positions": ids})
    assert part is model.bert
    assert "start_positions" not in given
