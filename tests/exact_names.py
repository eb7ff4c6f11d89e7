"""``pytest -k local`` means attention local: not block_local, and not every test with "local" in its name.

In an expression of ``-k`` the name of an attention selects the tests whose parameters name that attention, or give it
options, and the tests of its own file, ``test_local.py``. All other words select what they always do, every test in
whose name they stand: ``-k "local and padding"``, ``-k "not local_window"``.
"""

import re

import pytest

import attn_plugins as ap

PART_OF_A_WORD = r"\w:+.\[\]\\/-"  # characters that -k reads as one word with a name beside them


def attentions_of(item, names):
    """Those of ``names`` that the test is about. The value of an option, as in linear(feature_map=relu), names none."""
    parameters = item.callspec.id if hasattr(item, "callspec") else ""
    own_file = item.path.stem.removeprefix("test_")
    return {*re.findall(rf"(?<![\w=.])(?:{names})(?![\w=.])", parameters), *re.findall(rf"^(?:{names})$", own_file)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if not config.option.keyword:
        return
    names = "|".join(map(re.escape, ap.list_attentions()))
    word = rf"(?<![{PART_OF_A_WORD}])({names})(?![{PART_OF_A_WORD}])"
    config.option.keyword = re.sub(word, r"attention:\1:", config.option.keyword)
    for item in items:
        item.extra_keyword_matches.update(f"attention:{name}:" for name in attentions_of(item, names))
