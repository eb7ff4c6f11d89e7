"""attn-plugins inspect, as a user would run it: tables, files, a page, and one line where it cannot."""

import json
import math

import pytest
import tiny
import torch
from conftest import tokenizer
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertModel, BartConfig, BartForConditionalGeneration
from typer.testing import CliRunner

import attn_plugins as ap
from attn_plugins import cli
from attn_plugins.inspection import page
from attn_plugins.inspection.run import tensors_of

TEXT = "the red cat is good . the blue dog is bad . one"
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments, status=0):
    ran = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert ran.exit_code == status, ran.output + str(ran.exception)
    return ran


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny.build("llama", vocab_size=20).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    torch.manual_seed(0)
    config = BartConfig(**{**tiny.HALVES, "vocab_size": 20}, max_position_embeddings=128, forced_eos_token_id=None)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(encoder=True).save_pretrained(folder)
    return folder


def test_a_text_gives_a_page_figures_and_weights(decoder, tmp_path):
    attention = "[{type: local, window_size: 4, layers: [0, 2]}]"
    ran = call("-m", decoder, "-a", attention, "-t", TEXT, "--attribution", "gradient", "-o", tmp_path / "out")
    written = ["inspect.json", "weights.safetensors", "page.html", "overview_decoder.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(written)
    assert all(name in ran.output for name in written)
    told = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert [token.strip() for token in told["tokens"]["decoder"]] == TEXT.split()
    assert told["modules with the model's own attention"] == ["model.layers.1.self_attn"]
    assert [one["attention"].partition("(")[0] for one in told["layers"]] == ["local", "softmax", "local"]
    assert told["layers"][0]["figures"][3]["weights"]["outside"] == 0
    held = load_file(tmp_path / "out" / "weights.safetensors")
    model = ap.swap_attention(tiny.build("llama", vocab_size=20), "local", window_size=4, layers=[0, 2])
    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    found = ap.inspect_attention(model, {"input_ids": ids}, layers=2, queries=range(ids.shape[1]))
    torch.testing.assert_close(held["model.layers.2.self_attn.weights"], found.layers[0].weights_BhqK)
    made = (tmp_path / "out" / "page.html").read_text()
    assert "http" not in made
    assert "gradient x weights, decoder layer 1" in made


def test_words_and_places_choose_the_queries(decoder, tmp_path):
    call(
        "-m",
        decoder,
        "-t",
        TEXT,
        "--query",
        "is",
        "--query",
        "last",
        "--layer",
        "0,-1",
        "--head",
        "1-2",
        "-o",
        tmp_path,
    )
    layers = json.loads((tmp_path / "inspect.json").read_text())["layers"]
    assert [(one["layer"], one["heads"], one["queries"]) for one in layers] == [(n, [1, 2], [3, 9, 12]) for n in (0, 2)]
    held = load_file(tmp_path / "weights.safetensors")["model.layers.2.self_attn.own"]
    torch.testing.assert_close(torch.tensor(layers[1]["own"]), held[0])


def test_what_is_written_is_aligned_with_what_is_read(translator, tmp_path):
    call("-m", translator, "-a", "local", "-t", "red cat", "--generate", 5, "--attribution", "rollout", "-o", tmp_path)
    told = json.loads((tmp_path / "inspect.json").read_text())
    assert [one["role"] for one in told["layers"]] == ["encoder"] * 2 + ["decoder"] * 2 + ["cross"] * 2
    assert len(told["written"]) == len(told["tokens"]["decoder"]) == 5
    assert told["tokens"]["encoder"] == ["<s>", "red", "cat", "</s>"]
    assert (tmp_path / "alignment.png").stat().st_size > 5000
    assert load_file(tmp_path / "weights.safetensors")["model.decoder.layers.1.encoder_attn.own"].shape == (1, 4, 5, 4)
    assert "attention rollout of the encoder" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got none to inspect the model on; allowed: one of text, text_file"),
        (["-t", "red", "--text-file", "x"], "got text, text_file to inspect"),
        (["--text-file", "no/such.txt"], "text_file='no/such.txt' cannot be read as a text in UTF-8"),
        (["-t", "red", "--layer", "9"], "layers=[9] has 9, and the model has layers 0 to 2"),
        (["-t", "red", "--query", "green"], "queries=['green'], none of which is among the tokens"),
        (
            ["-t", "red", "--role", "cross"],
            "no module is in layers='all', roles=['cross'], modules='*'; roles: decoder",
        ),
        (["-t", "red", "--through", "both"], "through='both'; allowed:"),
        (["-t", "", "--layer", "0"], "the text has no tokens"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(decoder, tmp_path, arguments, message):
    ran = call("-m", decoder, *arguments, "-o", tmp_path / "out", status=2)
    line = ran.stderr.splitlines()[-1]  # after the bar of what is loaded
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_page_holds_as_much_as_a_browser_opens():
    entries = [
        page.Entry(
            title=str(n),
            told="",
            heads=["0"],
            captions=[""],
            queries=[0],
            query_texts=[],
            key_texts=[],
            weights_hqK=torch.zeros(1, 1, 10),
            own_hqK=None,
        )
        for n in range(30)
    ]
    assert [one.title for one in page.fitting(entries, 40)] == ["0", "10", "19", "29"]
    assert len(page.fitting(entries, 3)) == 1
    assert len(page.fitting(entries, 300)) == 30


def test_the_text_of_a_page_stays_text():
    weights = torch.tensor([[[0.5, -0.25, 0.25]]])
    entry = page.Entry(
        title="<b>",
        told="",
        heads=["0"],
        captions=[""],
        queries=[2],
        query_texts=["a", "</script><script>alert(1)</script>", "c"],
        key_texts=["x", "y", "z"],
        weights_hqK=weights,
        own_hqK=None,
    )
    made = page.page([entry], title="<i>", told="@@DATA@@ & more")
    assert made.count("</script>") == 2
    assert "<p>@@DATA@@ &amp; more</p>" in made
    assert "<title>&lt;i&gt;</title>" in made
    held = page.packed(weights)
    assert held["sums"] == [[2.0]]


def test_a_text_is_cut_to_what_the_model_takes(decoder, translator, tmp_path):
    for model, role, read, generate in ((decoder, "decoder", 124, 4), (translator, "encoder", 128, 4)):
        call("-m", model, "-t", TEXT * 20, "--generate", generate, "--layer", 0, "--query", 0, "-o", tmp_path / role)
        tokens = json.loads((tmp_path / role / "inspect.json").read_text())["tokens"][role]
        assert len(tokens) == read + generate * (role == "decoder")
        ran = call("-m", model, "-t", "red", "--generate", 128, "-o", tmp_path / "out", status=2)
        assert "generate=128; allowed: at most 127, as the model has 128 positions" in ran.stderr


def test_a_word_looks_where_it_is_read_and_across_where_it_is_written(tmp_path):
    model = tiny.build("bart", seed=1, vocab_size=20, forced_eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    tokenizer(encoder=True).save_pretrained(tmp_path / "model")
    call("-m", tmp_path / "model", "-t", "red cat", "--generate", 4, "--query", "bad", "-o", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert (told["tokens"]["decoder"], told["written"]) == (["<s>", "bad", "bad", "bad"], ["bad"] * 4)
    assert {one["role"]: one["queries"] for one in told["layers"]} == {"decoder": [1, 2, 3], "cross": [0, 1, 2, 3]}


def test_each_call_of_a_shared_module_has_weights_of_its_own():
    sizes = {**SIZES, "embedding_size": 16, "intermediate_size": 48, "num_hidden_layers": 4}
    model = ap.swap_attention(AlbertModel(AlbertConfig(**sizes)).eval(), "local", window_size=2)
    layers = ap.inspect_attention(model, {"input_ids": torch.arange(3, 9).unsqueeze(0)}).layers
    held = tensors_of(layers)
    path = layers[0].path
    assert len(layers) == 4
    for name, one in zip((path, f"{path}.1", f"{path}.2", f"{path}.3"), layers, strict=True):
        assert torch.equal(held[f"{name}.weights"], one.weights_BhqK)


def test_weights_that_are_no_numbers_leave_the_page_whole():
    weights = torch.tensor([[[math.nan, 1, 1], [math.inf, 2, 0]]])
    entry = page.Entry(
        title="t",
        told="",
        heads=["0"],
        captions=[""],
        queries=[0, 1],
        query_texts=[],
        key_texts=[],
        weights_hqK=weights,
        own_hqK=None,
    )
    made = page.page([entry], title="t", told="t")
    held = json.loads(made.partition('id="data">')[2].partition("</script>")[0], parse_constant=pytest.fail)
    assert held["entries"][0]["weights"]["sums"] == [[2.0, 1.0]]
