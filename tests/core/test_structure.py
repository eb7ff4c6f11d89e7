"""Structures show exactly the pairs that their definitions name, each with its label, alone and in batches."""

import itertools

import pytest
import torch
from cases import seeded
from torch.distributed.utils import _apply_to_tensors

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.relations import ReaderOfRows
from attn_plugins.core.structure import Structure
from attn_plugins.ops.softmax import structured


def pairs(structure):
    """(B, N, N): who sees whom, as a mask of it says."""
    rows, tokens = structure.batch_size, structure.num_tokens
    mask = AttentionMask(rows, tokens, tokens, causal=False).with_structure(structure)
    return mask.dense().squeeze(1).expand(rows, tokens, tokens)


def labels(structure):
    token = torch.arange(structure.num_tokens)
    mask = AttentionMask(structure.batch_size, len(token), len(token), causal=False)
    found = structure.labels(mask, token.view(1, -1, 1), token.view(1, 1, -1))
    return found.expand(structure.batch_size, len(token), len(token))


def of_definition(number, sees):
    return torch.tensor([[bool(sees(i, j)) for j in range(number)] for i in range(number)])[None]


EDGES = [(0, 3), (3, 1), (5, 5), (2, 4), (0, 3), (6, 0), (4, 6)]


def steps_between(edges, number):
    """Length of the shortest path between nodes, by Floyd and Warshall."""
    distance = torch.full((number, number), 10**6).fill_diagonal_(0)
    for i, j in edges:
        if i != j:
            distance[i, j] = distance[j, i] = 1
    for k, i, j in itertools.product(range(number), repeat=3):
        distance[i, j] = min(distance[i, j], distance[i, k] + distance[k, j])
    return distance


def test_a_graph_shows_neighbours_in_both_directions_or_in_that_of_its_messages():
    both = Structure.graph(EDGES, 8)
    assert torch.equal(pairs(both), of_definition(8, lambda i, j: i == j or (i, j) in EDGES or (j, i) in EDGES))
    directed = Structure.graph(torch.tensor(EDGES), 8, directed=True)
    assert torch.equal(pairs(directed), of_definition(8, lambda i, j: i == j or (j, i) in EDGES))
    assert torch.equal(pairs(Structure.graph([], 3)), torch.eye(3, dtype=torch.bool)[None])


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_a_graph_shows_nodes_within_a_distance_which_is_their_label(most):
    structure, distance = Structure.graph(EDGES, 8, max_distance=most), steps_between(EDGES, 8)
    assert torch.equal(pairs(structure)[0], distance <= most)
    assert torch.equal(labels(structure)[0], torch.where(distance <= most, distance, -1))


def test_labels_of_edges_are_those_given():
    structure = Structure.graph([(0, 1), (1, 2)], 3, edge_labels=[5, 2], directed=True)
    assert labels(structure)[0].tolist() == [[0, -1, -1], [5, 0, -1], [-1, 2, 0]]
    assert structure.num_labels == 6


def test_global_tokens_see_all_and_are_seen_by_all_without_a_label():
    structure = Structure.graph([(0, 1)], 3, num_global=2)
    seen = of_definition(5, lambda i, j: i < 2 or j < 2 or i == j or {i, j} == {2, 3})
    assert torch.equal(pairs(structure), seen)
    assert labels(structure)[0].tolist() == [
        [-1] * 5,
        [-1] * 5,
        [-1, -1, 0, 1, -1],
        [-1, -1, 1, 0, -1],
        [-1, -1, -1, -1, 0],
    ]


def test_blocks_show_tokens_of_the_same_number_wherever_they_stand():
    ids = [2, 0, -1, 2, 0, 7]
    assert torch.equal(pairs(Structure.blocks(ids)), of_definition(6, lambda i, j: ids[i] == ids[j] >= 0))
    assert pairs(Structure.dense(4)).all()


ROWS = [-1, -1, 0, 0, 1, 1, 2, 2, -1]
COLUMNS = [-1, -1, 0, 1, 0, 1, 0, 1, -1]
HEADERS = [0, 0, 1, 1, 0, 0, 0, 0, 0]


