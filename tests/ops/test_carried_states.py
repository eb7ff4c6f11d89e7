"""States carried over many chunks at once, against one chunk after another."""

import pytest
import torch

from attn_plugins.ops.recurrent import batched


@pytest.mark.parametrize("few", [1, 4, 32])
@pytest.mark.parametrize("shape", [(3, 3), (3, 1), (1, 1)], ids="by {}".format)
def test_states_and_gradients_equal_those_of_one_chunk_after_another(monkeypatch, few, shape):
    monkeypatch.setattr(batched, "FEW", few)
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3, 5, 8, 13, 77):
        sizes = ((2, 2, number, *shape), (2, 2, number, 3, 4), (2, 2, 3, 4))
        leaves = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
        by, added, state = leaves
        wanted = [state]
        for n in range(number):
            moved = by[:, :, n] @ wanted[-1] if shape[1] > 1 else by[:, :, n] * wanted[-1]
            wanted.append(moved + added[:, :, n])
        want, got = (torch.stack(wanted[:-1], dim=2), wanted[-1]), batched.carry_states(by, added, state)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in want]
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(x, leaves, cotangents) for x in (got, want)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("number", [5, 35])
def test_operators_keep_the_rules_of_torch(number):
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 2, number, 3, 3), (1, 2, number, 4, 3), (1, 2, 4, 3))
    by, added, state = (torch.randn(size, generator=generator) for size in sizes)
    transposed = by, added.mT, state.mT
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = tuple(x.detach().requires_grad_() for x in transposed)
    torch.library.opcheck(batched.carry_states, arguments, test_utils=checks)
    torch.library.opcheck(batched.carry_back, transposed, test_utils=checks)
