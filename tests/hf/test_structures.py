"""A structure beside a model's inputs: in every mask of self-attention, and refused where nothing would heed it."""

import threading

import pytest
import tiny
import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.core.mask import AttentionMask

N = 14
TEXT = {**tiny.TEXT, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def structure(number=N, seed=0):
    edges = torch.randint(0, number, (2 * number, 2), generator=torch.Generator().manual_seed(seed))
    return ap.Structure.graph(edges, number)


def tokens(rows=2, number=N):
    return torch.randint(3, 90, (rows, number), generator=torch.Generator().manual_seed(1))


def dense(given, causal=False, rows=2):
    mask = AttentionMask(rows, given.num_tokens, given.num_tokens, causal=causal).with_structure(given)
    return mask.dense().expand(rows, 1, -1, -1)


def bert(cls=tf.BertModel, **changes):
    torch.manual_seed(0)
    return cls(tf.BertConfig(**TEXT, **{**DROPLESS, **changes}))


from_5_17 = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # DeBERTa's import there


def same(got, want):
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        "graph",
        "softmax",
        {"type": "local", "window_size": 64},
        {"type": "graph", "layers": [0]},
        {"type": "graph", "kv_heads": [0, 1]},
    ],
    ids=str,
)
def test_a_swapped_model_equals_the_original_under_the_dense_mask(rules):
    """Layers and heads that no rule matches heed it too, in the native mask."""
    model, ids = bert().eval(), tokens()
    for given in (structure(), ap.Structure.stack([structure(seed=2), structure(seed=3)])):
        want = model(ids, attention_mask=dense(given)).last_hidden_state
        ap.swap_attention(model, rules)
        same(model(ids, structure=given).last_hidden_state, want)
        same(model(ids, structure=given.rows() * (2 // len(given))).last_hidden_state, want)
        ap.restore_attention(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layers_without_a_rule_heed_it_under_either_implementation(implementation):
    given, ids = structure(), tokens()
    want = bert().eval()(ids, attention_mask=dense(given)).last_hidden_state
    torch.manual_seed(0)
    config = tf.BertConfig(**TEXT, **DROPLESS)
    model = tf.AutoModel.from_config(config, attn_implementation=implementation).eval()
    ap.swap_attention(model, "graph", layers=[1])
    same(model(ids, structure=given).last_hidden_state, want)


def test_padding_hides_keys_beside_it():
    model, ids, given = bert().eval(), tokens(), structure(10)
    ap.swap_attention(model, "graph")
    alone = model(ids[:, :10], structure=given).last_hidden_state
    mask = (torch.arange(N) < 10).long().expand(2, -1)
    both = model(ids, attention_mask=mask, structure=given.pad(N)).last_hidden_state
    same(both[:, :10], alone)
    wide = ap.Structure.dense(N)
    dense_alone = model(ids[:, :10], structure=ap.Structure.dense(10)).last_hidden_state
    same(model(ids, attention_mask=mask, structure=wide).last_hidden_state[:, :10], dense_alone)


def test_it_combines_with_a_mask_that_the_caller_gives():
    model, ids, given = bert().eval(), tokens(), structure()
    own = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(4)) < 0.6
    own = own | torch.eye(N, dtype=torch.bool)
    want = model(ids, attention_mask=own & dense(given)).last_hidden_state
    ap.swap_attention(model, "graph")
    same(model(ids, attention_mask=own, structure=given).last_hidden_state, want)


@pytest.mark.parametrize("name", ["local", "topk", "softmax"])
def test_in_a_decoder_edges_count_to_earlier_tokens_only(name):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.GROUPED)).eval()
    given, ids = structure(), tokens()
    want = model(ids, attention_mask=dense(given, causal=True)).logits
    ap.swap_attention(model, name)
    same(model(ids, structure=given).logits, want)
    same(model(ids, structure=given, use_cache=False).logits, want)


def test_beside_a_cache_with_tokens_and_in_generate_it_is_refused():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.GROUPED)).eval()
    ap.swap_attention(model, "softmax")
    ids = tokens()
    cache = model(ids, structure=structure()).past_key_values
    with pytest.raises(ValueError, match="structure= was given beside a cache that holds 14 tokens"):
        model(ids[:, :1], structure=structure(15), past_key_values=cache)
    with pytest.raises(ValueError, match=r"not used by the model: .'structure'."):
        model.generate(ids, structure=structure(), max_new_tokens=2)
    static = tf.StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="without a cache that holds tokens or is of fixed length"):
        model(ids, structure=structure(), past_key_values=static)


