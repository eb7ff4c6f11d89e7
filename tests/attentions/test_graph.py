"""Attention over a structure: exact against the dense mask whatever the structure, at the cost of its pairs."""

import copy

import pytest
import torch
from cases import CASES, Case, assert_forms_agree, head_shape, inputs, left_padding, outcome, rounds, seeded
from test_cost import Elements

from attn_plugins.backends.flex_masks import flex_mask
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.core.structure import Structure
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax import structured
from attn_plugins.ops.softmax.block_limits import MaskOfBlocks, visible_blocks
from attn_plugins.ops.softmax.patterns.all_pairs import AllPairs

N = 45


def random_edges(number, nodes=N, seed=0):
    return torch.randint(0, nodes, (number, 2), generator=seeded(seed))


STRUCTURES = {
    "graph": Structure.graph(random_edges(80), N),
    "directed": Structure.graph(random_edges(60), N, directed=True),
    "paths": Structure.graph(random_edges(30), N - 2, max_distance=3, num_global=2)
    if int(random_edges(30).max()) < N - 2
    else Structure.graph(random_edges(30, N - 2), N - 2, max_distance=3, num_global=2),
    "hub": Structure.graph(torch.stack([torch.zeros(N, dtype=torch.long), torch.arange(N)], 1), N),
    "blocks": Structure.blocks(torch.randint(-1, 4, (N,), generator=seeded(1))),
    "table": Structure.table(
        (torch.arange(N) - 5).div(8, rounding_mode="floor").clamp(min=-1),
        torch.where(torch.arange(N) < 5, -1, (torch.arange(N) - 5) % 8 // 2),
        (torch.arange(N) >= 5) & (torch.arange(N) < 13),
    ),
    "tree": Structure.tree([-1, *(int(torch.randint(0, i, (), generator=seeded(i))) for i in range(1, N))]),
    "sections": Structure.sections(torch.arange(N) // 13, window_size=4),
    "dense": Structure.dense(N),
    "nothing": Structure.blocks([-1] * N),
}
STRUCTURES["batch"] = Structure.stack([STRUCTURES["paths"], STRUCTURES["table"]])


def case_of(**options):
    return Case(get_attention("graph"), options, False)


def masked(structure, causal=False, **options):
    number = structure.num_tokens
    return AttentionMask(2, number, number, causal=causal, **options).with_structure(structure)


@pytest.mark.parametrize("backend", ["torch", "batched"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_equals_reference_with_padding(name, backend):
    for padding in (None, left_padding([N, 30], N), left_padding([40, N], N).flip(1)):
        mask = masked(STRUCTURES[name], padding_BK=padding)
        for options in ({}, {"num_labels": 4}):
            assert_forms_agree(case_of(**options), inputs(2, N), mask, backend=backend)


def test_the_reference_is_softmax_attention_under_the_dense_mask_plus_a_bias_a_label():
    structure, given = STRUCTURES["table"], inputs(2, N)
    case = case_of(num_labels=5)
    module, mask = case.module(backend="reference"), masked(structure)
    token = torch.arange(N)
    label = structure.labels(mask, token.view(1, -1, 1), token.view(1, 1, -1))
    bias = torch.zeros(2, 4, N, N, dtype=torch.float64)
    for number in range(5):
        bias = bias + (label == number).unsqueeze(1) * module.bias_HL[:, number].view(1, 4, 1, 1)
    want = dense_attention(given.q, given.k, given.v, mask.dense(), scale=0.4, position_bias=bias)[0]
    torch.testing.assert_close(given.run(module, mask).transpose(1, 2), want)


def test_extras_segments_and_precisions():
    bias = torch.randn(2, 4, N, N, generator=seeded(2), dtype=torch.float64)
    sinks = torch.randn(4, generator=seeded(3), dtype=torch.float64)
    given = inputs(2, N)
    given.extras = {"position_bias": bias, "softcap": 0.5, "sinks": sinks}
    segments = torch.arange(N).unsqueeze(0) // 20
    for name in ("paths", "sections", "batch"):
        mask = masked(STRUCTURES[name], segments_BK=segments)
        for backend in ("torch", "batched"):
            assert_forms_agree(case_of(num_labels=4), given, mask, backend=backend)
            tolerance = {"tolerance": 1e-2, "dtype": torch.bfloat16}
            rounded = inputs(2, N).to(torch.bfloat16).to(torch.float64)
            assert_forms_agree(case_of(num_labels=4), rounded, mask, backend=backend, **tolerance)


def test_pieces_of_any_size_equal_reference(monkeypatch):
    for size in (1, 700):
        monkeypatch.setattr(structured, "ON_CPU", size)
        for name in ("paths", "batch"):
            assert_forms_agree(case_of(num_labels=4), inputs(2, N), masked(STRUCTURES[name]))


def test_what_is_dropped_has_the_gradient_of_what_is_kept():
    """In float64 a difference quotient of the loss says what the gradient has to be."""
    module, given, mask = case_of(num_labels=4).module(), inputs(2, N), masked(STRUCTURES["batch"])
    cotangent = torch.randn(2, N, 4, 8, generator=seeded(5), dtype=torch.float64)

    def loss(shift=0.0):
        torch.manual_seed(3)
        moved = copy.deepcopy(module)
        with torch.no_grad():
            moved.bias_HL += shift
        return (given.run(moved, mask, dropout=0.3) * cotangent).sum()

    torch.manual_seed(3)
    gradient = outcome(module, given, mask, cotangent, dropout=0.3)["gradient to bias_HL"]
    direction = torch.randn(4, 4, generator=seeded(6), dtype=torch.float64)
    slope = (loss(1e-5 * direction) - loss(-1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)
    assert not torch.equal(given.run(module, mask, dropout=0.3), given.run(module, mask))


def test_biases_start_at_zero_where_nothing_has_changed():
    module = get_attention("graph")(get_attention("graph").Config(num_labels=4), head_shape())
    module.reset_parameters()
    given, mask = inputs(2, N).to(torch.float32), masked(STRUCTURES["table"])
    assert torch.equal(given.run(module, mask), given.run(case_of().module(dtype=torch.float32), mask))


def test_every_attention_for_any_mask_takes_a_structure_and_the_others_refuse_it():
    structure = STRUCTURES["batch"]
    seen = set()
    for case in CASES:
        if case.options and case.cls.name in seen:
            continue
        seen.add(case.cls.name)
        mask, given = masked(structure, case.causal), inputs(2, N)
        if case.cls.any_mask:
            padded = masked(structure, case.causal, padding_BK=left_padding([N, 33], N))
            assert_forms_agree(case, given, padded)
            assert_forms_agree(case, given, padded, backend="batched")
        else:
            with pytest.raises(ValueError, match=r"needs the structure of its input \(structure=\), which attention"):
                given.run(case.module(), mask)


@rounds("length", [256, 1024])
def test_no_tensor_of_all_pairs_is_made(length):
    """Cost follows the edges: four times the nodes at the same degree are four times the elements."""
    edges = random_edges(4 * length, length)
    structure = Structure.graph(edges, length, num_global=1)
    most = 0

    class Largest(Elements):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = super().__torch_dispatch__(func, types, args, kwargs)
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    most = max(most, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    tokens = structure.num_tokens
    given, module = inputs(1, tokens).to(torch.float32), case_of(num_labels=2).module(dtype=torch.float32)
    with Largest() as counted:
        mask = AttentionMask(1, tokens, tokens, causal=False).with_structure(structure)
        outcome(module, given, mask, torch.ones(1, tokens, 4, 8))
    assert most < tokens * tokens or length == 256
    MADE[length] = counted.number
    if length == 1024:
        assert MADE[1024] < 5 * MADE[256]


MADE = {}


@pytest.mark.parametrize("name", STRUCTURES)
def test_blocks_that_kernels_leave_out_hold_no_visible_pair(name):
    mask = masked(STRUCTURES[name], padding_BK=left_padding([N, 30], N))
    for size in (4, 16, 128):
        blocks = visible_blocks(MaskOfBlocks(mask), AllPairs(), size)
        number = -(-N // size)
        dense = mask.dense()[:, 0].expand(2, N, N)
        dense = torch.nn.functional.pad(dense, (0, number * size - N, 0, number * size - N))
        tiles = dense.unflatten(2, (number, size)).unflatten(1, (number, size)).transpose(2, 3)
        assert not (tiles.any(-1).any(-1) & ~blocks.some).any()
        assert not (~tiles.all(-1).all(-1) & blocks.every).any()
    if name in ("graph", "tree"):
        assert not visible_blocks(MaskOfBlocks(masked(STRUCTURES[name])), AllPairs(), 4).some.all(), (
            "it leaves some out"
        )


@pytest.mark.parametrize("name", STRUCTURES)
def test_flex_asks_one_pair_at_a_time_and_hears_the_same(name):
    mask = masked(STRUCTURES[name], causal=name == "tree", padding_BK=left_padding([N, 30], N))
    ask = flex_mask(mask, AllPairs()).mask_mod
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    row, token = torch.arange(2), torch.arange(N)
    asked = torch.vmap(ask, in_dims=(None, None, None, 0))
    asked = torch.vmap(torch.vmap(asked, in_dims=(None, None, 0, None)), in_dims=(0, None, None, None))
    with TransformGetItemToIndex():
        seen = asked(row, torch.tensor(0), token, token)
    assert torch.equal(seen, mask.dense()[:, 0].expand(2, N, N))


def test_a_call_with_too_many_labels_or_without_a_required_structure_is_refused():
    given = inputs(2, N)
    with pytest.raises(
        ValueError, match=r"attention 'graph' needs the structure of the input, .* give the model struc"
    ):
        given.run(case_of(required=True).module(), AttentionMask(2, N, N, causal=False))
    with pytest.raises(
        ValueError, match="the structure has 4 labels, and attention 'graph' has biases for num_labels=2"
    ):
        given.run(case_of(num_labels=2).module(), masked(STRUCTURES["table"]))
    with pytest.raises(ValueError, match="num_labels=3 needs to know how many heads there are"):
        get_attention("graph")(get_attention("graph").Config(num_labels=3))
    with pytest.raises(ValueError, match="num_labels=-1; allowed: an integer from 0 on"):
        get_attention("graph").Config(num_labels=-1)
