"""Differential attention: the two forms against loops over pairs, and where each starts."""

import math

import pytest
import torch
from cases import SCALE, Case, head_shape, inputs

from attn_plugins.attentions.differential import DifferentialAttention
from attn_plugins.ops.reference import dense_attention


def maps(given, mask):
    """Softmax attention maps of each query head, (B, H, Q, K)."""
    return dense_attention(given.q, given.k, given.v, mask.dense(), scale=SCALE)[1]


@pytest.mark.parametrize("form", ["pretrained", "paper"])
def test_pairs_of_heads(form):
    case = Case(DifferentialAttention, {"form": form, "chunk_size": 4}, True)
    given, mask, module = inputs(2, 11), case.mask(2, 11, 11), case.module()
    weight = torch.exp(module.lambda_q1 @ module.lambda_k1) - torch.exp(module.lambda_q2 @ module.lambda_k2)
    if form == "paper":
        start = 0.8 - 0.6 * math.exp(-0.3)  # of layer 1
        weight = weight + start
    a, v, want = maps(given, mask), given.v.repeat_interleave(2, dim=1), []
    for first in (0, 2):
        one = a[:, first] - weight * a[:, first + 1]
        other = one if form == "paper" else a[:, first + 1] - weight * a[:, first]
        pair = torch.cat([one @ v[:, first], other @ v[:, first + 1]], dim=2)
        if form == "paper":
            pair = pair / (pair.square().mean(dim=2, keepdim=True) + 1e-5).sqrt() * module.norm_weight * (1 - start)
        want += [pair[..., :8], pair[..., 8:]]
    torch.testing.assert_close(given.run(module, mask), torch.stack(want, dim=2))


def test_lambda_starts_where_the_form_says_in_each_layer():
    for layer in (0, 1, 7):
        heads = head_shape()
        object.__setattr__(heads, "layer", layer)
        paper = DifferentialAttention(DifferentialAttention.Config(form="paper"), heads)
        assert paper.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * layer))
        assert DifferentialAttention(DifferentialAttention.Config(), heads)._weight(torch.float64) == 0
    for weight in (paper.lambda_q1, paper.lambda_k2):
        assert weight.norm().item() == pytest.approx(0.1 * 8**0.5)


def test_all_four_vectors_learn_from_the_start():
    case = Case(DifferentialAttention, {}, True)
    module, given, mask = (
        DifferentialAttention(case.cls.Config(), head_shape()).double(),
        inputs(1, 9),
        case.mask(1, 9, 9),
    )
    given.run(module, mask).square().sum().backward()
    assert all(weight.grad.any() for weight in module.parameters())