def cell_sees(i, j):
    asks = [ROWS[t] < 0 and COLUMNS[t] < 0 for t in (i, j)]
    return any(asks) or ROWS[i] == ROWS[j] or COLUMNS[i] == COLUMNS[j] or HEADERS[j]


def test_a_cell_sees_its_row_its_column_headers_and_the_question():
    structure = Structure.table(ROWS, COLUMNS, HEADERS)
    assert torch.equal(pairs(structure), of_definition(9, cell_sees))
    assert not pairs(structure)[0, 4, 7], "another row and another column"
    assert labels(structure)[0, 4].tolist() == [0, 0, 2, 3, 1, 1, 2, -1, 0]


def test_tapas_tells_the_table_by_its_token_types():
    types = torch.zeros(2, 10, 7, dtype=torch.long)
    cells = torch.tensor(ROWS) >= 0
    types[:, :9, 0] = cells
    types[:, :9, 1] = (torch.tensor(COLUMNS) + 1) * cells
    types[:, :9, 2] = torch.tensor(ROWS) * cells
    real = torch.ones(2, 10)
    real[:, 9] = 0
    structure = Structure.table_from_tapas(types, real)
    assert structure.batch_size == 2
    for row in pairs(structure):
        assert torch.equal(row[:9, :9], of_definition(9, cell_sees)[0])
        assert not row[9].any()
        assert not row[:, 9].any()
    assert pairs(Structure.table_from_tapas(types))[0, 9].all(), "without a mask padding looks like the question"


PARENTS = [-1, 0, 0, 1, 1, 2, 3, -1, 7]


def above(node, levels=99):
    found = []
    while PARENTS[node] >= 0 and len(found) < levels:
        node = PARENTS[node]
        found.append(node)
    return found


@pytest.mark.parametrize(
    ("up", "down", "siblings"), [(None, 1, True), (1, None, False), (0, 2, True), (2, 0, False), (None, None, True)]
)
def test_a_tree_shows_nodes_above_and_below_and_siblings(up, down, siblings):
    structure = Structure.tree(PARENTS, ancestors=up, descendants=down, siblings=siblings)

    def label(i, j):
        if siblings and i != j and PARENTS[i] == PARENTS[j] >= 0:
            return 3
        if i == j:
            return 0
        if j in above(i, 99 if up is None else up):
            return 1
        return 2 if i in above(j, 0) or i in above(j, 99 if down is None else down) else -1

    want = torch.tensor([[label(i, j) for j in range(9)] for i in range(9)])
    assert torch.equal(labels(structure)[0], want)
    assert torch.equal(pairs(structure)[0], want >= 0)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_sections_show_a_window_and_the_tokens_of_sections_which_see_all_of_theirs(window):
    ids = [0] * 6 + [1] * 9 + [-1] + [2] * 4
    first = {0, 6, 16}
    structure = Structure.sections(ids, window_size=window)

    def sees(i, j):
        own = ids[i] == ids[j] >= 0 and (window is None or i in first or abs(i - j) < window)
        return own or (ids[i] >= 0 and j in first)

    assert torch.equal(pairs(structure), of_definition(20, sees))
    given = torch.tensor([token in first for token in range(20)])
    assert torch.equal(pairs(Structure.sections(ids, window_size=window, section_tokens=given)), pairs(structure))


