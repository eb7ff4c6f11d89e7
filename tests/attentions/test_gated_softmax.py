"""Gated attention: its start, its gates against a loop, a gate near 0."""

import pytest
import torch
from cases import EXACT, Case, inputs

from attn_plugins.attentions.gated_softmax import GatedSoftmaxAttention
from attn_plugins.attentions.softmax import SoftmaxAttention
from attn_plugins.core.mask import AttentionMask

GATES = [{"gate": "head"}, {"gate": "element"}]
MASK = AttentionMask(2, 11, 11, causal=True)


def plain(given):
    return given.run(Case(SoftmaxAttention, {}, True).module(), MASK)


@pytest.mark.parametrize("options", GATES, ids=str)
@torch.no_grad()
def test_each_head_is_gated_by_the_hidden_state_of_its_query(options):
    module, given = Case(GatedSoftmaxAttention, options, True).module(), inputs(2, 11)
    got, want = given.run(module, MASK), plain(given)
    entries = 1 if options["gate"] == "head" else 8
    for head in range(4):
        for entry in range(8):
            weight = module.gate_weight[head, :, entry % entries]
            gate = 2 / (1 + torch.exp(-(given.hidden[:, 0] @ weight)))
            torch.testing.assert_close(got[:, :, head, entry], gate * want[:, :, head, entry])


@pytest.mark.parametrize("options", GATES, ids=str)
def test_it_starts_at_the_model_and_learns_from_the_first_step(options):
    module, given = Case(GatedSoftmaxAttention, options, True).module(), inputs(2, 11)
    module.reset_parameters()
    out = given.run(module, MASK)
    assert torch.equal(out, plain(given))
    (gradient,) = torch.autograd.grad((out * torch.arange(8)).sum(), module.gate_weight)
    assert gradient[..., -1].abs().min() > 0


@torch.no_grad()
def test_a_closed_gate_adds_nothing():
    module, given = Case(GatedSoftmaxAttention, {}, True).module(), inputs(2, 11)
    module.gate_weight.copy_(-1e3 * torch.ones_like(module.gate_weight))
    given.hidden.abs_()
    assert given.run(module, MASK).abs().max() < EXACT
