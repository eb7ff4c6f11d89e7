"""Rows of weights for chosen queries, read off the form of the promised cost: exact for every attention."""

import pytest
import torch
from cases import EXACT, SCALE, every_case, inputs, left_padding

from attn_plugins.core.mask import AttentionMask
from attn_plugins.inspection.rows import Weighing

QUERIES = [0, 5, 14, 15, 22]


def weighing(given, module, mask):
    hidden = {"hidden": given.hidden.squeeze(1)} if module.wants_hidden else {}

    def attend(value):
        return module(given.q, given.k, value, mask=mask, scale=SCALE, gates_of=given.v, **hidden)[0]

    return Weighing.of(attend, given.v)


def assert_rows_give_the_output(module, given, mask, queries):
    """Of every head, by values of the same and of another size than these are many."""
    with torch.no_grad():
        out, weights = given.call(module, mask, need_weights=True)
        out = out.transpose(1, 2)[:, :, queries]
    if not module.linear_in_values:
        off = (weights[:, :, queries] @ given.v.repeat_interleave(2, dim=1) - out).abs().max()
        assert off > 1e-3, "its output is that of its weights: leave out `linear_in_values = False`"
        return
    heads = [3, 0, 1]
    rows = weighing(given, module, mask).rows(queries, heads)
    real = torch.ones(1, len(queries), dtype=torch.bool)
    if mask.padding_BK is not None and not mask.cross:
        real = mask.padding_BK[:, mask.kv_length - mask.q_length :][:, queries]
    from_rows = rows @ given.v.repeat_interleave(2, dim=1)[:, heads]
    told = "rows of weights times values are not the output: set `linear_in_values = False`"
    for got, want in ((from_rows, out[:, heads]), (rows, weights[:, heads][:, :, queries])):
        off = (got - want).mul(real[:, None, :, None]).abs().max().item()
        assert off <= EXACT, f"{told} (differ by {off:.1e})"


@every_case()
def test_rows_of_weights_give_the_output(case):
    given, mask = inputs(2, 23), case.mask(2, 23, 23, padding_BK=left_padding([23, 14], 23))
    assert_rows_give_the_output(case.module(), given, mask, QUERIES)


@every_case(cross=True)
def test_rows_of_weights_give_the_output_of_cross_attention(case):
    given = inputs(2, 9, 17)
    mask = AttentionMask(2, 9, 17, causal=False, cross=True, padding_BK=left_padding([17, 6], 17))
    assert_rows_give_the_output(case.module(), given, mask, [0, 4, 8])


@every_case(causal=True, subquadratic=True, options={})
def test_rows_come_in_any_number(case):
    """More than a value has dimensions; those of a forward in the batched form are the same."""
    given, mask = inputs(1, 30), case.mask(1, 30, 30)
    if not case.module().linear_in_values:
        return
    queries = list(range(29, -1, -1))
    rows = weighing(given, case.module(), mask).rows(queries, [2])
    again = weighing(given, case.module(backend="batched"), mask).rows(queries[3:5], [2])
    torch.testing.assert_close(rows[:, :, 3:5], again, rtol=0, atol=EXACT)
    whole = given.call(case.module(), mask, need_weights=True)[1]
    torch.testing.assert_close(rows, whole[:, [2]][:, :, queries], rtol=0, atol=EXACT)


@pytest.mark.parametrize("reads", [True, False])
def test_gates_made_of_values_are_held(reads):
    """Values that change with the gates held scale the output; with gates made of them anew they do not."""
    from attn_plugins.core.registry import get_attention

    cls = get_attention("gated_delta")
    case = next(one for one in test_rows_of_weights_give_the_output.pytestmark[0].args[1] if one.cls is cls)
    given, module, mask = inputs(1, 12), case.module(), case.mask(1, 12, 12)
    assert module.gated_by_values
    held = {"gates_of": given.v} if reads else {}
    out, doubled = (
        module(given.q, given.k, factor * given.v, mask=mask, scale=SCALE, **held)[0] for factor in (1.0, 2.0)
    )
    assert torch.allclose(doubled, 2 * out) == reads
