"""The one-forward score against its definition, computed by hand from weights and hidden states."""

import peft
import pytest
import tiny
import torch

import attn_plugins as ap
from attn_plugins.choice.blocks import block_of
from attn_plugins.data.recall import RecallRow
from attn_plugins.hf.observe import own_attention

RULE = {"type": "local", "window_size": 3, "num_sink_tokens": 1}


def row(length=24, seed=0):
    """Something at the beginning that comes again at the end."""
    ids = torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed))
    ids[-6:] = ids[1:7]
    return RecallRow(input_ids_N=ids, answers={"text": (8, length - 6), "copy": (length - 4, length)})


def windowed(query_BHQD, key_BGKD, value_BGKV, scale, *, causal, real_BK):
    """Softmax over the last 3 keys (3 to each side, where not causal) and the first one, (B, Q, H, V)."""
    heads, length = query_BHQD.shape[1], key_BGKD.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key_BGKD, value_BGKV))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance < 3) & (distance >= 0) if causal else distance.abs() < 3
    first = torch.arange(length) == 0
    allowed = (seen | (first & ((distance >= 0) | (not causal)))) & real_BK[:, None, None]
    scores = (query_BHQD @ key.mT * scale).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2)


def by_hand(model, given, queries, matrices, layers):
    """Scores by definition: ``matrices`` (E, H V) project, hidden states that enter a layer are the stream."""
    model = ap.swap_attention(model, RULE)
    calls = []
    with torch.no_grad(), own_attention(model, calls.append):
        stream = model(**given, output_hidden_states=True).hidden_states
    ap.restore_attention(model)
    real = given.get("attention_mask", torch.ones(calls[0].own_BQHV.shape[:2])).bool()
    rows = []
    for layer, call, matrix in zip(layers, calls, matrices, strict=True):
        out = windowed(
            *(call.query_BHQD, call.key_BGKD, call.value_BGKV), call.scale, causal=call.mask.causal, real_BK=real
        )
        change, size = out - call.own_BQHV, call.own_BQHV.shape[-1]
        groups = call.key_BGKD.shape[1]
        heads = change.shape[2] // groups
        rows.append([])
        for group in range(groups):
            columns = slice(group * heads * size, (group + 1) * heads * size)
            part = change[:, :, group * heads : (group + 1) * heads].flatten(2)
            ratio = (part @ matrix[:, columns].T).norm(dim=-1) / stream[layer].norm(dim=-1)
            rows[-1].append(float((ratio[0, queries] if queries else ratio[real]).mean()))
    return rows


def table(choice):
    rows = {}
    for one in choice.scores:
        rows.setdefault(one.layer, []).append(one.score)
    return list(rows.values())


def assert_same(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        ("llama", lambda model, n: model.model.layers[n].self_attn.o_proj.weight),
        ("gpt2", lambda model, n: model.transformer.h[n].attn.c_proj.weight.T),  # with a bias
        ("gpt_neox", lambda model, n: model.gpt_neox.layers[n].attention.dense.weight),
        ("opt", lambda model, n: model.model.decoder.layers[n].self_attn.out_proj.weight),
    ],
)
def test_a_decoder_at_recalled_tokens(kind, matrix):
    model, one = tiny.build(kind), row()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    choice = ap.choose_attention(model, None, [one], RULE)
    matrices = [matrix(model, n).detach() for n in range(3)]
    queries = [19, 20, 21, 22]  # from which tokens 20 to 23 are predicted
    expected = by_hand(model, {"input_ids": one.input_ids_N[None]}, queries, matrices, range(3))
    assert_same(table(choice), expected)


def test_an_encoder_whose_projection_is_around_the_module_at_all_real_tokens():
    model, given = tiny.build("bert"), tiny.inputs("bert")
    choice = ap.choose_attention(model, None, [given], RULE)
    matrices = [layer.attention.output.dense.weight.detach() for layer in model.bert.encoder.layer]
    assert_same(table(choice), by_hand(model, given, [], matrices, range(3)))


def test_a_layer_is_all_of_its_heads_together():
    model, one = tiny.build("llama"), row()
    heads = ap.choose_attention(model, None, [one], RULE)
    layers = ap.choose_attention(model, None, [one], RULE, 0.4, "layers")
    for parts, (whole,) in zip(table(heads), table(layers), strict=True):
        assert max(parts) / 2 < whole < sum(parts)


def test_lora_on_the_projection_counts():
    model, one = tiny.build("llama"), row()
    before = table(ap.choose_attention(model, None, [one], RULE))
    lora = peft.LoraConfig(target_modules=["o_proj"], r=2, lora_alpha=8, init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora)
    found = table(ap.choose_attention(tuned, None, [one], RULE))
    merged = tuned.merge_and_unload()
    assert_same(found, table(ap.choose_attention(merged, None, [one], RULE)))
    assert found != before


def test_samples_count_alike():
    model = tiny.build("llama")
    alone = [torch.tensor(table(ap.choose_attention(model, None, [row(seed=n)], RULE))) for n in range(2)]
    both = torch.tensor(table(ap.choose_attention(model, None, [row(seed=n) for n in range(2)], RULE)))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_cross_attention_and_windows_of_images_are_scored():
    model, given = tiny.build("whisper"), tiny.inputs("whisper")
    choice = ap.choose_attention(model, None, [given], {"type": "linear", "roles": ["cross", "decoder"]})
    assert {one.path.rsplit(".", 1)[1] for one in choice.scores} == {"self_attn", "encoder_attn"}
    assert len(choice.scores) == 16
    assert min(one.score for one in choice.scores) > 0


class Alone(torch.nn.Module):
    """Ends an attention without projecting its heads."""

    def forward(self, x):
        return x


def test_an_output_that_nothing_projects_is_refused():
    model = tiny.build("llama")
    model.model.layers[1].self_attn.o_proj = Alone()
    model.model.layers[1].mlp = Alone()
    with pytest.raises(
        ValueError, match=r"no layer projects the outputs of model\.layers\.1\.self_attn \(32 features\)"
    ):
        ap.choose_attention(model, None, [row()], RULE)
    assert ap.choose_attention(model, None, [row()], RULE, score="kl").scores


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.3.self_attn", "model.layers.3"),
        ("encoder.block.2.layer.0.SelfAttention", "encoder.block.2.layer.0"),
        ("bert.encoder.layer.11.attention.self", "bert.encoder.layer.11"),
        ("pooler.attention", "pooler"),
        ("attention", ""),
    ],
)
def test_the_block_around_a_module(path, block):
    assert block_of(path) == block
