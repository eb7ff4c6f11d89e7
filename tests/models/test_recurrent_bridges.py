"""Recurrent models with what is around a model: files, Trainer, PEFT, other models, graphs, inspection."""

import copy
import importlib.util

import pytest
import torch
import transformers as tf
from test_recurrent_models import ADDITIVE, FORMS, IDS, SMALL, build, close, padded, seq2seq, source
from torch import nn

import attn_plugins as ap
from attn_plugins.models.configs import RecurrentDecoderConfig, RecurrentEncoderConfig
from attn_plugins.models.seq2seq import RecurrentSeq2Seq


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["luong", "bahdanau"])
def test_saved_and_loaded_it_computes_the_same_bits(form, tied, tmp_path):
    model = seq2seq(form, tie_word_embeddings=tied)
    ap.swap_attention(model, [ADDITIVE])
    with torch.no_grad():
        model.decoder.cross_attention.attn_plugin.score_weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RecurrentSeq2Seq
    assert list(ap.describe_attention(loaded)) == list(ap.describe_attention(model))
    for tensor in loaded.parameters():
        tensor.data = tensor.data.clone()
    given = {"input_ids": source(), "decoder_input_ids": source(seed=2)}
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert loaded.generation_config.decoder_start_token_id == 1


def test_heads_have_rules_of_their_own():
    model, given = seq2seq(), {"input_ids": source(), "decoder_input_ids": source(seed=2)}
    wanted = model(**given).logits
    ap.swap_attention(model, {"type": "topk", "topk": 1, "heads": [1], "roles": ["cross"]})
    rows = [row for row in ap.describe_attention(model) if row.role == "cross"]
    assert [(row.plugin, row.kv_heads) for row in rows] == [("topk", (1,)), (None, (0,))]
    assert not torch.equal(model(**given).logits, wanted)
    ap.restore_attention(model)
    assert torch.equal(model(**given).logits, wanted)


def test_a_rule_without_roles_is_for_the_encoder():
    model = seq2seq()
    ap.swap_attention(model, "softmax")
    assert [(row.role, row.plugin) for row in ap.describe_attention(model)] == [("encoder", "softmax"), ("cross", None)]
    with pytest.raises(ValueError, match=r"no module fits self-attention .* the model has roles \['cross'\]"):
        ap.swap_attention(seq2seq(self_attention=False), "softmax")


@pytest.mark.filterwarnings("ignore:.*labels used inside EncoderDecoderModel:FutureWarning")
@pytest.mark.filterwarnings("ignore:Version v4:FutureWarning")
@pytest.mark.parametrize("form", ["luong", "input_feeding", "bahdanau"])
def test_it_is_the_decoder_of_transformers_encoder_decoders(form):
    torch.manual_seed(0)
    read = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = tf.BertModel(tf.BertConfig(**read, intermediate_size=16, max_position_embeddings=32))
    decoder = build(RecurrentDecoderConfig(**SMALL, **IDS, **FORMS[form], cross_attention_hidden_size=12))
    model = tf.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    ap.swap_attention(model, {"type": "additive", "roles": ["cross"]})
    assert [row.role for row in ap.describe_attention(model)] == ["encoder", "cross"]
    ids, mask = padded(source(), left=False)
    assert model(input_ids=ids, attention_mask=mask, labels=source(seed=2)).loss.requires_grad
    how = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 6, "num_beams": 3}
    written = [model.generate(ids, attention_mask=mask, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*written)


def test_it_tells_what_is_in_a_picture(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = tf.ViTModel(tf.ViTConfig(**size, image_size=16, patch_size=4))
    decoder = build(RecurrentDecoderConfig(**SMALL, **IDS))  # 16 to the encoder's 32: transformers projects
    model = tf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.generation_config.decoder_start_token_id, model.generation_config.eos_token_id = 1, 2
    ap.swap_attention(model, {"type": "softmax", "roles": ["cross"]})
    pixels = torch.randn(2, 3, 16, 16)
    how = {"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 0}
    written = model.generate(pixels, **how)
    assert torch.equal(model.generate(pixels, use_cache=False, **how), written)
    model.save_pretrained(tmp_path)
    loaded = tf.VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert [row.plugin for row in ap.describe_attention(loaded)] == [None, "softmax"]
    assert torch.equal(loaded.generate(pixels, **how), written)


class Pairs(torch.utils.data.Dataset):
    """Texts to be written again, one token up."""

    def __init__(self, number=64):
        self.ids = source(number, 5)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clamp(max=48) + 1
        inputs = torch.cat([torch.tensor([IDS["bos_token_id"]]), labels[:-1]])  # as DataCollatorForSeq2Seq makes them
        return {"input_ids": self.ids[index], "labels": labels, "decoder_input_ids": inputs}


def trained(model, tmp_path, **arguments):
    settings = tf.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        predict_with_generate=True,
        generation_max_length=7,
        disable_tqdm=True,
        **arguments,
    )
    trainer = tf.Seq2SeqTrainer(model=model, args=settings, train_dataset=Pairs(), eval_dataset=Pairs(8))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer


def test_trainer_trains_it_with_smoothed_labels_too(tmp_path):
    model = seq2seq("input_feeding")
    ap.swap_attention(model, [ADDITIVE])
    before, trainer = trained(model, tmp_path, label_smoothing_factor=0.1)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert trainer.predict(Pairs(8)).predictions.shape[0] == 8


def test_lora_trains_linear_layers_and_the_slot_whole(tmp_path):
    peft = pytest.importorskip("peft")
    model = seq2seq("bahdanau")
    ap.swap_attention(model, [ADDITIVE])
    held = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q_proj", "readout"], modules_to_save=["attn_plugin"]
    )
    adapted = peft.get_peft_model(model, config)
    before, trainer = trained(adapted, tmp_path / "run")
    assert trainer.evaluate()["eval_loss"] < before
    assert torch.equal(adapted.get_base_model().encoder.layers.weight_ih_l0, held["encoder.layers.weight_ih_l0"])
    adapted.save_pretrained(tmp_path / "adapter")
    base = seq2seq("bahdanau")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    adapted.eval()
    given = {"input_ids": source(), "decoder_input_ids": source(seed=2)}
    close(loaded(**given).logits, adapted(**given).logits)


# torch's own recurrent layers hold their weights in a list too, which export sees change
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
@pytest.mark.parametrize(
    ("form", "attention"), [("luong", None), ("bahdanau", {"type": "additive", "roles": ["cross"]})]
)
def test_export_records_it_for_other_batches_and_paddings(form, attention):
    model = seq2seq(form, num_layers=1 if attention else 2)
    if attention:
        ap.swap_attention(model, attention)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask, written):
            given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
            return self.model(**given, use_cache=False).logits

    ids, mask = padded(source(), left=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch}, {0: batch})
    program = torch.export.export(Step(), (ids, mask, source(length=2, seed=2)), dynamic_shapes=shapes, strict=False)
    assert not any("sort" in str(node.target) for node in program.graph.nodes), "ONNX has no stable one"
    more, other = padded(source(3, seed=5), left=True)
    other[0, :7] = 0
    written = source(3, 2, seed=6)
    close(program.module()(more, other, written), Step()(more, other, written))


