"""Who may import whom, read from the sources: an arrow that points the wrong way fails here, with file and line."""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attn_plugins"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROOMS = {
    "core": {"core", "attentions", "backends"},  # registries walk these folders; no module in them is named
    "ops": {"core", "ops"},
    "attentions": {"core", "ops"},
    "backends": {"core", "ops", "backends"},
    "config": {"config", "core"},
    "data": {"config", "core", "data"},
    "metrics": set(),  # evaluate copies each of its files to where it imports it from
    "models": {"core", "models"},
    "hf": {"config", "core", "hf", "models", "ops"},  # it tells transformers' auto classes of the models
    "torch_modules": {"core", "hf", "torch_modules"},
    "tasks": {"config", "core", "data", "hf", "tasks"},
    "training": {"config", "core", "data", "hf", "tasks", "training"},
    "choice": {"choice", "config", "core", "data", "hf", "tasks", "training"},
    "transfer": {"choice", "config", "core", "data", "hf", "tasks", "training", "transfer"},
    "inspection": {"config", "core", "data", "hf", "inspection", "ops", "training", "transfer"},
    "export": {"config", "core", "export", "hf", "ops", "training"},
    "serving": {"config", "core", "hf", "serving", "training"},
    "benchmark": {"benchmark", "choice", "config", "core", "data", "export", "hf", "tasks", "training", "transfer"},
    "launcher": set(),
    "cli": {
        *{"benchmark", "choice", "cli", "config", "core", "data", "export", "hf", "launcher", "tasks", "training"},
        *{"inspection", "serving", "transfer"},
    },
    "__main__": {"cli"},
    "__init__": {
        *{"choice", "config", "core", "data", "export", "hf", "inspection", "torch_modules", "training", "transfer"}
    },
}
"""What the files of a room, or a file at the root, may import of the package."""

KERNELS = {"core", "ops", "attentions", "backends"}
"""Rooms that know torch and the standard library alone, but for the libraries that a backend imports when it runs."""

WITHOUT_TRANSFORMERS = {"config", "launcher", "__init__"}
"""Rooms above them that don't know transformers either: hf is the bridge."""

BY_PATH = {"metrics"}
"""Rooms whose files another library imports when it loads them: theirs may bring an extra."""

REQUIRED = {"torch", "transformers", "yaml", "typer", "rich"}
"""What `pip install attn-plugins` brings. Anything else belongs to an extra and is imported where it is used."""


class Import(NamedTuple):
    importer: str
    """Path of the file below the package, without .py, with dots."""
    imported: str
    """Dotted name, as written."""
    eager: bool
    """Runs when the file is imported, not when a function is called or types are checked."""
    where: str


