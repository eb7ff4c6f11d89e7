"""Where attn_implementation= may be given, attn_plugin= may too, and the config beside it stays as it is."""

import copy

import pytest
import tiny
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import attn_plugins as ap

FLAG = {"type": "local", "window_size": 3}


def plugins(model):
    return [row.plugin for row in ap.describe_attention(model)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("plain")
    tiny.build("llama").save_pretrained(where)
    return where


WAYS = {
    "auto": lambda d, c, f: AutoModelForCausalLM.from_pretrained(d, attn_plugin=f),
    "auto with config": lambda d, c, f: AutoModelForCausalLM.from_pretrained(d, config=c, attn_plugin=f),
    "auto base with config": lambda d, c, f: AutoModel.from_pretrained(d, config=c, attn_plugin=f),
    "class": lambda d, c, f: LlamaForCausalLM.from_pretrained(d, attn_plugin=f),
    "class with config": lambda d, c, f: LlamaForCausalLM.from_pretrained(d, config=c, attn_plugin=f),
    "class with config path": lambda d, c, f: LlamaForCausalLM.from_pretrained(d, config=d, attn_plugin=f),
    "auto from_config": lambda d, c, f: AutoModelForCausalLM.from_config(c, attn_plugin=f),
    "class from_config": lambda d, c, f: LlamaForCausalLM._from_config(c, attn_plugin=f),
    "classifier": lambda d, c, f: AutoModelForSequenceClassification.from_pretrained(d, config=c, attn_plugin=f),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_flag_beside_a_config(folder, way):
    config = AutoConfig.from_pretrained(folder)
    before = copy.deepcopy(vars(config))
    model = WAYS[way](folder, config, FLAG)
    assert plugins(model) == ["local"] * 3
    assert model.config.attn_plugin[0]["window_size"] == 3
    assert vars(config) == before
    with pytest.raises(ValueError, match=r"unknown attention 'locl' \(did you mean local\?\)"):
        WAYS[way](folder, config, "locl")
    assert vars(config) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_flag_beside_a_config_takes_the_place_of_its_own(folder, way, tmp_path):
    ap.swap_attention(tiny.build("llama"), FLAG).save_pretrained(tmp_path)
    for config in (AutoConfig.from_pretrained(tmp_path), LlamaConfig(**tiny.GROUPED, attn_plugin=FLAG)):
        assert plugins(WAYS[way](tmp_path, config, {"type": "softmax", "layers": 1})) == [None, "softmax", None]
        native = WAYS[way](tmp_path, config, None)
        assert {(row.plugin, row.implementation) for row in ap.describe_attention(native)} == {(None, "sdpa")}
        assert not native.config.attn_plugin
        beside = WAYS["class with config"](tmp_path, config, {"type": "softmax", "layers": 1})
        assert plugins(beside) == [None, "softmax", None]


def test_the_implementation_may_be_given_beside_it(folder):
    config, flag = AutoConfig.from_pretrained(folder), {**FLAG, "layers": 0}
    for model in (
        AutoModelForCausalLM.from_pretrained(folder, config=config, attn_plugin=flag, attn_implementation="eager"),
        AutoModelForCausalLM.from_config(config, attn_plugin=flag, attn_implementation="eager"),
    ):
        assert [row.implementation for row in ap.describe_attention(model)] == ["torch", "eager", "eager"]


def test_an_auto_class_that_builds_from_a_part_of_the_config(tmp_path):
    """It takes the part's config, where the flag is not."""
    config = MllamaConfig(text_config={**tiny.GROUPED, "cross_attention_layers": []})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_plugin=FLAG),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_plugin=FLAG),
        AutoModelForCausalLM.from_config(config, attn_plugin=FLAG),
    ):
        assert type(model).__name__ == "MllamaForCausalLM"
        assert plugins(model) == ["local"] * 3
    config.attn_plugin = FLAG
    assert plugins(AutoModelForCausalLM.from_config(config)) == ["local"] * 3
    assert plugins(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) == ["local"] * 3
    ap.swap_attention(model, "softmax").save_pretrained(tmp_path)
    config.attn_plugin, config.text_config = None, model.config
    assert plugins(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) == [None] * 3
    del config.attn_plugin
    assert plugins(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) == ["softmax"] * 3


@pytest.mark.parametrize("with_config", [False, True])
def test_model_kwargs_of_a_pipeline(tmp_path, with_config):
    PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="w0", eos_token="w2").save_pretrained(tmp_path)
    tiny.build("llama").save_pretrained(tmp_path)
    more = {"config": AutoConfig.from_pretrained(tmp_path)} if with_config else {}
    path, flag = str(tmp_path), {"attn_plugin": FLAG}
    made = pipeline("text-generation", model=path, model_kwargs=flag, device="cpu", **more)
    assert plugins(made.model) == ["local"] * 3


def words():
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w1"))


def test_parts_of_an_encoder_decoder_of_two_models(tmp_path):
    BertModel(BertConfig(**tiny.SMALL)).save_pretrained(tmp_path / "encoder")
    BertLMHeadModel(BertConfig(**tiny.SMALL, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder", encoder_attn_plugin=FLAG
    )
    found = [(row.path.split(".")[0], row.plugin) for row in ap.describe_attention(model)]
    assert {plugin for side, plugin in found if side == "encoder"} == {"local"}
    assert {plugin for side, plugin in found if side == "decoder"} == {None}
    model.save_pretrained(tmp_path / "both")
    back = EncoderDecoderModel.from_pretrained(tmp_path / "both")
    assert ap.describe_attention(back) == ap.describe_attention(model)


def test_sentence_transformers(tmp_path):
    sentences = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="w0").save_pretrained(tmp_path)
    tiny.build("bert").base_model.save_pretrained(tmp_path)
    model = sentences.SentenceTransformer(str(tmp_path), model_kwargs={"attn_plugin": FLAG}, device="cpu")
    assert plugins(model) == plugins(model[0].auto_model) == ["local"] * 3
    assert model.encode(["w5 w6 w7"]).shape == (1, 32)