def every_kind():
    edges = torch.randint(0, 20, (30, 2), generator=seeded(0))
    return [
        Structure.graph(edges, 20),
        Structure.graph(edges, 20, max_distance=2, num_global=1),
        Structure.blocks(torch.arange(17) // 4),
        Structure.table(ROWS, COLUMNS, HEADERS),
        Structure.tree(PARENTS, num_global=2),
        Structure.sections(torch.arange(30) // 9, window_size=3),
        Structure.dense(5),
        Structure.graph([], 12),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_shows_what_each_row_does_and_nothing_of_padding(side):
    rows = every_kind()
    batch = Structure.stack(rows, 33, side)
    assert (len(batch), batch.num_tokens) == (len(rows), 33)
    for row, seen, label, again in zip(rows, pairs(batch), labels(batch), batch.rows(), strict=True):
        number = row.num_tokens
        real = slice(0, number) if side == "right" else slice(33 - number, 33)
        assert torch.equal(seen[real, real], pairs(row)[0])
        assert torch.equal(label[real, real], labels(row)[0])
        assert seen.sum() == pairs(row).sum()
        assert torch.equal(pairs(again)[0], seen)


def test_the_union_of_two_shows_what_either_does():
    one, other = Structure.graph(EDGES, 8), Structure.blocks([0, 0, 0, 1, 1, -1, 2, 2])
    assert torch.equal(pairs(one | other), pairs(one) | pairs(other))
    with pytest.raises(ValueError, match="allowed: two of the same size"):
        one | Structure.dense(3)
    with pytest.raises(ValueError, match="one list of edges"):
        one | one


def test_the_number_of_pairs_bounds_those_that_are_visible():
    for structure in every_kind():
        assert structure.num_pairs >= int(pairs(structure).sum())
    assert Structure.graph(EDGES, 8).num_pairs == int(pairs(Structure.graph(EDGES, 8)).sum())


def test_rules_for_transformers_say_the_same_under_vmap():
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    batch = Structure.stack(every_kind())
    token = torch.arange(batch.num_tokens)

    def rule(row, q, k):
        return batch.shows(ReaderOfRows(row), q, k)

    for each in (token, torch.arange(len(batch))):
        rule = torch.vmap(rule, in_dims=(None, None, 0) if each is token else (0, None, None), out_dims=0)
    seen = torch.vmap(lambda row, q, k: batch.shows(ReaderOfRows(row), q, k), in_dims=(None, None, 0))
    seen = torch.vmap(torch.vmap(seen, in_dims=(None, 0, None)), in_dims=(0, None, None))
    with TransformGetItemToIndex():
        assert torch.equal(seen(torch.arange(len(batch)), token, token), pairs(batch))


def test_masks_combine_with_a_structure_and_never_make_it_dense():
    structure = Structure.graph(EDGES, 8)
    padding = torch.tensor([[True] * 6 + [False] * 2])
    mask = AttentionMask(1, 8, 8, causal=True, padding_BK=padding).with_structure(structure)
    assert not mask.plain
    assert torch.equal(mask.dense()[0], pairs(structure) & torch.ones(8, 8, dtype=torch.bool).tril() & padding)
    q, k = torch.tensor([[3, 4, 0]]), torch.tensor([[0, 2, 6]])
    assert mask.visible(q, k).tolist() == [[True, True, False]]
    assert torch.equal(mask.with_structure(None).dense()[0, 0], padding & torch.ones(8, 8, dtype=torch.bool).tril())
    assert "structure" in repr(mask)


def test_it_moves_with_the_mask_and_keeps_its_tables_on_the_host():
    structure = Structure.graph(EDGES, 8)
    moved = structure.to("meta")
    assert moved.device.type == "meta"
    assert moved.to("meta") is moved
    assert structure.to("meta") is moved
    assert moved.to("cpu") is structure is moved.host
    assert AttentionMask(1, 8, 8, causal=False).with_structure(structure).to("meta").structure is moved


def test_it_is_made_on_the_host_whatever_device_is_the_default():
    """As under torch.set_default_device; on meta whatever is read from such a tensor raises."""

    def made():
        parts = [
            Structure.graph(EDGES, 8, max_distance=2, num_global=1),
            Structure.table([-1, 0, 0], [-1, 0, 1], [0, 1, 1]),
            Structure.table_from_tapas([[0] * 7, [1, 1, 1, 0, 0, 0, 0]], [1, 1]),
            Structure.tree([-1, 0, 0]),
            Structure.sections([0, 0, 1, 1], window_size=2, section_tokens=[1, 0, 1, 0]),
            Structure.dense(2),
        ]
        return Structure.stack(parts)

    mask = AttentionMask(6, 9, 9, causal=False, device="cpu")
    want = mask.with_structure(made())
    with torch.device("meta"):
        got = mask.with_structure(made())
        places = structured._places(got.structure)
    assert got.structure.num_pairs == want.structure.num_pairs
    assert torch.equal(got.dense(), want.dense())
    for one, other in zip(places, structured._places(want.structure), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_fsdp_casts_what_is_among_a_models_inputs():
    """It takes dataclasses apart, and makes them anew."""
    structure = Structure.graph(EDGES, 8)
    again = _apply_to_tensors(lambda tensor: tensor.clone(), {"structure": structure})["structure"]
    assert torch.equal(pairs(again), pairs(structure))


def test_paths_end_where_all_nodes_are_reached():
    far = Structure.graph(EDGES, 8, max_distance=10**9)
    assert torch.equal(pairs(far), pairs(Structure.graph(EDGES, 8, max_distance=8)))
    assert torch.equal(pairs(Structure.graph([], 3, max_distance=2)), torch.eye(3, dtype=torch.bool)[None])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Structure.graph([(0, 9)], 4), "edges has nodes from 0 to 9; allowed: 0 to 3"),
        (lambda: Structure.graph([0, 1, 2], 4), r"edges is of shape \(3,\); allowed: \(E, 2\)"),
        (lambda: Structure.graph([[0.5, 1.0]], 4), "edges is of dtype torch.float32; allowed: whole numbers"),
        (lambda: Structure.graph(EDGES, 8, max_distance=0), "max_distance=0; allowed: an integer from 1 on"),
        (lambda: Structure.graph(EDGES, 8, edge_labels=[1]), r"edge_labels is of shape \(1,\)"),
        (lambda: Structure.graph(EDGES, 8, edge_labels=[0] * 7), r"its least is 0; allowed: \(7,\), from 1 on"),
        (lambda: Structure.graph(EDGES, 8, edge_labels=[1] * 7, max_distance=2), "max_distance=2 shows paths"),
        (lambda: Structure.graph(EDGES, 8, num_global=-1), "num_global=-1; allowed: an integer from 0 on"),
        (lambda: Structure.blocks([[0, 1]]), r"block_ids is of shape \(1, 2\); allowed: \(N,\)"),
        (lambda: Structure.table([0, 1], [0]), r"rows, columns and headers are of shapes \(2,\), \(1,\), \(2,\)"),
        (lambda: Structure.table_from_tapas([1, 2]), r"token_type_ids is of shape \(2,\); allowed: \(N, 7\)"),
        (lambda: Structure.table_from_tapas([[0] * 7], [[1, 1]]), r"attention_mask is of shape \(1, 2\) beside"),
        (lambda: Structure.tree([5]), "parents has 5 to 5; allowed: -1 for a root, or 0 to 0"),
        (lambda: Structure.tree([-2, 0]), "parents has -2 to 0; allowed: -1 for a root, or 0 to 1"),
        (lambda: Structure.tree([1, 0]), "parents has a circle that node"),
        (lambda: Structure.tree([-1], ancestors=-2), "ancestors=-2; allowed: None or an integer from 0 on"),
        (lambda: Structure.sections([0], window_size=0), "window_size=0; allowed: None or an integer from 1 on"),
        (lambda: Structure.sections([0], section_tokens="last"), "section_tokens='last'; allowed: 'first'"),
        (lambda: Structure.sections([0], section_tokens=[True, False]), r"section_tokens is of shape \(2,\)"),
        (lambda: Structure.stack([]), "got no structure to stack"),
        (lambda: Structure.stack([Structure.dense(4)], 3), "num_tokens=3; allowed: 4 or more"),
        (lambda: Structure.dense(4).pad(3), "allowed: 4 or more"),
        (lambda: Structure.dense(4).pad(5, "middle"), "padding side 'middle'; allowed: 'left', 'right'"),
        (
            lambda: AttentionMask(2, 4, 4, causal=False).with_structure(Structure.dense(5)),
            "the structure is of 1 rows of 5 tokens, and the attention has 2 rows of 4 queries and 4 keys",
        ),
    ],
)
def test_what_is_no_structure_is_refused(make, error):
    with pytest.raises(ValueError, match=error):
        make()
