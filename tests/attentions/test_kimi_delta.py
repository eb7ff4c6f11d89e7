"""Kimi Delta Attention beyond the contract and the tests that recurrences share."""

import torch
from cases import Case, assert_same, inputs, outcome, rounds

from attn_plugins.core.registry import get_attention


def made(name, **options):
    return Case(get_attention(name), {"chunk_size": 4, **options}, causal=True)


@rounds("form", ["reference", "torch", "batched"])
@rounds("gate_input", ["value", "hidden"])
def test_with_equal_gates_it_is_gated_delta(form, gate_input):
    """Where the map to gates has one row for all channels: outputs and the gradients of what both have."""
    scalar = made("gated_delta", gate_input=gate_input).module(backend=form)
    channels = made("kimi_delta", gate_input=gate_input, gate_low_rank_dim=1).module(backend=form)
    shared = ("score_weight", "average_weight", "beta_weight", "beta_bias", "A_log")
    with torch.no_grad():
        for name in shared:
            getattr(channels, name).copy_(getattr(scalar, name))
        channels.gate_down_weight.copy_(scalar.gate_weight.unsqueeze(1))
        channels.gate_up_weight.fill_(1.0)
        channels.dt_bias.copy_(scalar.dt_bias.unsqueeze(1).expand_as(channels.dt_bias))
    given, mask = inputs(2, 23), made("gated_delta").mask(2, 23, 23)
    cotangent = torch.randn(2, 23, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got, want = (outcome(module, given, mask, cotangent) for module in (channels, scalar))
    both = ["out", *(f"gradient to {name}" for name in ("q", "k", "v", "hidden", *shared))]
    assert_same({name: got[name] for name in both}, {name: want[name] for name in both}, 1e-9)
    torch.testing.assert_close(got["gradient to dt_bias"].sum(1), want["gradient to dt_bias"])


@rounds("form", ["reference", "torch", "batched"])
def test_a_channel_that_never_forgets_keeps_what_others_lose(form):
    """Keys along single channels: what the first token wrote is read where its channel is held, and only there."""
    case = made("kimi_delta", initial_beta=0.999999)
    module = case.cls(case.cls.Config(**case.options), case.module().heads, backend=form).double()
    with torch.no_grad():
        module.average_weight.zero_()
        module.dt_bias.fill_(20.0)  # e^-20 of a memory is left after a token
        module.dt_bias[:, 0] = -40.0
    given = inputs(1, 9)
    given.k.copy_(torch.eye(8)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7])])
    given.q.copy_(torch.eye(8)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 6])])
    out = given.run(module, case.mask(1, 9, 9))
    factor = 0.4 * 8**0.5  # the scale of the tests and the start of score_weight
    torch.testing.assert_close(out[0, 7, 0], factor * given.v[0, 0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[0, 8], torch.zeros_like(out[0, 8]), rtol=0, atol=1e-5)


def test_starts_equal_to_gated_delta():
    """So that what is measured of one, untrained, holds of the other."""
    heads, given = made("kimi_delta").module().heads, inputs(2, 40)
    starts = [cls(cls.Config(), heads).double() for cls in map(get_attention, ("kimi_delta", "gated_delta"))]
    assert starts[0].config.initial_memory == starts[1].config.initial_memory
    out, want = (given.run(module, made("gated_delta").mask(2, 40, 40)) for module in starts)
    torch.testing.assert_close(out, want)