def test_of_an_encoder_and_a_decoder_it_is_about_the_encoder():
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()
    given, ids = structure(), tokens()
    states = model.encoder(ids, attention_mask=dense(given)).last_hidden_state
    want = model(encoder_outputs=(states,), decoder_input_ids=ids).logits
    ap.swap_attention(model, "softmax", roles=["encoder", "decoder", "cross"])
    got = model(ids, decoder_input_ids=ids, structure=given).logits
    same(got, want)
    ap.swap_attention(model, "softmax", roles="cross")
    for inputs in ({"input_ids": ids}, {"encoder_outputs": (states,)}):  # the encoder has none of ours, or does not run
        with pytest.raises(ValueError, match="no attention in it has asked for the mask of its 14 tokens"):
            model(**inputs, decoder_input_ids=ids, structure=given)


def test_pixels_whose_model_makes_no_mask():
    torch.manual_seed(0)
    config = tf.ViTConfig(**{**tiny.VISION, "num_attention_heads": 4, "intermediate_size": 48})
    model, pixels = tf.ViTModel(config).eval(), torch.randn(2, 3, 16, 16)
    whole = model(pixels).last_hidden_state
    ap.swap_attention(model, "graph")
    same(model(pixels, structure=ap.Structure.dense(17)).last_hidden_state, whole)
    blocks = ap.Structure.blocks(torch.arange(16) // 4, num_global=1)
    got = model(pixels, structure=blocks).last_hidden_state
    ap.swap_attention(model, {"type": "softmax"})
    same(model(pixels, structure=blocks).last_hidden_state, got)
    assert not torch.allclose(got, whole, atol=1e-3)


def deberta():
    torch.manual_seed(0)
    config = tf.DebertaConfig(**TEXT, **DROPLESS, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return tf.DebertaModel(config)


@from_5_17
def test_where_a_model_makes_a_dense_mask_itself():
    model, ids, given = deberta().eval(), tokens(), structure()
    want = model.encoder(model.embeddings(ids), dense(given).squeeze(1).long()).last_hidden_state
    ap.swap_attention(model, "softmax")
    same(model(ids, structure=given).last_hidden_state, want)
    ap.swap_attention(model, "softmax", layers=[0])
    with pytest.raises(
        ValueError, match=r"DebertaModel makes its masks itself, and .*1.* has no attention of attn_plug"
    ):
        model(ids, structure=given)
    ap.swap_attention(model, "softmax")
    model.enable_input_require_grads()
    for reentrant in (False, True):  # which runs layers without gradients in the forward
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        with pytest.raises(ValueError, match="its layers run again without structure="):
            model(ids, structure=given)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        same(model(ids, structure=given).last_hidden_state, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_biases(reentrant):
    given, ids = structure(), tokens()
    found = []
    for checkpointed in (False, True):
        model = bert().train()
        ap.swap_attention(model, "graph", num_labels=2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        # Not the sum of squares, which the last LayerNorm makes the same whatever was attended to.
        out = model(ids, structure=given).last_hidden_state
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert model.encoder.layer[0].attention.self.attn_plugin.bias_HL.grad.abs().max() > 1e-3
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_biases_are_saved_with_the_model(tmp_path):
    model = bert()
    ap.swap_attention(model, "graph", num_labels=2)
    slot = model.encoder.layer[0].attention.self.attn_plugin
    assert not slot.bias_HL.any()
    torch.nn.init.normal_(slot.bias_HL)
    model.save_pretrained(tmp_path)
    again = tf.BertModel.from_pretrained(tmp_path).eval()
    ids, given = tokens(), structure()
    assert torch.equal(again(ids, structure=given)[0], model.eval()(ids, structure=given)[0])


def test_threads_that_share_a_model_keep_their_structures_apart():
    model, ids = bert().eval(), tokens()
    ap.swap_attention(model, "softmax")
    given = [structure(seed=seed) for seed in range(4)] + [None]
    want = [model(ids, structure=one)[0] for one in given]
    wrong, start = [], threading.Barrier(len(given))

    def run(number):
        start.wait()
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(model(ids, structure=given[number])[0], want[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_inside_leaves_nothing_behind():
    model, ids = bert().eval(), tokens()
    ap.swap_attention(model, "softmax")
    plain = model(ids)[0]
    with pytest.raises(ValueError, match="structure= is of 1 rows of 5 tokens, and the model attends in 2 rows of 14"):
        model(ids, structure=structure(5))
    assert torch.equal(model(ids)[0], plain)


def test_what_would_not_be_heeded_is_refused():
    model, ids, given = bert().eval(), tokens(), structure()
    with pytest.raises(
        ValueError, match="structure= was given to BertModel, none of whose modules has an attention of"
    ):
        model(ids, structure=given)
    ap.swap_attention(model, "linear", feature_map="elu")
    with pytest.raises(ValueError, match=r"needs the structure of its input \(structure=\), which attention 'linear'"):
        model(ids, structure=given)
    ap.swap_attention(model, "graph", required=True)
    with pytest.raises(ValueError, match="attention 'graph' needs the structure of the input, and the call has none"):
        model(ids)
    with pytest.raises(ValueError, match=r"structure is a Tensor; allowed: an attn_plugins.Structure, or a list"):
        model(ids, structure=torch.ones(2))
    with pytest.raises(ValueError, match=r"call the model itself: model\(..., structure=...\)"):
        model.forward(ids, structure=given)
    for wrong, kinds in (([given, None], "list of Structure, NoneType"), ([], "list of nothing")):
        with pytest.raises(ValueError, match=f"structure is a {kinds}; allowed: an attn_plugins.Structure, or a list"):
            model(ids, structure=wrong)
    three = ap.Structure.stack([given] * 3)
    with pytest.raises(ValueError, match="structure= is of 3 rows of 14 tokens, and the model attends in 2 rows"):
        model(ids, structure=three)


def test_other_things_of_that_name_are_left_to_models_that_were_not_swapped():
    class Folds(tf.BertModel):
        def forward(self, ids, **kwargs):
            return kwargs["structure"]

    assert bert(Folds)(tokens(), structure="helix") == "helix"


def test_weights_can_be_seen():
    model, ids, given = bert().eval(), tokens(), structure()
    ap.swap_attention(model, "graph")
    weights = model(ids, structure=given, output_attentions=True).attentions[0]
    assert not weights.masked_select(~dense(given)).any()


def rows(number=8):
    """Two graphs of each length: a path, and a star around the last node."""

    def edges(length, star):
        return [(i, length - 1 if star else i + 1) for i in range(length - 1)]

    return [
        {"input_ids": tokens(1, n // 2)[0].tolist(), "edges": edges(n // 2, n % 2), "labels": n % 2}
        for n in range(8, 8 + number)
    ]


def collator(pad):
    def make(row):
        return ap.Structure.graph(row["edges"], len(row["input_ids"]))

    return ap.StructureCollator(pad, make, fields=["edges"])


def pad_rows(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def test_trainer_trains_and_evaluates_with_a_collator_of_structures(tmp_path):
    model = bert(tf.BertForSequenceClassification, num_labels=2)
    ap.swap_attention(model, "graph", num_labels=2)

    def trainer(**changes):
        arguments = tf.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=0.1,
            **changes,
        )
        return tf.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(), data_collator=collator(pad_rows))

    with pytest.raises(
        ValueError, match=r"not edges; Trainer takes away .* TrainingArguments\(remove_unused_columns=F"
    ):
        trainer().train()
    kept = trainer(remove_unused_columns=False)
    kept.train()
    assert model.bert.encoder.layer[0].attention.self.attn_plugin.bias_HL.any()
    assert kept.evaluate()["eval_loss"] > 0
    shown = [ap.Structure.graph(row["edges"], len(row["input_ids"])) for row in rows()]
    with torch.no_grad():
        alone = [
            model.eval()(torch.tensor([row["input_ids"]]), structure=one).logits[0]
            for row, one in zip(rows(), shown, strict=True)
        ]
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(alone[::2], alone[1::2], strict=True))
    same(torch.from_numpy(kept.predict(rows()).predictions), torch.stack(alone))
