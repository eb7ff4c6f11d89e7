"""What attentions declare of weights that go by head holds: processes that share heads get what one gets."""

import copy
import fnmatch

import pytest
import torch
from cases import Case, Inputs, every_case, every_class, inputs, rounds

from attn_plugins.core.learned_choice import LearnsChoice


@every_class()
def test_attentions_of_this_package_declare_which_weights_go_by_head(cls):
    if not cls.__module__.startswith("attn_plugins."):
        pytest.skip("of another package, which need not")
    for options in cls.examples:
        module = Case(cls, options, cls.causal).module()
        if isinstance(module, LearnsChoice):
            continue  # all heads make one choice: it is refused where processes share them
        assert module.head_weights is not None or not module.needs_all_heads


@every_case()
@rounds("form", ["torch", "batched", "reference"])
def test_what_it_declares_of_its_weights_leaves_it_the_heads_of_one_process(case, form):
    """Half of the weights that go by head and all others make half of the heads, as under tensor parallelism."""
    given, module = inputs(2, 26), case.module(backend=form)
    if module.head_weights is None and module.needs_all_heads:
        pytest.skip("it declares nothing of its weights, and is refused where processes share heads")
    if 2 % module.heads_multiple_of:
        pytest.skip("heads of one process are not enough for a set")
    expected = given.run(module, case.mask(2, 26, 26))
    for number, part in enumerate((slice(0, 2), slice(2, 4))):
        half = copy.deepcopy(module)
        half.heads = module.heads.share(number, 2)
        for name, weight in half.named_parameters():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in module.head_weights):
                weight.data = weight.data.chunk(2)[number]
        given_here = Inputs(given.q[:, part], given.k[:, number, None], given.v[:, number, None], given.hidden)
        got = given_here.run(half, case.mask(2, 26, 26))
        torch.testing.assert_close(got, expected[:, :, part], rtol=0, atol=1e-9)
