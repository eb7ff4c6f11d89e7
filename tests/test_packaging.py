"""What pip installs: sdist and wheel, and that every version of the environment is pinned."""

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attn_plugins

ROOT = Path(__file__).parent.parent

toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source")  # a build leaves folders behind, which have no place in the project
    made = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*made), dirs_exist_ok=True)
    build = ["build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    ran = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_a_package_index_would_take_them(built):
    pytest.importorskip("twine", reason="an environment from before it was asked for: make setup")
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    ran = subprocess.run(check, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert ran.stdout.count("PASSED") == 2


def test_the_sdist_holds_what_it_takes_to_test_it(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path for folder in ("tests", "configs", "docs", "examples") for path in (ROOT / folder).rglob("*")]
    wanted += [*ROOT.glob("*.md"), *ROOT.glob("constraints*"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    names = {path.relative_to(ROOT).as_posix() for path in wanted if path.is_file() and path.suffix != ".pyc"}
    assert names - there == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attn_plugins").rglob("*.py")}
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    configs = {f"attn_plugins/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "attn_plugins/configs/suites/quick.yaml" in configs
    for pattern in ("templates/*", "csrc/*.h", "csrc/*.cpp"):
        here |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "attn_plugins").rglob(pattern)}
    assert there == here | configs | {"attn_plugins/py.typed", "attn_plugins/backends/checked.json"}


def test_the_wheel_needs_few_packages_and_brings_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(name).decode()
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    assert {one.name for one in required if not one.marker} == {"torch", "transformers", "pyyaml", "typer", "rich"}
    assert "License-Expression: Apache-2.0" in text
    assert "attn-plugins = attn_plugins.cli:main" in wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def pins(file: str) -> dict[str, str]:
    """name -> version, for this Python."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        (version,) = pin.specifier
        assert version.operator == "==", f"{line}: a constraint that is no pin"
        if pin.marker is None or pin.marker.evaluate():
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice"
            found[canonicalize_name(pin.name)] = version.version
    return found


def needed(name: str, extras: set[str], seen: set[tuple[str, str]]) -> set[str]:
    """Names of all packages that a requirement brings, followed through what is installed.

    What a package itself takes at one version is left out: torch for CUDA brings its libraries so.
    """
    brought: set[str] = set()
    for text in metadata.requires(name) or []:
        one = Requirement(text)
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        if any(specifier.operator == "==" for specifier in one.specifier):
            continue
        key = (canonicalize_name(one.name), ",".join(sorted(one.extras)))
        brought.add(key[0])
        if key not in seen:
            seen.add(key)
            brought |= needed(one.name, one.extras, seen)
    return brought


def test_every_package_of_the_environment_is_pinned():
    names = needed("attn-plugins", {"dev"}, set()) - {"attn-plugins"}
    assert {"torch", "transformers", "peft", "datasets", "accelerate", "gguf", "numpy"} <= names
    assert sorted(names - set(pins("constraints.txt"))) == [], "pip would take whatever is newest"


def test_the_oldest_transformers_is_the_one_that_is_allowed():
    wanted = map(Requirement, metadata.requires("attn-plugins"))
    (allowed,) = (one for one in wanted if one.name == "transformers" and one.marker is None)
    oldest = pins("constraints-oldest.txt")
    assert f">={oldest['transformers'].removesuffix('.0')}" in str(allowed.specifier)
    assert oldest["transformers"] not in pins("constraints.txt").values()


def test_kernels_are_tested_at_versions_that_their_extra_allows():
    pinned = pins("constraints-kernels.txt")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    allowed = {one.name: one for one in map(Requirement, project["optional-dependencies"]["kernels"])}
    assert allowed.keys() == pinned.keys()
    assert all(version in allowed[name].specifier for name, version in pinned.items())


def test_the_version_is_that_of_the_installed_package():
    assert attn_plugins.__version__ == metadata.version("attn-plugins")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    assert {name: citation[name] for name in ("version", "license", "keywords", "authors")} == {
        name: project[name] for name in ("version", "license", "keywords", "authors")
    }


def test_the_public_workflow_runs_targets_that_exist_on_every_python():
    workflow, wheels = (
        yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf8"))
        for name in ("ci.yml", "wheels.yml")
    )
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))
    steps = [step for one in (workflow, wheels) for job in one["jobs"].values() for step in job["steps"]]
    run = {step["run"].split()[1] for step in steps if "run" in step}
    assert {"check", "dist", "fuzz", "site", "test", "test-cpp", "test-oldest", "wheel-cpp"} == run
    assert run <= targets
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    declared = {text.rpartition(" :: ")[2] for text in project["classifiers"] if re.search(r"Python :: 3\.\d+$", text)}
    assert declared <= set(workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"])