def imports(path: Path, text: str | None = None) -> list[Import]:
    importer = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    found = []

    def visit(node: ast.AST, eager: bool) -> None:
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found.extend(Import(importer, alias.name, eager, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: relative import; write it out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(Import(importer, name, eager, where) for name in names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need":
            found.append(Import(importer, str(node.args[0].value), False, where))  # extras.need("datasets", ...)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            eager = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            eager = False
        for child in ast.iter_child_nodes(node):
            visit(child, eager)

    visit(ast.parse(path.read_text(encoding="utf8") if text is None else text), True)
    return found


def part(dotted: str) -> str:
    return dotted.split(".")[0]


def wrong(one: Import) -> str | None:
    """What is wrong with an import, or None."""
    importer, top = part(one.importer), part(one.imported)
    if top in sys.stdlib_module_names:
        return None
    if importer not in ROOMS:
        return f"{importer} is no room yet: give it a place in ROOMS"
    if top == "attn_plugins":
        target, *inside = one.imported.split(".")[1:] or [""]
        if not target:
            return "imports the whole package: name the module"
        if target == "attentions" and inside and inside[0] != "__path__":
            return "names an attention: the registry is the only list"
        return None if target in ROOMS[importer] else f"{importer} may import of the package: {sorted(ROOMS[importer])}"
    if importer in KERNELS and top != "torch" and (importer != "backends" or one.eager):
        return f"{importer} may import torch and the standard library only"
    if top == "transformers" and importer in WITHOUT_TRANSFORMERS:
        return f"{importer} may not know transformers: hf is the bridge"
    if one.eager and top not in REQUIRED and importer not in BY_PATH:
        return f"{top} comes with an extra: import it where it is used"
    return None


def test_the_root_has_rooms_and_no_files():
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {*{"__init__.py", "__main__.py", "py.typed"}}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms == {room for room in ROOMS if (PACKAGE / room).is_dir()}


def test_imports_point_one_way():
    found = [one for path in SOURCES for one in imports(path)]
    assert len(found) > 50
    assert [f"{one.where}: {one.imported}: {wrong(one)}" for one in found if wrong(one)] == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("attentions/local.py", "from attn_plugins.hf import swap", "attentions may import"),
        ("attentions/local.py", "from attn_plugins.attentions.softmax import SoftmaxAttention", "names an attention"),
        ("attentions/local.py", "import transformers", "may import torch and the standard library only"),
        ("ops/softmax/tiles.py", "def f():\n    import numpy", "may import torch and the standard library only"),
        ("backends/flex.py", "import triton", "may import torch and the standard library only"),
        ("ops/reference.py", "from attn_plugins.attentions import local", "names an attention"),
        ("ops/reference.py", "from attn_plugins.hf.swap import swap_attention", "ops may import"),
        ("core/mask.py", "from attn_plugins.ops.reference import scores", "core may import"),
        ("core/rules.py", "from attn_plugins.hf.swap import swap_attention", "core may import"),
        ("hf/swap.py", "from attn_plugins.training import finetune", "hf may import"),
        ("hf/swap.py", "from attn_plugins.attentions.local import LocalAttention", "names an attention"),
        ("hf/swap.py", "import attn_plugins", "imports the whole package"),
        ("config/yaml.py", "from transformers import AutoTokenizer", "may not know transformers"),
        ("data/text.py", "import datasets", "datasets comes with an extra"),
        ("metrics/rouge.py", "from attn_plugins.core.options import shown", "metrics may import of the package: []"),
        ("config/yaml.py", "def f():\n    need('transformers', 'train')", "may not know transformers"),
        ("new_room.py", "from attn_plugins.core.mask import AttentionMask", "new_room is no room yet"),
    ],
)
def test_a_wrong_import_is_found(file, line, message):
    (one,) = imports(PACKAGE / file, line)
    assert message in (wrong(one) or "")


@pytest.mark.parametrize("line", ["def f():\n    import datasets", "if TYPE_CHECKING:\n    import datasets"])
def test_an_extra_may_be_imported_late(line):
    (one,) = imports(PACKAGE / "data/text.py", line)
    assert wrong(one) is None


def test_a_file_that_a_library_loads_by_its_path_may_import_it():
    (one,) = imports(PACKAGE / "metrics/rouge.py", "import evaluate")
    assert wrong(one) is None


def test_a_backend_may_import_its_library_late():
    (one,) = imports(PACKAGE / "backends/flex.py", "def f():\n    import triton")
    assert wrong(one) is None


def test_no_file_holds_more_than_one_concept():
    limits = {path: 500 for folder in ("attn_plugins", "tests", "examples") for path in (ROOT / folder).rglob("*.py")}
    limits |= dict.fromkeys((PACKAGE / "attentions").glob("*.py"), 120)
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf8").splitlines()) for path in limits}
    assert {name: lines for name, lines in long.items() if lines > limits[ROOT / name]} == {}


def test_names_say_what_a_thing_is():
    vague = re.compile(r"manager|factory|mixin|wrapper|util|helper", re.IGNORECASE)
    classes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))]
    names = [node.name for _, node in classes if isinstance(node, ast.ClassDef)] + [path.stem for path in SOURCES]
    assert [name for name in names if vague.search(name)] == []


def inheritance(sources: list[str]) -> list[str]:
    """Classes with a base that has a base of its own in the package. An abstract base is none: it only shares code."""
    bases: dict[str, set[str]] = {}
    abstract: set[str] = set()
    for text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                over = {ast.unparse(base).split(".")[-1] for base in node.bases}
                # An adapter has the name of its family's own class, which is transformers'.
                bases.setdefault(node.name, set()).update(over - {node.name})
                functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                decorators = {ast.unparse(one) for function in functions for one in function.decorator_list}
                if decorators & {"abc.abstractmethod", "abstractmethod"}:
                    abstract.add(node.name)
    return [
        name
        for name, over in bases.items()
        if any(bases.get(base, set()) & set(bases) for base in over - (abstract if name not in abstract else set()))
    ]


def test_at_most_one_level_of_inheritance():
    assert inheritance([path.read_text(encoding="utf8") for path in SOURCES]) == []


@pytest.mark.parametrize(
    ("decorator", "deep"),
    [("", ["C", "D"]), ("@abc.abstractmethod", ["D"])],
)
def test_an_abstract_base_is_no_level_of_inheritance(decorator, deep):
    source = f"""
class A: pass
class B(A):
    {decorator}
    def f(self): pass
class C(B): pass
class D(C): pass
"""
    assert inheritance([source]) == deep


def test_fixtures_that_tests_share_are_in_one_file():
    """Tests import from it by name, and a second conftest.py in a folder of pythonpath is found in its place."""
    assert list((ROOT / "tests").rglob("conftest.py")) == [ROOT / "tests" / "conftest.py"]
