"""Scores of one head or layer at a time equal runs of models that were swapped so; resumed runs equal whole ones."""

import pytest
import tiny
import torch
from test_contribution import RULE, row
from torch.nn.functional import cross_entropy

import attn_plugins as ap
from attn_plugins.choice import one_at_a_time
from attn_plugins.choice.resume import Resumed


def logits(model, one):
    with torch.no_grad():
        return model(input_ids=one.input_ids_N[None]).logits[0]


def loss(name, own, one, found):
    if name.startswith("kl"):
        start, stop = one.answers["text"]
        before, after = (x[start - 1 : stop - 1].log_softmax(-1) for x in (own, found))
        return float((before.exp() * (before - after)).sum(-1).mean())
    start, stop = one.answers["copy"]
    return float(cross_entropy(found[start - 1 : stop - 1], one.input_ids_N[start:stop]))


@pytest.mark.parametrize("name", ["kl", "kl_swapped", "recall", "recall_kept"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_equal_models_swapped_so(name, kind):
    model, one = tiny.build(kind), row()
    own = logits(model, one)
    all_swapped = loss(name, own, one, logits(ap.swap_attention(model, RULE), one))
    expected = []
    for layer in range(3):
        if name in ("kl", "recall_kept"):
            rules = [{"type": "softmax", "layers": layer}, RULE]
            expected.append(all_swapped - loss(name, own, one, logits(ap.swap_attention(model, rules), one)))
        else:
            swapped = logits(ap.swap_attention(model, {**RULE, "layers": layer}), one)
            expected.append(loss(name, own, one, swapped) - loss(name, own, one, own))
    ap.restore_attention(model)
    choice = ap.choose_attention(model, None, [one], RULE, 0.4, "layers", name)
    found = [each.score for each in choice.scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "kl_swapped"])
def test_resumed_runs_score_as_whole_ones(name, monkeypatch):
    model, one = tiny.build("llama"), row()
    resumed = ap.choose_attention(model, None, [one], RULE, score=name)
    monkeypatch.setattr(one_at_a_time, "_resumes", lambda *given: False)
    whole = ap.choose_attention(model, None, [one], RULE, score=name)
    assert [each.score for each in resumed.scores] == [each.score for each in whole.scores]


@pytest.mark.parametrize(
    ("kind", "path", "skipped"),
    [
        ("llama", "model.layers.2.self_attn", 2),
        ("gemma3", "model.layers.1.self_attn", 1),
        ("gpt2", "transformer.h.2.attn", 2),
        ("whisper", "model.decoder.layers.1.encoder_attn", 3),
        ("bert", "bert.encoder.layer.2.attention.self", 2),
        ("t5", "decoder.block.1.layer.0.SelfAttention", 3),
        ("vit", "layers.1.attention", 1),
    ],
)
def test_a_run_goes_on_from_a_block(kind, path, skipped):
    model, given = tiny.build(kind), tiny.inputs(kind, padded=False)
    assert model.get_submodule(path) is not None
    calls = []
    blocks = Resumed(model)._blocks
    hooks = [
        leaf.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
        for name, block in blocks.items()
        for leaf in [next(module for module in block.modules() if not list(module.children()))]
    ]

    def run():
        with torch.no_grad():
            return tiny.output(model, given)

    resumed = Resumed(model)
    whole = resumed.first(run)
    before = len(set(calls))
    calls.clear()
    assert torch.equal(resumed.from_block(path, run), whole)
    assert before - len(set(calls)) == skipped
    assert torch.equal(resumed.from_block(path, run), whole)  # nothing was written into what the blocks gave
    assert not any("forward" in vars(block) for block in blocks.values())
    assert torch.equal(run(), whole)
    for hook in hooks:
        hook.remove()


def test_what_comes_before_the_block_is_not_computed():
    model, one = tiny.build("llama"), row()
    resumed = Resumed(model)
    first = resumed.first(lambda: logits(model, one))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    assert torch.equal(resumed.from_block("model.layers.1.self_attn", lambda: logits(model, one)), first)
    assert logits(model, one).isnan().all()
    with pytest.raises(RuntimeError, match="stopped"):
        resumed.from_block("model.layers.1.self_attn", lambda: (_ for _ in ()).throw(RuntimeError("stopped")))
    assert logits(model, one).isnan().all()  # nothing is left behind


def test_a_block_that_writes_into_its_input_gets_the_same_each_time():
    model, one = tiny.build("llama"), row()
    model.model.layers[2].register_forward_pre_hook(lambda block, args: (args[0].mul_(1.5),))
    resumed = Resumed(model)
    first = resumed.first(lambda: logits(model, one))
    for _ in range(2):
        assert torch.equal(resumed.from_block("model.layers.2.self_attn", lambda: logits(model, one)), first)


def test_padding_does_not_count():
    model = tiny.build("llama")
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    alone = {"input_ids": ids}
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones_like(ids)], dim=1),
        "position_ids": torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.arange(20)[None]], dim=1),
    }
    for name in ("kl", "contribution"):
        found = [ap.choose_attention(model, None, [given], RULE, score=name).scores for given in (alone, padded)]
        scores = [torch.tensor([one.score for one in scores]) for scores in found]
        torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-6)


def test_a_block_that_runs_twice_is_computed():
    model, one = tiny.build("llama"), row()
    model.model.layers[1] = model.model.layers[0]
    resumed = Resumed(model)
    first = resumed.first(lambda: logits(model, one))
    assert torch.equal(resumed.from_block("model.layers.2.self_attn", lambda: logits(model, one)), first)


def test_a_model_that_lends_keys_to_later_blocks_runs_whole():
    model = tiny.build("llama")
    model.model.layers[2].self_attn.is_kv_shared_layer = True
    assert Resumed(model)._blocks == {}
