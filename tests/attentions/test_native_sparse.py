"""Native sparse attention against loops over pairs, its choice, its start; the contract is in test_contract.py."""

import pytest
import torch
from cases import SCALE, Case, assert_same, inputs, left_padding

from attn_plugins.attentions.native_sparse import NativeSparseAttention
from attn_plugins.benchmark.cost.timing import Workload, peak_bytes
from attn_plugins.ops.blocks import native_sparse as ops
from attn_plugins.ops.reference import dense_attention

SMALL = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "local_blocks": 1, "window_size": 5}


def native_sparse(causal=True, **options):
    return Case(NativeSparseAttention, options, causal)


def by_pairs(module, given, tokens, causal, b, group):
    """(len(tokens), 2, V): outputs of the two query heads of a group for one sequence, pair by pair."""
    c, q, k, v = (
        module.config,
        given.q[b, 2 * group : 2 * group + 2, tokens],
        *(x[b, group, tokens] for x in (given.k, given.v)),
    )
    length = len(tokens)
    firsts = range(0, length - c.kernel_size + 1, c.kernel_stride)
    compressed = [range(first, first + c.kernel_size) for first in firsts]
    blocks = [range(low, min(low + c.block_size, length)) for low in range(0, length, c.block_size)]
    out = torch.zeros(length, 2, v.shape[-1], dtype=v.dtype)

    def softmax(query, keys, values):
        return torch.stack([SCALE * (query @ key) for key in keys]).softmax(0) @ torch.stack(values)

    for i in range(length):
        seen = [block for block in compressed if not causal or block[-1] <= i]
        given_to = [0.0] * len(blocks)
        for h in range(2):
            gates = torch.sigmoid(
                module.gate_weight[2 * group + h] @ q[h, i]
                + torch.stack(
                    [x[2 * group + h] for x in (module.compressed_gate, module.selected_gate, module.window_gate)]
                )
            )
            if seen:
                keys = [sum(w * k[j] for w, j in zip(module.key_weight[group], block, strict=True)) for block in seen]
                values = [
                    sum(w * v[j] for w, j in zip(module.value_weight[group], block, strict=True)) for block in seen
                ]
                out[i, h] += gates[0] * softmax(q[h, i], keys, values)
                weights = torch.stack([SCALE * (q[h, i] @ key) for key in keys]).softmax(0).tolist()
                for weight, block in zip(weights, seen, strict=True):
                    for n, keys in enumerate(blocks):
                        given_to[n] += weight * len(set(block) & set(keys)) / c.kernel_size
        own = i // c.block_size
        always = {n for n in range(len(blocks)) if n < c.init_blocks or abs(n - own) < c.local_blocks} | {own}
        allowed = {n for n in range(len(blocks)) if n <= own or not causal}
        others = sorted(allowed - always, key=lambda n: -given_to[n])[: c.topk - len(always & allowed)]
        chosen = (always & allowed) | {n for n in others if given_to[n] > 0}
        for h in range(2):
            gates = torch.sigmoid(
                module.gate_weight[2 * group + h] @ q[h, i]
                + torch.stack(
                    [x[2 * group + h] for x in (module.compressed_gate, module.selected_gate, module.window_gate)]
                )
            )
            selected = [j for n in sorted(chosen) for j in blocks[n] if j <= i or not causal]
            near = [j for j in range(length) if abs(i - j) < c.window_size and (j <= i or not causal)]
            for gate, keys in ((gates[1], selected), (gates[2], near)):
                out[i, h] += gate * softmax(q[h, i], [k[j] for j in keys], [v[j] for j in keys])
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {"kernel_size": 5, "kernel_stride": 3, "block_size": 3, "topk": 4, "init_blocks": 2, "local_blocks": 1},
        {"kernel_size": 2, "kernel_stride": 4, "block_size": 5, "topk": 4, "init_blocks": 0, "window_size": 3},
    ],
)
@pytest.mark.parametrize("kind", ["whole", "left padding", "packed"])
def test_equals_the_three_branches_pair_by_pair(causal, options, kind):
    length = 33
    case, given = native_sparse(causal, **options), inputs(1, length)
    mask_options, sequences = {}, [range(length)]
    if kind == "left padding":
        mask_options, sequences = {"padding_BK": left_padding([length - 6], length)}, [range(6, length)]
    if kind == "packed":
        segments = (torch.arange(length) >= 19).long().unsqueeze(0)
        mask_options, sequences = {"segments_BK": segments}, [range(19), range(19, length)]
    module = case.module()
    with torch.no_grad():
        out = given.run(module, case.mask(1, length, length, **mask_options))
        for tokens in sequences:
            for group in range(2):
                want = by_pairs(module, given, list(tokens), causal, 0, group)
                got = out[0, list(tokens), 2 * group : 2 * group + 2]
                assert_same({"out": got}, {"out": want}, 1e-9)


