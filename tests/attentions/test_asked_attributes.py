"""A failure of the contract names the class attribute to set, which is then all that is wrong."""

import pytest
import test_contract
import test_states
import torch
from asked_attributes import ASKED, REFUSED
from cases import Case
from hidden_attentions import GatedOutput
from pages import ROOT

from attn_plugins.core.attention import Attention

pytest_plugins = ["pytester"]


def test_every_test_exists():
    sources = "".join(path.read_text(encoding="utf8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in ASKED if f"def {name}(" not in sources] == []
    attributes = {
        part.split(" ")[0] for asked in (REFUSED, *ASKED.values()) for part in asked.replace(", or ", "|").split("|")
    }
    assert {name for name in attributes if "{" not in name and not hasattr(Attention, name)} == set()


def test_a_failure_ends_with_what_to_set(pytester):
    pytester.makeconftest("from asked_attributes import pytest_runtest_call")
    pytester.makepyfile(
        test_sample="""
        import pytest

        def test_packed_segments_do_not_leak():
            assert 1 == 2, "they leak"

        @pytest.mark.parametrize("capability", ["softcap"])
        def test_honours_what_it_declares_and_refuses_the_rest(capability):
            raise TypeError("unexpected keyword")

        def test_fast_form_equals_reference():
            raise ValueError("grid of 7")

        def test_fast_form_equals_reference_again():
            assert 1 == 2

        def test_future_tokens_do_not_matter_when_causal():
            pytest.skip("not here")
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(failed=4, skipped=1)
    said = [line for line in result.outlines if "set in its class" in line and line.startswith("E")]
    assert [line.split("class: ")[1] for line in said] == ["segments = False", "softcap = False", REFUSED]


def failing(cls, test, message, causal=True):
    with pytest.raises(AssertionError, match=message):
        test(cls) if causal is None else test(Case(cls, {}, causal))


def test_weights_that_do_not_sum_to_one():
    failing(
        type("Gated", (GatedOutput,), {"convex": True}),
        test_contract.test_effective_weights_give_the_output,
        "weights do not sum to 1: set `convex = False`",
    )


class Negative(GatedOutput):
    """Weights below 0. Limit case: none."""

    convex = True

    def reference(self, q, k, v, **options):
        return tuple(torch.neg(x) for x in super().reference(q, k, v, **options))


def test_weights_below_zero():
    failing(Negative, test_contract.test_effective_weights_give_the_output, "below 0: set `convex = False`")


def test_limit_cases():
    test = test_contract.test_limit_case_is_softmax_attention
    failing(type("Silent", (GatedOutput,), {"__doc__": "Nothing."}), test, "say 'Limit case: none.' in", None)
    failing(type("Both", (GatedOutput,), {"limit": {}, "__doc__": "Limit case: none."}), test, "or set none", None)


def test_what_is_kept():
    failing(type("Kept", (GatedOutput,), {"keeps": "half"}), test_states.test_what_is_kept_is_told, "leave out", None)
    new = {"new_state": lambda self, fixed_length=None: None}
    failing(type("Made", (GatedOutput,), new), test_states.test_what_is_kept_is_told, "say in `keeps` what", None)
