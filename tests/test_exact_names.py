"""-k with the name of an attention selects the tests of that attention, and of no other whose name holds it."""

import sys

import pytest
from cases import CASES

pytest_plugins = ["pytester"]

FILES = {
    "test_of_all": """
        import pytest
        from cases import every_case, every_class

        @every_case()
        def test_of_cases(case):
            pass

        @every_class()
        def test_of_softmax_for_classes(cls):
            pass

        @pytest.mark.parametrize("form", ["torch", "relu"])
        @pytest.mark.parametrize("name", ["local-gpt2", "block_local-gpt2", "linear(feature_map=local)", "my_local"])
        def test_of_names(name, form):
            pass

        def test_local_alone():
            pass
        """,
    "test_delta": "def test_its_own(): pass",
    "test_gated_delta": "def test_its_own_too(): pass",
}
"""Of names that no file of these tests has: two modules of one name are an error of pytest's."""


@pytest.fixture
def chosen(pytester, monkeypatch):
    """What an expression chooses of FILES: (file, test) each."""
    for name in FILES:  # the files of this name may have been collected in this process
        monkeypatch.delitem(sys.modules, name, raising=False)
    pytester.makeconftest("from exact_names import pytest_collection_modifyitems")
    pytester.makepyfile(**FILES)

    def choose(expression):
        flags = ("-p", "no:cacheprovider", "-p", "no:xdist", "--collect-only", "-q")
        said = pytester.runpytest_inprocess(*flags, "-k", expression).outlines
        return [tuple(line.split(".py::")) for line in said if ".py::" in line]

    return choose


@pytest.mark.parametrize("name", ["local", "block_local", "softmax", "linear", "topk", "delta", "gated_delta"])
def test_the_name_of_an_attention_selects_that_attention_alone(chosen, name):
    items = chosen(name)
    cases = [test.removeprefix("test_of_cases[")[:-1] for _, test in items if test.startswith("test_of_cases[")]
    assert cases == [str(case) for case in CASES if case.cls.name == name]
    classes = [test for _, test in items if test.startswith("test_of_softmax_for_classes[")]
    assert classes == [f"test_of_softmax_for_classes[{name}]"]
    others = [item for item in items if item[1].split("[")[0] not in ("test_of_cases", "test_of_softmax_for_classes")]
    assert others == {
        "local": [
            ("test_of_all", "test_of_names[local-gpt2-torch]"),
            ("test_of_all", "test_of_names[local-gpt2-relu]"),
        ],
        "block_local": [
            ("test_of_all", "test_of_names[block_local-gpt2-torch]"),
            ("test_of_all", "test_of_names[block_local-gpt2-relu]"),
        ],
        "delta": [("test_delta", "test_its_own")],
        "gated_delta": [("test_gated_delta", "test_its_own_too")],
        "linear": [
            ("test_of_all", "test_of_names[linear(feature_map=local)-torch]"),
            ("test_of_all", "test_of_names[linear(feature_map=local)-relu]"),
        ],
    }.get(name, [])


def test_names_within_expressions_and_all_other_words(chosen):
    everything = chosen("test")
    local = chosen("local")
    assert chosen("not local") == [item for item in everything if item not in local]
    assert chosen("(local or not test) and of_names and not relu") == [
        ("test_of_all", "test_of_names[local-gpt2-torch]")
    ]
    assert ("test_of_all", "test_local_alone") in chosen("local_")
    assert {test for _, test in chosen("my_local or local_alone")} == {
        "test_local_alone",
        "test_of_names[my_local-torch]",
        "test_of_names[my_local-relu]",
    }
