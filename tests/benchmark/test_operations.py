"""What is asked of a device is counted: each operation, the inside of operators, bytes, products, and every sync."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attn_plugins.benchmark.cost.operations import counted
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention

HERE = "test_operations.py:"


def test_operations_are_counted_and_views_and_allocations_are_not():
    x = torch.ones(2, 3, 4)
    with counted() as found:
        y = x.transpose(1, 2).unsqueeze(0).expand(5, -1, -1, -1)[..., :2]
        torch.empty(7)
        (y + 1).unflatten(0, (5, 1)).mul_(2).detach()
    assert found.names == {"add": 1, "mul_": 1}
    assert not found.syncs


def test_backward_passes_are_counted():
    x = torch.ones(3, requires_grad=True)
    with counted() as found:
        x.exp().mul(2).backward(torch.ones(3))
    assert found.names == {"exp": 1, "mul": 3, "ones": 1}


def test_bytes_and_arithmetic_of_products():
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    with counted() as found:
        a @ b
        a + 1
    product, addition = found.launches
    assert (product.flops, product.bytes) == (2 * 2 * 3 * 4 * 5, 4 * (24 + 40 + 30))
    assert product.dtype == torch.float32
    assert (addition.flops, addition.bytes, addition.dtype) == (0, 4 * 48, None)
    assert (found.flops, found.bytes) == (product.flops, product.bytes + addition.bytes)


def test_what_is_gathered_or_expanded_is_read_once():
    x, index = torch.ones(1000, 8), torch.arange(3)
    with counted() as found:
        x[index]
        torch.ones(1, 8).expand(1000, 8).add(1)
    gathered, _, added = found.launches
    assert gathered.bytes == 2 * 3 * 8 * 4 + 3 * 8
    assert added.bytes == 8 * 4 + 1000 * 8 * 4


def test_solving_counts_as_the_product_that_it_is():
    with counted() as found:
        torch.linalg.solve_triangular(torch.eye(4).expand(3, 4, 4), torch.ones(3, 4, 2), upper=False)
    assert found.flops == 3 * 4 * 4 * 2


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: 1 if x[0] else 0,
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.unique_consecutive(x),
        lambda x: x.bincount(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.linalg.inv(torch.eye(2)),
    ],
)
def test_every_sync_is_found_where_it_is(waits):
    with counted() as found:
        waits(torch.arange(1, 4))
    ((where, number),) = found.syncs.items()
    assert number == 1
    assert f" at {HERE}{waits.__code__.co_firstlineno}" in where


def test_what_has_a_known_size_is_no_sync():
    x = torch.arange(1, 4)
    with counted() as found:
        x.repeat_interleave(x, output_size=6)
        x.repeat_interleave(2)
        x[torch.arange(2)]
        torch.where(x > 0, x, 0)
        x.sort()
    assert not found.syncs


def test_operators_of_the_package_are_looked_into():
    heads = HeadShape(num_heads=1, num_key_value_heads=1, head_dim=4, value_dim=4)
    cls = get_attention("linear")
    module, tensors = cls(cls.Config(), heads), [torch.ones(1, 1, 8, 4, requires_grad=True) for _ in range(3)]
    with counted() as found:
        module(*tensors, mask=AttentionMask(1, 8, 8, causal=True), scale=1.0)[0].sum().backward()
    assert found.names["bmm"] + found.names["baddbmm"] + found.names["mm"] > 4
    assert not any("causal_linear" in name for name in found.names)


def test_fake_tensors_are_counted_as_real_ones():
    def work(x):
        return (x @ x.mT).softmax(-1).sum()

    with counted() as real:
        work(torch.ones(4, 8))
    with FakeTensorMode(), counted() as fake:
        work(torch.ones(4, 8))
    assert real.launches == fake.launches
