"""flash-linear-attention's kernels, interpreted, forward and backward: the backend fla equals ``reference`` in float32.

Texts are longer than a chunk of the kernels, which is 64 tokens.
"""

import warnings

import pytest
import torch
from cases import assert_forms_agree, inputs, left_padding
from test_fla import DEFAULTS, SERVED

from attn_plugins.backends import fla
from attn_plugins.benchmark.checks.backend_contract import TOLERANCE

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),  # past a text's end
]

SIZES = {"num_heads": 2, "num_key_value_heads": 1}
"""Two query heads that share a key and a value."""


@pytest.fixture(scope="module")
def on_cpu(interpreted):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing the library says of this machine
        fla.kernels()
        patch.setattr(fla.Fla, "devices", ("cpu",))
        yield


def agree(case, length, **masking):
    # Where gates forget within three tokens, the kernels' differences of sums of gates are less exact.
    tolerance = 5e-5 if case.options.get("initial_memory") == 3.0 else 1e-5
    options = {"backend": "fla", "dtype": torch.float32, "tolerance": tolerance, **SIZES}
    assert_forms_agree(case, inputs(2, length, **SIZES), case.mask(2, length, length, **masking), **options)


@SERVED
def test_equals_reference(case):
    agree(case, 70)


@DEFAULTS
def test_equals_reference_with_left_padding(case):
    agree(case, 70, padding_BK=left_padding([70, 33], 70))


@DEFAULTS
def test_equals_reference_for_packed_rows_that_end_in_padding(case):
    own = torch.cat([torch.full((n,), number) for number, n in enumerate([25, 1, 66, 8])])
    segments = torch.stack([own, own.flip(0).neg()])
    agree(case, 100, segments_BK=segments, padding_BK=left_padding([100, 90], 100).flip(1))


@DEFAULTS
@pytest.mark.parametrize("length", [1, 17])
def test_equals_reference_below_a_chunk(case, length):
    agree(case, length)


@DEFAULTS
def test_half_precision_inside_the_kernels_costs_little(case, monkeypatch):
    """The interpreter has no bfloat16: float16, which is eight times as exact, stands for it."""
    rows_of = fla._Rows.of
    monkeypatch.setattr(fla._Rows, "of", lambda *given: rows_of(*given)._replace(dtype=torch.float16))
    given = inputs(2, 70, **SIZES).to(torch.float16).to(torch.float64)
    mask = case.mask(2, 70, 70, padding_BK=left_padding([70, 33], 70))
    allowed = TOLERANCE[torch.bfloat16] / 8
    assert_forms_agree(case, given, mask, backend="fla", dtype=torch.float32, tolerance=allowed, **SIZES)
