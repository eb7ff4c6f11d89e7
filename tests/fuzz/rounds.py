"""What the fuzz tests share: how many examples a round has, what a refusal is, and values that nobody sane gives."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

a_round = settings(
    max_examples=int(os.environ.get("ATTN_PLUGINS_FUZZ_ROUNDS", "20")),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
"""Decorator of every fuzz test; hypothesis prints the smallest input that fails, and how to run it again."""


@contextlib.contextmanager
def one_clear_line(refused: list[str]) -> Iterator[None]:
    """What is not served is a ValueError of one line, noted in ``refused``; any other error is a failure."""
    caught = None
    try:
        yield
    except ValueError as error:
        caught = error
    if caught is not None:
        said = str(caught).strip()
        own = type(caught) is ValueError or type(caught).__module__.startswith("attn_plugins.")
        assert own, f"a {type(caught).__name__}: {said[:300]}"
        assert said, "a ValueError that says nothing"
        assert "\n" not in said, f"a ValueError of several lines: {said[:300]!r}"
        assert len(said) < 2000, f"a ValueError of {len(said)} characters: {said[:300]!r}"
        refused.append(said)


def _junk(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(st.text(max_size=5), st.integers(0, 3), st.none())

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3))

    return st.recursive(scalars, nested, max_leaves=6)


in_files = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from([0.5, 1e-300, 1e308, float("nan"), float("inf")]),
    st.text(max_size=6),
)
scalars = st.one_of(in_files, st.just(10**4000))
junk = _junk(scalars)
"""Anything that a program or a hurried user may bring."""
junk_in_files = _junk(in_files)
"""The same, as JSON can hold it."""
