"""Models on rows that processes have parts of give what one process gives: logits, losses, gradients."""

import json

import context_program
import programs
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes and title, what each process wrote, in the order of its parts."""
    folder = tmp_path_factory.mktemp("context")
    done = programs.run(context_program.__file__, folder, 2, 4)
    assert done.returncode == 0, done.stderr
    lines = {}
    for number in (2, 4):
        for rank in range(number):
            for line in map(json.loads, (folder / f"{rank}-{number}.jsonl").read_text().splitlines()):
                lines.setdefault((number, line["title"]), []).append(line)
    return lines


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("title", context_program.EQUAL)
def test_equals_one_process(found, title, number):
    lines = found[number, title]
    assert len(lines) == number
    for line in lines:
        assert line["logits"] < 1e-10, line
        assert line["gradients"] < 1e-10, line
        assert line["loss"] < 1e-5, line
        assert line["restored"], line
    assert max(line["alone"] for line in lines) > 1e-2  # what a part is without the others


MESSAGES = {
    "another attention": "attention 'topk' of model.layers.0.self_attn cannot attend there; those that can: block",
    "an option": "attention 'local'(window_size=5, ",
    "heads of two kinds": "attention 'split' of model.layers.0.self_attn cannot attend there; those that can: ",
    "a backend": "backend='reference' of model.layers.0.self_attn is not served there; allowed: 'auto', 'torch', ",
    "labels that are not moved": "labels are moved by one within a part, .*; give shift_labels",
    "no positions": "position_ids of shape .* are needed, cut as the tokens are, got none",
    "positions of whole rows": "position_ids of shape .* are needed, cut as the tokens are, got a tensor (1, 33)",
    "a dense mask": "attention_mask may be the padding of shape .*, cut as the tokens are, got a tensor (2, 1, 4, 4)",
    "a cache": "a cache would hold the keys of a part; call the model without past_key_values",
    "a head that pools": "output logits (2, 2) of BertForSequenceClassification is not one for each token: it was made",
    "a window of the model's own": "MistralAttention brings a mask of its own that cannot be told of a part",
    "a convolution beside attention": "Conv1d of Lfm2ForCausalLM mixes tokens too; give each process whole rows",
    "a tuple of a head that pools": "output 0 (2, 2) of BertForSequenceClassification is not one for each token",
    "an encoder and a decoder": "T5ForConditionalGeneration has sequences of more than one kind; give each process ",
    "rotary angles of long rows": "change the rotary frequencies of LlamaForCausalLM in all of the row, .*24 tokens",
    "rotary angles of the longest row": "position_ids up to 31 change .*; allowed: rows of 24 tokens",
    "positions that leave some out": "position_ids leave out or repeat some within a row, .* give attention_mask, ",
    "a span in whole rows": "start_positions (2,) has no value for each token (2, .*) of the part",
    "a loss of experts": "output_router_logits=True adds a loss of which experts all tokens took; allowed: False",
    "masked tokens that are counted": "token_dropout of EsmForTokenClassification counts the masked tokens of a row",
    "labels of a forward that is called as such": "labels are moved by one within a part, .*; give shift_labels",
    "torch's own": "torch's context_parallel gives each process a part of the text, .* or enter attn_plugins.context_p",
    "rows that cannot be cut": "rows of 33 tokens cannot be cut into .* equal parts; pad them, on the right, with 0",
}
"""Pieces of what is said, by title, in order."""


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("title", MESSAGES)
def test_what_cannot_be_served_is_refused_on_every_process(found, title, number):
    lines = found[number, title]
    assert len(lines) == number
    for line in lines:
        for piece in MESSAGES[title].split(".*"):
            assert piece in line["refused"]
        assert line.get("answers", True)


@pytest.mark.parametrize("number", [2, 4])
def test_what_a_context_leaves_behind_and_serves_without_buffers(found, number):
    assert found[number, "interrupted"] == [{"title": "interrupted", "answers": True}] * number
    assert found[number, "without buffers"] == [{"title": "without buffers", "served": True}] * number


def test_every_refusal_is_tested():
    assert {*context_program.REFUSED, "torch's own", "rows that cannot be cut"} == {*MESSAGES}
