"""DeepSeek Sparse Attention beyond the contract: what its index starts from, what it chooses, what it learns from."""

import copy

import pytest
import tiny
import torch
from cases import SCALE, Case, head_shape, inputs, left_padding, rounds
from naive_forms import flash_linear_attention

import attn_plugins as ap
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.observe import own_attention
from attn_plugins.ops.reference import scores

CAUSAL = {"causal": True}


def made(*, noise=False, **options):
    case = Case(get_attention("dsa"), {"index_heads": 2, "index_dim": 16, "topk": 4, **options}, causal=True)
    return case.module() if noise else case.cls(case.cls.Config(**case.options), head_shape()).double()


def choice_of(module, given, mask):
    hidden = {"hidden_BQE": given.hidden.squeeze(1)} if module.wants_hidden else {}
    return module.choice_scores(given.q, given.k, mask=mask, scale=SCALE, **hidden)


@rounds("index_dim, index_heads", [(16, 1), (16, 4), (20, 3), (20, 6)])
def test_starts_from_the_mean_score_of_all_heads(index_dim, index_heads):
    given, mask = inputs(2, 13), AttentionMask(2, 13, 13, causal=True)
    got = choice_of(made(index_dim=index_dim, index_heads=index_heads), given, mask)
    want = scores(given.q, given.k, scale=SCALE).mean(1) + 8.0  # which relu passes, c
    torch.testing.assert_close(got, want.masked_fill(~mask.dense()[:, 0], -torch.inf))


def test_a_smaller_index_starts_near_the_mean_score():
    given, mask = inputs(1, 40, head_dim=32), AttentionMask(1, 40, 40, causal=False)
    cls = get_attention("dsa")
    module = cls(cls.Config(index_dim=32, index_heads=2), head_shape(head_dim=32)).double()
    want = scores(given.q, given.k, scale=SCALE).mean(1).flatten()
    assert torch.corrcoef(torch.stack([choice_of(module, given, mask).flatten(), want]))[0, 1] > 0.5


@rounds("form", ["reference", "torch", "batched"])
@rounds("index_input", ["query", "hidden"])
def test_heads_see_the_same_keys_of_highest_score(form, index_input):
    module, given = made(noise=True, index_input=index_input), inputs(2, 21)
    module.backend = form
    mask = AttentionMask(2, 21, 21, causal=True, padding_BK=left_padding([21, 15], 21))
    score = choice_of(module, given, mask)
    lowest = score.topk(4, dim=-1).values[..., -1:]
    chosen = ((score >= lowest) & mask.dense()[:, 0]).unsqueeze(1)
    want = scores(given.q, given.k, scale=SCALE).masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0.0)
    want = (want @ given.v.repeat_interleave(2, dim=1)).transpose(1, 2)
    real = mask.padding_BK[:, :, None, None]
    torch.testing.assert_close(given.run(module, mask) * real, want * real)


@rounds("form", ["reference", "torch", "batched"])
def test_of_equal_scores_the_earlier_are_chosen(form):
    module, given = made(), inputs(1, 30)
    module.backend = form
    with torch.no_grad():
        module.index_bias.fill_(-1e4)  # relu passes nothing: all scores are 0
    out = given.run(module, AttentionMask(1, 30, 30, causal=True))
    first = given.tokens(slice(4)).of_tokens()
    s = (given.q[:, :, 9:10] @ first[1].repeat_interleave(2, dim=1).mT * SCALE).softmax(-1)
    torch.testing.assert_close(out[:, 9:10], (s @ first[2].repeat_interleave(2, dim=1)).transpose(1, 2))


def llama(**options):
    torch.manual_seed(0)
    rule = {"type": "dsa", "topk": 6, "index_heads": 2, "index_dim": 8, **options}
    return ap.swap_attention(tiny.build("llama"), rule)


def batches(rows=2, length=24):
    ids = torch.randint(5, 90, (3, rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x} for x in ids]


def divergence(model, batch):
    """Of the softmax of index scores from the model's own weights, the mean of layers, written out."""
    found = []

    def see(call):
        hidden = {"hidden_BQE": call.options["hidden"]} if call.slot.wants_hidden else {}
        score = call.slot.choice_scores(call.query_BHQD, call.key_BGKD, mask=call.mask, scale=call.scale, **hidden)
        own = call.own_weights().mean(1)
        found.append(-(own * score.log_softmax(-1).masked_fill(own == 0, 0.0)).sum(-1).mean())

    with own_attention(model, see):
        model(**batch)
    return torch.stack(found).mean()


@pytest.mark.parametrize("index_input", ["query", "hidden"])
def test_the_index_learns_from_the_models_own_weights(index_input):
    model, given = llama(index_input=index_input), batches()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attn_plugin" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    untrained, before = copy.deepcopy(model), divergence(model, given[0])
    own = {name: weight.clone() for name, weight in model.named_parameters() if "attn_plugin" not in name}
    report = ap.transfer_attention(model, given, steps=12, learning_rate=3e-2, progress=False)
    torch.testing.assert_close(report.losses[0]["loss"], float(before.detach()), rtol=1e-3, atol=1e-3)
    assert divergence(model, given[0]) < before - 0.02
    assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in own.items())
    for name, weight in model.named_parameters():
        if "attn_plugin" in name:
            assert not torch.equal(weight, dict(untrained.named_parameters())[name]), name


def test_a_choice_for_some_heads_is_not_taught():
    model = llama(kv_heads=[0])
    with pytest.raises(
        ValueError, match=r"dsa learns its choice of keys from all heads .* allowed: a rule without kv_heads"
    ):
        ap.transfer_attention(model, batches(), steps=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk=0; allowed: an integer from 1 on"),
        ({"index_heads": 0}, "index_heads=0; allowed: an integer from 1 on"),
        ({"index_dim": 0}, "index_dim=0; allowed: an integer from 1 on"),
        ({"index_input": "value"}, "index_input='value'; allowed: 'query', 'hidden'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_attention("dsa").Config(**options)


def test_needs_the_sizes_of_the_heads():
    cls = get_attention("dsa")
    with pytest.raises(ValueError, match="'dsa' has weights of all heads and needs the sizes of the heads, got None"):
        cls(cls.Config())


@pytest.mark.peers
def test_equals_that_of_flash_linear_attention():
    # Of many index heads one scores above 0: of keys that are alike theirs are any.
    module = made(noise=True, topk=7, index_heads=24, index_input="hidden").float()
    given = inputs(2, 60).to(torch.float32)
    with torch.no_grad():
        module.index_bias.zero_()  # theirs has none
    index = module._index(given.q, given.k, 1.0, given.hidden.squeeze(1))
    theirs = flash_linear_attention("dsa").naive_dsa
    by_token = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    want = theirs(*by_token, index.query_BQJI, index.key_BKI, index.weight_BQJ, topk=7, scale=SCALE)
    torch.testing.assert_close(given.run(module, AttentionMask(2, 60, 60, causal=True)), want, rtol=1e-4, atol=1e-5)
