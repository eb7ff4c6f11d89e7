"""What Trainer takes a model's loss for: gradients over several batches are those of one large batch."""

import pytest
import torch
import transformers as tf

from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.loss_scale import divides_by_number

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40}
HALVES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
HALVES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40}
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
PICTURE = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = {"input_ids": IDS, "labels": IDS}


def captioner():
    decoder = tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**PICTURE), decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return tf.VisionEncoderDecoderModel(config=config)


MODELS = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), WORDS),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)), WORDS),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**HALVES, **ENDS)), WORDS),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        WORDS,
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**HALVES, **ENDS, num_mel_bins=4, max_source_positions=10, max_target_positions=20)
        ),
        {"input_features": torch.randn(2, 4, 20), "labels": IDS},
    ),
    "captioner": (captioner, {"pixel_values": PIXELS, "labels": IDS}),
    "bert classes": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)),
        {"input_ids": IDS, "labels": CLASSES},
    ),
    "llama classes": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT, num_labels=3, pad_token_id=1)),
        {"input_ids": IDS, "labels": CLASSES},
    ),
    "bert gaps": (lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)), WORDS),
    "modernbert gaps": (
        lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**TEXT, pad_token_id=1, cls_token_id=0, sep_token_id=2)),
        {**WORDS, "attention_mask": torch.ones_like(IDS)},
    ),
    "bert words": (
        lambda: tf.BertForTokenClassification(tf.BertConfig(**TEXT, num_labels=3)),
        {"input_ids": IDS, "labels": IDS % 3},
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**PICTURE)),
        {"pixel_values": PIXELS, "labels": CLASSES},
    ),
    "dinov2": (
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**PICTURE)),
        {"pixel_values": PIXELS, "labels": CLASSES},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_code_says_is_what_the_model_does(name):
    make, given = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        losses = [model(**given, num_items_in_batch=torch.tensor(n)).loss.item() for n in (10, 20)]
    divides = losses[0] == pytest.approx(2 * losses[1])
    assert divides or losses[0] == pytest.approx(losses[1])
    assert divides_by_number(type(model)) == divides


def test_code_that_cannot_be_read_is_what_trainer_takes_it_for():
    space: dict = {}
    exec("class Model:\n    def forward(self, labels=None, **kwargs): pass", space)
    assert divides_by_number(space["Model"])


@pytest.mark.parametrize("adapters", [False, True])
def test_batches_of_a_step_train_as_one_large_batch(adapters, bert, labelled, tmp_path):
    def logged(batch, accumulated):
        training = {"max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "disable_tqdm": True}
        batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        tree = {
            "model": bert,
            "attention": {"type": "local", "window_size": 4},
            "data": {"source": labelled},
            "task": "classification",
            "tune": "lora" if adapters else "full",
            "max_length": 8,
            "output_dir": str(tmp_path / f"{batch}"),
            "training": {**training, **batches, "save_strategy": "no"},
        }
        run = prepare_finetune(build(FinetuneConfig, tree))
        for module in run.trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run.run(None)
        return [(one["loss"], one["grad_norm"]) for one in run.trainer.state.log_history if "grad_norm" in one]

    for several, one in zip(logged(2, 3), logged(6, 1), strict=True):
        assert several == pytest.approx(one, rel=1e-4)