NEEDED = ("onnx", "onnxscript", "onnxruntime")
ONNX = {
    "seq2seq": lambda: seq2seq(),
    "bahdanau": lambda: ap.swap_attention(seq2seq("bahdanau", num_layers=1), {"type": "additive", "roles": ["cross"]}),
    "encoder": lambda: build(RecurrentEncoderConfig(**{**SMALL, "num_labels": 3})),
    "decoder": lambda: build(RecurrentDecoderConfig(**SMALL, **IDS)),
}


class Scores(nn.Module):
    """What a recurrent model makes of texts of any padding, and of what stands beside them: a target, or states."""

    def __init__(self, model, beside):
        super().__init__()
        self.model, self.beside = model, beside

    def forward(self, ids, mask, beside=None):
        more = {"use_cache": False, self.beside: beside} if self.beside else {}
        return self.model(input_ids=ids, attention_mask=mask, **more).logits


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason=f"needs {', '.join(NEEDED)}: pip install them"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
@pytest.mark.parametrize("kind", ONNX)
@torch.no_grad()
def test_onnx_computes_the_same(kind, tmp_path):
    """For another batch with other padding than the file was made with."""
    import onnxruntime

    beside = {"encoder": None, "decoder": "encoder_hidden_states"}.get(kind, "decoder_input_ids")
    model, path, given = Scores(ONNX[kind](), beside).eval(), str(tmp_path / "model.onnx"), []
    for rows, left in ((2, False), (3, True)):
        ids, mask = padded(source(rows, seed=rows), left=left)
        mask[0, :6] = 0
        states = torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(rows))
        targets = {"decoder_input_ids": source(rows, 3), "encoder_hidden_states": states}
        given.append((ids, mask, *([targets[beside]] if beside else [])))
    names = ["ids", "mask", "beside"][: len(given[0])]
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in names)
    torch.onnx.export(model, given[0], path, dynamo=True, dynamic_shapes=shapes, input_names=names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for tensors in given:
        (got,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
        close(torch.from_numpy(got), model(*tensors))


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
def test_what_a_graph_cannot_hold_is_said():
    model = seq2seq()

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, written, real):
            given = {"input_ids": ids, "decoder_input_ids": written, "decoder_attention_mask": real}
            return self.model(**given, use_cache=True).logits

    written = source(length=3, seed=2)
    with pytest.raises(ValueError, match="no cache beside a padding mask; use_cache=False"):
        torch.export.export(Cached(), (source(), written, torch.ones_like(written)), strict=False)


def test_what_it_looks_at_is_inspected():
    """All queries of a call where it has them at once, a call for each step where each has one."""
    given = {"input_ids": source(1), "decoder_input_ids": source(1, 4, seed=2)}
    for form in ("luong", "bahdanau"):
        model = ap.swap_attention(seq2seq(form), {"type": "additive", "roles": ["cross"]})
        (weights,) = model(**given, output_attentions=True).cross_attentions
        calls = ap.inspect_attention(model, given, roles=["cross"]).layers
        assert [len(call.queries) for call in calls] == ([4] if form == "luong" else [1, 1, 1, 1])
        close(torch.cat([call.weights_BhqK for call in calls], dim=2), weights)


def test_a_classifier_trains_with_self_attention_of_any_kind(tmp_path):
    model = build(RecurrentEncoderConfig(**SMALL, num_labels=2))
    ap.swap_attention(model, {"type": "local", "window_size": 3})
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == 2
    assert torch.equal(loaded(source()).logits, model(source()).logits)