def test_starts_close_to_its_selected_branch_and_to_softmax_where_that_sees_all():
    case, given = native_sparse(), inputs(1, 200)
    module = case.cls(case.cls.Config(), case.module().heads).double()
    mask = case.mask(1, 200, 200)
    out, want = given.run(module, mask), dense_attention(given.q, given.k, given.v, mask.dense(), scale=SCALE)[0]
    error = (out - want.transpose(1, 2)).norm() / want.norm()
    assert 0 < error < 0.04
    gates = torch.sigmoid(torch.stack([module.compressed_gate, module.selected_gate, module.window_gate]))
    torch.testing.assert_close(gates.sum(dim=0), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_tiles_of_any_size_give_the_same(monkeypatch):
    case, given = native_sparse(**SMALL), inputs(2, 40)
    mask = case.mask(2, 40, 40, padding_BK=left_padding([40, 29], 40))
    out = given.run(case.module(), mask)
    monkeypatch.setattr(ops, "SCORES_AT_ONCE", 500)
    assert_same({"out": given.run(case.module(), mask)}, {"out": out}, 1e-12)


def test_the_choice_is_made_once_a_tile(monkeypatch):
    case, given, calls = native_sparse(**SMALL), inputs(1, 40), []
    choose = ops.choose_by_weights
    monkeypatch.setattr(ops, "choose_by_weights", lambda *a, **options: calls.append(a) or choose(*a, **options))
    given.q.requires_grad_()
    given.run(case.module(), case.mask(1, 40, 40)).sum().backward()
    assert len(calls) == 1


def test_dropout_is_the_same_again_in_the_backward():
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    case, small = native_sparse(**SMALL), inputs(1, 12, **shape)
    module = case.module(**shape)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=case.mask(1, 12, 12), scale=SCALE, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (small.q, small.k, small.v)], fast_mode=True)


def test_compression_keeps_its_inputs_only_and_copies_no_key_twice():
    length, heads, size = 4096, 2, 16
    x_BGKD = torch.randn(1, length, heads, size).transpose(1, 2).requires_grad_()
    weight_GC, keys_BMC = torch.randn(heads, 32), torch.arange(length).unfold(0, 32, 8).unsqueeze(0)
    run = Workload(run=lambda: ops.compress(x_BGKD, weight_GC, keys_BMC).sum().backward(), count=1)
    assert peak_bytes([run], torch.device("cpu")) < 3 * x_BGKD.nbytes  # blocks overlap: their keys are 4 times as many


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0; allowed: an integer from 1 on"),
        ({"kernel_stride": 0}, "kernel_stride=0; allowed: an integer from 1 on"),
        ({"block_size": 0}, "block_size=0; allowed: an integer from 1 on"),
        ({"local_blocks": 0}, "local_blocks=0; allowed: an integer from 1 on"),
        ({"window_size": 0}, "window_size=0; allowed: an integer from 1 on"),
        ({"init_blocks": -1}, "init_blocks=-1; allowed: an integer from 0 on"),
        ({"topk": 3}, r"topk=3; allowed: init_blocks \+ 2 local_blocks - 1 = 4 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention.Config(**options)


def test_it_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="needs the sizes of the heads, got None"):
        NativeSparseAttention(NativeSparseAttention.Config())
