"""What pip installs: the wheel's contents and requirements, and that every version of the environment is pinned."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")  # a build leaves folders behind, which have no place in the project
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("attn_plugins", "tests", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    built = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr + built.stdout
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attn_plugins").rglob("*.py")}
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert there == here | {"attn_plugins/py.typed"}


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
    (allowed,) = (Requirement(t) for t in metadata.requires("attn-plugins") if t.startswith("transformers"))
    oldest = pins("constraints-oldest.txt")
    assert f">={oldest['transformers'].removesuffix('.0')}" in str(allowed.specifier)
    assert oldest["transformers"] not in pins("constraints.txt").values()
