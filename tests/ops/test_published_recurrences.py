"""Recurrences beside published code: Qwen3-Next's, and the naive forms of flash-linear-attention."""

import functools
import inspect
import math

import pytest
import torch
from naive_forms import flash_linear_attention
from test_recurrent import SCALE, attention, counts, gates_of, prepared, run, tensors


def published_delta(module, given):
    """Arguments for a published delta rule, (B, T, H, .), which divides its queries by sqrt(D); and what ours adds."""
    tokens = prepared(module, *given)
    q = tokens.q * math.sqrt(tokens.q.shape[3])
    log_gate = gates_of(tokens)[..., 0]
    return [x.transpose(1, 2) for x in (q, tokens.k, tokens.v, log_gate, tokens.beta[..., 0])]


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_delta_rules_equal_those_of_qwen3_next(name):
    from transformers.models.qwen3_next import modeling_qwen3_next as published

    module = attention(name, 2, 2, noise=0.5, dtype=torch.float32)
    with torch.no_grad():
        module.average_weight.zero_()  # theirs has no average beside it
    given = tensors(2, 75, 75, 2, 2, dtype=torch.float32)
    got, (q, k, v, log_gate, beta) = run(module, *given), published_delta(module, given)
    for rule in (published.torch_chunk_gated_delta_rule, published.torch_recurrent_gated_delta_rule):
        rule = inspect.unwrap(rule)  # not the kernel that may be installed
        want, _ = rule(q, k, v, g=log_gate, beta=beta, initial_state=None, output_final_state=False)
        torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-4, atol=1e-5)
    # Theirs can normalise by itself, in the same way.
    raw = [x.transpose(1, 2) for x in given]
    want, _ = inspect.unwrap(published.torch_recurrent_gated_delta_rule)(
        *raw, g=log_gate, beta=beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True
    )
    factor = SCALE * math.sqrt(8) * module.score_weight.view(-1, 1)
    torch.testing.assert_close(got.transpose(1, 2), factor * want, rtol=1e-4, atol=1e-5)


@pytest.mark.peers
def test_averages_equal_those_of_flash_linear_attention():
    given = tensors(2, 75, 75, 2, 2, dtype=torch.float32)
    for name in ("retention", "gated_linear"):
        module = attention(name, 2, 2, noise=0.3, dtype=torch.float32)
        # Theirs are sums: ours are divided by the decayed number of tokens, which the queries can bring along.
        tokens = prepared(module, *given)
        q = tokens.q / counts(gates_of(tokens)) * math.sqrt(tokens.q.shape[3])
        if name == "retention":
            want = flash_linear_attention("retention").naive_retention(q, tokens.k, tokens.v)
        else:
            theirs = flash_linear_attention("gla").naive_recurrent_gla
            want = theirs(*(x.transpose(1, 2) for x in (q, tokens.k, tokens.v, tokens.log_gate)))[0].transpose(1, 2)
        torch.testing.assert_close(run(module, *given), want, rtol=1e-4, atol=1e-5)


@pytest.mark.peers
def test_delta_rules_equal_those_of_flash_linear_attention():
    given = tensors(2, 96, 96, 2, 2, dtype=torch.float32)
    for name in ("delta", "gated_delta", "kimi_delta"):
        module = attention(name, 2, 2, noise=0.5, dtype=torch.float32)
        with torch.no_grad():
            module.average_weight.zero_()  # theirs has no average beside it
        got, (q, k, v, log_gate, beta) = run(module, *given), published_delta(module, given)
        if name == "delta":
            theirs = flash_linear_attention("delta_rule")
            heads_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
            wanted = [rule(*heads_first)[0] for rule in (theirs.delta_rule_recurrence, theirs.delta_rule_chunkwise)]
        elif name == "kimi_delta":
            theirs = flash_linear_attention("kda")
            log_gate = gates_of(prepared(module, *given))[..., :-1].transpose(1, 2)  # the last is the average's
            wanted = [
                rule(q, k, v, log_gate, beta)[0].transpose(1, 2)
                for rule in (theirs.naive_recurrent_kda, functools.partial(theirs.naive_chunk_kda, chunk_size=32))
            ]
        else:
            theirs = flash_linear_attention("gated_delta_rule")
            rules = (theirs.naive_recurrent_gated_delta_rule, theirs.naive_chunk_gated_delta_rule)
            wanted = [rule(q, k, v, beta=beta, g=log_gate)[0].transpose(1, 2) for rule in rules]
        for want in wanted:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
