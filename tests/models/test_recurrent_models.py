"""Recurrent models: their formulas step by step, padding, caches, generation, losses, errors."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn

import attn_plugins as ap
from attn_plugins.models import layers
from attn_plugins.models.configs import RecurrentDecoderConfig, RecurrentEncoderConfig, RecurrentSeq2SeqConfig
from attn_plugins.models.decoder import RecurrentDecoder
from attn_plugins.models.encoder import RecurrentEncoderForSequenceClassification, RecurrentEncoderModel
from attn_plugins.models.seq2seq import RecurrentSeq2Seq
from attn_plugins.models.state_cache import RecurrentStateLayer

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
FORMS = {
    "luong": {},
    "input_feeding": {"input_feeding": True},
    "bahdanau": {"attention": "bahdanau"},
    "none": {"attention": "none"},
}
ADDITIVE = {"type": "additive", "initial_gate": 1.0, "roles": ["cross", "encoder"]}
CLASSES = {
    RecurrentDecoderConfig: RecurrentDecoder,
    RecurrentEncoderConfig: RecurrentEncoderForSequenceClassification,
    RecurrentSeq2SeqConfig: RecurrentSeq2Seq,
}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = CLASSES[type(config)](config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim > 1 and "attn_plugin" not in path:
                nn.init.normal_(weight, std=0.4)
    return model.eval()


def seq2seq(form="luong", **changes):
    return build(RecurrentSeq2SeqConfig(**{**SMALL, **IDS, "self_attention": True, **FORMS[form], **changes}))


def source(rows=2, length=7, seed=1):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, left):
    """(ids, mask) of the same texts with five more tokens of padding, and a third text that makes rows differ."""
    fill, real = torch.full_like(ids[:, :5], 9), torch.ones_like(ids)
    parts = [(fill, torch.zeros_like(fill)), (ids, real)]
    parts = parts if left else parts[::-1]
    return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_padding_on_either_side_and_other_rows_change_nothing(form, cell):
    model, ids, written = seq2seq(form, cell=cell), source(), source(length=5, seed=2)
    wanted = model(input_ids=ids, decoder_input_ids=written).logits
    assert wanted.std() > 0.05
    for left in (True, False):
        more, mask = padded(ids, left)
        row, real = source(1, 12, seed=3), torch.ones(1, 12, dtype=torch.long)
        row[:, 3:5], real[:, 3:5] = 0, 0  # between its tokens
        more, mask = torch.cat([more, row]), torch.cat([mask, real])
        three = torch.cat([written, written[:1]])
        got = model(input_ids=more, attention_mask=mask, decoder_input_ids=three).logits
        close(got[:2], wanted)
        alone = model(input_ids=row[real.bool()].unsqueeze(0), decoder_input_ids=written[:1]).logits
        close(got[2:], alone)


@pytest.mark.parametrize("attention", [None, ADDITIVE, {"type": "linear", "feature_map": "elu", "roles": ["cross"]}])
@pytest.mark.parametrize("form", ["luong", "input_feeding", "bahdanau"])
def test_cached_steps_of_one_or_more_tokens_equal_one_pass(form, attention):
    model, written = seq2seq(form), source(length=6, seed=2)
    if attention is not None:
        ap.swap_attention(model, attention)
    ids, mask = padded(source(), left=True)
    mask[1, :7] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    wanted = model(**given, decoder_input_ids=written, use_cache=False)
    assert wanted.past_key_values is None
    encoded, cache, made = model.encoder(**given), None, []
    for part in written.split([1, 3, 1, 1], dim=1):
        out = model(
            attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache, use_cache=True
        )
        cache, made = out.past_key_values, [*made, out.logits]
    close(torch.cat(made, dim=1), wanted.logits)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", ["luong", "input_feeding", "bahdanau"])
def test_a_step_is_what_the_paper_says(form, num_layers):
    """Written out with torch's cells, without a mask: the last layer's state asks, the first layer reads the answer."""
    model = seq2seq(form, num_layers=num_layers, num_attention_heads=1)
    ids, written = source(), source(length=4, seed=2)
    states = model.encoder(ids).last_hidden_state
    decoder, attention = model.decoder, model.decoder.cross_attention
    half = states.shape[2] // 2
    known = torch.cat([states[:, -1, :half], states[:, 0, half:]], dim=1)
    made = torch.tanh(decoder.initial(known)).chunk(2 * num_layers, dim=1)
    state = list(zip(made[:num_layers], made[num_layers:], strict=True))  # of each layer
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    fed, logits = torch.zeros_like(made[0]), []

    def context(asking):
        scores = attention.q_proj(asking).unsqueeze(1) @ attention.k_proj(states).transpose(1, 2) / 4
        return attention.o_proj(scores.softmax(-1) @ attention.v_proj(states)).squeeze(1)

    for token in decoder.embed_tokens(written).unbind(1):
        answer = context(state[-1][0])
        beside = {"luong": [], "input_feeding": [fed], "bahdanau": [answer]}[form]
        read = torch.cat([token, *beside], dim=1)
        for layer in range(num_layers):
            weights = [getattr(decoder.layers, f"{name}_l{layer}") for name in names]
            state[layer] = torch.lstm_cell(read, state[layer], *weights)
            read = state[layer][0]
        answer = answer if form == "bahdanau" else context(read)
        fed = torch.tanh(decoder.readout(torch.cat([answer, read], dim=1)))
        logits.append(model.lm_head(fed))
    close(model(input_ids=ids, decoder_input_ids=written).logits, torch.stack(logits, dim=1))


def is_zero(x):
    """The share of zeros."""
    return (x == 0).double().mean().item()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_dropped_in_training_and_kept_otherwise(form):
    """Halves of embeddings, of self-attention and of what the head reads; not of what is fed, nor of answers."""
    model, plain = seq2seq(form, dropout=0.5), seq2seq(form)
    given = {"input_ids": source(4, 20), "decoder_input_ids": source(4, 20, seed=2)}
    assert torch.equal(model(**given).logits, plain(**given).logits)
    dropped, read = [], []
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, given, out, path=path: dropped.append((path, given[0])))
    for layers_of in (model.encoder.layers, model.decoder.layers):
        layers_of.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        assert layers_of.dropout == 0.5
    model.lm_head.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    model.train()(**given)
    tokens = [model.encoder.embed_tokens(given["input_ids"]), model.decoder.embed_tokens(given["decoder_input_ids"])]
    assert [path for path, _ in dropped] == [
        "encoder.dropout",
        "encoder.self_attention.dropout",
        "decoder.dropout",
        "decoder.dropout",
    ]
    assert torch.equal(dropped[0][1], tokens[0])
    assert torch.equal(dropped[2][1], tokens[1])
    by_encoder, *by_decoder, by_head = read
    by_decoder = torch.cat(by_decoder, dim=1)
    assert by_decoder.shape[:2] == by_head.shape[:2] == (4, 20)
    for x in (by_encoder, by_decoder[..., :16], by_head):
        assert 0.4 < is_zero(x) < 0.6
    assert is_zero(by_decoder[:, 1:, 16:]) == 0 or form in ("luong", "none")


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_dropped_in_training_alone(form):
    model, given = seq2seq(form, attention_dropout=0.5), {"decoder_input_ids": source(length=5, seed=2)}
    states = model.encoder(source()).last_hidden_state
    assert torch.equal(states, model.encoder(source()).last_hidden_state)
    wanted = model(encoder_outputs=(states,), **given).logits
    assert torch.equal(wanted, seq2seq(form)(encoder_outputs=(states,), **given).logits)
    model.train()
    assert not torch.equal(model.encoder(source()).last_hidden_state, states)
    assert torch.equal(model(encoder_outputs=(states,), **given).logits, wanted) == (form == "none")


def test_a_classifiers_own_dropout_is_of_what_is_pooled():
    for fields, wanted in (({"dropout": 0.5}, 0.5), ({"dropout": 0.5, "classifier_dropout": 0.0}, 0.0)):
        model, read = build(RecurrentEncoderConfig(**{**SMALL, **fields}, num_labels=3)).train(), []
        model.score.register_forward_pre_hook(lambda module, given, read=read: read.append(given[0]))
        model(source(40))
        assert abs(is_zero(read[0]) - wanted) < 0.1


def test_between_layers_a_recorded_graph_drops_in_training_alone():
    torch.manual_seed(0)
    two, one = (
        layers.make_layers(RecurrentEncoderConfig(**{**SMALL, "num_layers": n, "dropout": 0.5}), 16) for n in (2, 1)
    )
    inputs, number = torch.randn(2, 5, 16), torch.tensor([5, 3])
    for module, random in ((two, True), (one, False)):
        made = [layers._turned(module, inputs, number, None) for _ in range(2)]
        assert torch.equal(*made) != random
        module.eval()
        assert torch.equal(*(layers._turned(module, inputs, number, None) for _ in range(2)))


def test_luong_asks_with_all_states_at_once():
    model, ids, written = seq2seq(), source(), source(length=4, seed=2)
    asked = []
    model.decoder.cross_attention.register_forward_pre_hook(lambda module, given: asked.append(given[0].shape[1]))
    model(input_ids=ids, decoder_input_ids=written)
    assert asked == [4]


def test_without_attention_the_source_is_known_by_its_ends_alone():
    model, written = seq2seq("none", self_attention=False), source(length=4, seed=2)
    states = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    made = []
    for change in (0.0, 1.0):
        changed = states.clone()
        changed[:, 1:-1] += change
        changed[:, 0, :8] += change
        made.append(model(encoder_outputs=(changed,), decoder_input_ids=written).logits)
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="matches nothing"):
        ap.swap_attention(seq2seq("none"), "softmax", roles=["cross"])


@pytest.mark.parametrize("form", FORMS)
def test_beams_and_sampling_write_the_same_with_and_without_a_cache(form):
    model = seq2seq(form)
    ids, mask = padded(source(), left=False)
    for how in (
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False},
    ):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            made = model.generate(ids, attention_mask=mask, use_cache=use_cache, max_new_tokens=8, **how)
            written.append(made)
        assert torch.equal(*written), how
        assert written[0][0, 0] == IDS["bos_token_id"]


def test_a_static_cache_serves_and_drafts_are_refused():
    model, ids = seq2seq("input_feeding"), source()
    how = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, cache_implementation="static", **how), wanted)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, **how)
    layer = RecurrentStateLayer()
    layer.crop(0)
    with pytest.raises(ValueError, match="cannot go back"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="use a new cache"):
        layer.update(ids, ids)


@torch.no_grad()
def test_a_cache_is_repeated_chosen_from_and_begun_anew():
    model, ids = seq2seq("input_feeding"), source()
    first, second = source(length=2, seed=2), source(length=3, seed=3)
    cache = model(input_ids=ids, decoder_input_ids=first, use_cache=True).past_key_values
    whole = model(input_ids=ids, decoder_input_ids=torch.cat([first, second], dim=1)).logits[:, 2:]
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    again = second.repeat_interleave(2, dim=0)
    close(model(input_ids=ids, decoder_input_ids=again, past_key_values=repeated).logits[::2], whole)
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    close(model(input_ids=ids, decoder_input_ids=second[1:], past_key_values=chosen).logits, whole[1:])
    cache.reorder_cache(torch.tensor([1, 0]))
    close(model(input_ids=ids, decoder_input_ids=second.flip(0), past_key_values=cache).logits, whole.flip(0))
    cache.reset()
    close(
        model(input_ids=ids, decoder_input_ids=first, past_key_values=cache).logits[:, -1],
        model(input_ids=ids, decoder_input_ids=first).logits[:, -1],
    )
    foreign = tf.DynamicCache()
    foreign.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="another model"):
        model(input_ids=ids, decoder_input_ids=first, past_key_values=foreign)


@pytest.mark.parametrize("form", FORMS)
def test_a_causal_decoder_reads_prompts_with_padding(form):
    if form == "none":
        config = RecurrentDecoderConfig(**SMALL, **IDS, add_cross_attention=False)
        beside = {}
    else:
        config = RecurrentDecoderConfig(**SMALL, **IDS, **FORMS[form], cross_attention_hidden_size=12)
        beside = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}
    model, ids = build(config), source()
    wanted = model(ids, **beside)
    more, mask = padded(ids, left=True)
    close(model(more, attention_mask=mask, **beside).logits[:, 5:], wanted.logits)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0, **beside}
    written = model.generate(ids, **how)
    assert torch.equal(model.generate(more, attention_mask=mask, **how)[:, 5:], written)
    assert torch.equal(model.generate(ids, use_cache=False, **how), written)
    loss = nn.functional.cross_entropy(wanted.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(model(ids, labels=ids, **beside).loss, loss)
    if beside:
        with pytest.raises(ValueError, match="encoder_hidden_states, got None"):
            model(ids)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 3\)"):
        model(ids, attention_mask=mask[:, :3], **beside)


@pytest.mark.parametrize("initial_state", ["mean", "last", "ends"])
@pytest.mark.parametrize("form", ["luong", "none"])
def test_a_causal_decoder_does_not_see_padding_of_the_states_it_is_given(form, initial_state):
    model, ids = build(RecurrentDecoderConfig(**SMALL, **FORMS[form], initial_state=initial_state)), source()
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    wanted = model(ids, encoder_hidden_states=states).logits
    for before, behind in ((3, 0), (0, 3)):
        more = nn.functional.pad(states, (0, 0, before, behind), value=9.0)
        mask = nn.functional.pad(torch.ones(2, 5), (before, behind)).long()
        close(model(ids, encoder_hidden_states=more, encoder_attention_mask=mask).logits, wanted)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_what_a_graph_records_is_what_packing_computes(cell, bidirectional):
    config = RecurrentEncoderConfig(**{**SMALL, "bidirectional": bidirectional, "cell": cell})
    rnn = layers.make_layers(config, 16, bidirectional=bidirectional)
    inputs, mask = torch.randn(3, 6, 16), torch.ones(3, 6, dtype=torch.bool)
    mask[0, :2] = mask[1, 4:] = mask[2] = False
    state = tuple(torch.randn(2 * (1 + bidirectional), 3, rnn.hidden_size) for _ in range(1 + (cell == "lstm")))
    packed, after = layers.run(rnn, inputs, mask, state)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True).unsqueeze(2)
    first = inputs.gather(1, order.expand_as(inputs))
    turned = layers._turned(rnn, first, mask.sum(1), state)
    back = torch.zeros_like(turned).scatter(1, order.expand_as(turned), turned) * mask.unsqueeze(2)
    close(back, packed)
    assert not packed[~mask].any()
    for old, new in zip(state, after, strict=True):
        assert torch.equal(old[:, 2], new[:, 2])  # a row of padding leaves it as it is


@pytest.mark.parametrize("pooling", ["attention", "mean", "max", "last"])
def test_a_classifier_does_not_see_padding(pooling):
    model = build(RecurrentEncoderConfig(**SMALL, pooling=pooling, num_labels=3))
    wanted = model(source()).logits
    for left in (True, False):
        ids, mask = padded(source(), left)
        close(model(ids, attention_mask=mask).logits, wanted)
    mask[1] = 0
    assert model(ids, attention_mask=mask).logits.isfinite().all(), "a row of padding alone"
    roles = [row.role for row in ap.describe_attention(model)]
    assert roles == ["encoder", "cross"][: 2 if pooling == "attention" else 1]
    loss = nn.functional.cross_entropy(wanted, torch.tensor([0, 2]))
    close(model(source(), labels=torch.tensor([0, 2])).loss, loss)


def test_pooling_by_additive_attention_is_that_of_hierarchical_attention():
    """Yang et al. 2016: weights of tokens by a learned vector; each sums to 1 over the tokens that are real."""
    model = build(RecurrentEncoderConfig(**SMALL, self_attention=False, num_labels=3))
    ap.swap_attention(model, {"type": "additive", "initial_gate": 1.0, "roles": ["cross"]})
    ids, mask = padded(source(), left=False)
    (weights,) = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert weights.shape == (2, 2, 1, 12)
    close(weights.sum(-1), torch.ones(2, 2, 1))
    assert not weights[..., 7:].any()


@pytest.mark.parametrize("form", ["luong", "bahdanau"])
def test_weights_are_those_of_every_step(form):
    model, ids, written = seq2seq(form), source(), source(length=4, seed=2)
    model.set_attn_implementation("eager")
    given = {"input_ids": ids, "decoder_input_ids": written, "output_attentions": True}
    own = model(**given)
    (weights,) = own.cross_attentions
    assert weights.shape == (2, 2, 4, 7)
    assert own.encoder_attentions[0].shape == (2, 2, 7, 7)
    ap.swap_attention(model, {"type": "softmax", "roles": ["cross", "encoder"]})
    close(model(**given).cross_attentions[0], weights)
    assert model(**{**given, "output_attentions": False}).cross_attentions is None
    hidden = model(**given, output_hidden_states=True)
    assert [x.shape[1] for x in hidden.decoder_hidden_states] == [4, 4]
    assert len(hidden.encoder_hidden_states) == 3


def test_labels_make_the_decoders_inputs():
    model, ids = seq2seq(), source()
    labels = source(length=5, seed=2)
    labels[0, 3:] = -100
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    assert inputs[0].tolist() == [1, *labels[0, :3].tolist(), 0]
    logits = model(input_ids=ids, decoder_input_ids=inputs).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    made = model(input_ids=ids, labels=labels)
    close(made.loss, wanted)
    assert made.past_key_values is None
    close(model(input_ids=ids, labels=labels, num_items_in_batch=16).loss, wanted * 8 / 16)
    with pytest.raises(ValueError, match="got none of them"):
        model(input_ids=ids)
    bare = seq2seq(pad_token_id=None, bos_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id=None and pad_token_id=None"):
        bare(input_ids=ids, labels=labels)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_and_resized(tied):
    model = seq2seq(tie_word_embeddings=tied)
    same = model.lm_head.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert same == tied
    model.resize_token_embeddings(60)
    sizes = {len(x.weight) for x in (model.lm_head, model.encoder.embed_tokens, model.decoder.embed_tokens)}
    assert sizes == {60}
    assert model(input_ids=source() + 10, labels=source() + 10).logits.shape[-1] == 60


def test_every_weight_gets_a_gradient():
    for form in FORMS:
        model = seq2seq(form)
        if form != "none":
            ap.swap_attention(model, ADDITIVE)
        model(input_ids=source(), labels=source(seed=2)).loss.backward()
        lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert lacking == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell": "lst"}, r"cell='lst'; allowed: lstm, gru, rnn"),
        ({"attention": "dot"}, r"attention='dot'; allowed: luong, bahdanau, none"),
        ({"hidden_size": 10, "num_attention_heads": 4}, r"hidden_size=10; allowed: a multiple of 4"),
        ({"hidden_size": 9}, r"hidden_size=9; allowed: a multiple of 2, for the two directions"),
        ({"num_layers": 0}, r"num_layers=0; allowed: an integer from 1 on"),
        ({"num_hidden_layers": 0}, r"num_layers=0; allowed: an integer from 1 on"),
        ({"initial_state": "mean"}, r"initial_state='mean'; allowed: nothing, since it follows from bidirectional"),
        ({"num_layers": 1.5}, r"num_layers=1.5; allowed: an integer from 1 on"),
        ({"vocab_size": None}, r"vocab_size=None; allowed: an integer from 1 on"),
        ({"dropout": -0.1}, r"dropout=-0.1; allowed: a probability from 0 to below 1"),
        ({"attention_dropout": 1.5}, r"attention_dropout=1.5; allowed: a probability from 0 to below 1"),
        ({"bidirectional": "no"}, r"bidirectional='no'; allowed: True, False"),
        ({"input_feeding": "false"}, r"input_feeding='false'; allowed: True, False"),
        ({"attention": "bahdanau", "input_feeding": True}, r"input_feeding=True; allowed: False, where attention="),
    ],
)
def test_what_a_config_does_not_allow(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentSeq2SeqConfig(**fields)


def test_what_the_other_configs_do_not_allow():
    with pytest.raises(ValueError, match=r"pooling='sum'; allowed: attention, mean, max, last"):
        RecurrentEncoderConfig(pooling="sum")
    with pytest.raises(ValueError, match=r"initial_state='first'; allowed: mean, last, ends"):
        RecurrentDecoderConfig(initial_state="first")


def test_initial_weights_open_forget_gates_and_come_from_the_seed():
    torch.manual_seed(0)
    one = RecurrentSeq2Seq(RecurrentSeq2SeqConfig(**SMALL))
    bias = one.encoder.layers.bias_ih_l1_reverse
    assert bias[8:16].tolist() == [1.0] * 8
    assert bias[:8].abs().max() <= 8**-0.5
    torch.manual_seed(0)
    same = RecurrentSeq2Seq(RecurrentSeq2SeqConfig(**SMALL, attn_plugin={"type": "softmax", "roles": ["cross"]}))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), same.parameters(), strict=True))
    encoder = RecurrentEncoderForSequenceClassification(RecurrentEncoderConfig(**SMALL))
    assert encoder.pooling_query.std() > 0.3


def test_auto_classes_know_them_where_transformers_comes_after_the_models():
    program = (
        "import attn_plugins.models.seq2seq\n"
        "import transformers as tf\n"
        "config = tf.AutoConfig.for_model('recurrent_seq2seq', vocab_size=9, hidden_size=4)\n"
        "print(type(tf.AutoModelForSeq2SeqLM.from_config(config)).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RecurrentSeq2Seq"]


@pytest.mark.parametrize(
    ("auto", "model_type", "cls"),
    [
        ("AutoModel", "recurrent_encoder", RecurrentEncoderModel),
        ("AutoModelForSequenceClassification", "recurrent_encoder", RecurrentEncoderForSequenceClassification),
        ("AutoModel", "recurrent_decoder", RecurrentDecoder),
        ("AutoModelForCausalLM", "recurrent_decoder", RecurrentDecoder),
        ("AutoModel", "recurrent_seq2seq", RecurrentSeq2Seq),
        ("AutoModelForSeq2SeqLM", "recurrent_seq2seq", RecurrentSeq2Seq),
    ],
)
def test_auto_classes_know_them(auto, model_type, cls):
    config = tf.AutoConfig.for_model(model_type, **SMALL)
    assert type(getattr(tf, auto).from_config(config)) is cls
