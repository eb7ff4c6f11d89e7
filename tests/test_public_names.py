"""What `import attn_plugins` brings: names when they are asked for, the flag as soon as transformers is there."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import attn_plugins as ap


def run(code):
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_every_public_name_has_a_home():
    (checked,) = (node for node in ast.parse(Path(ap.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == ap._HOMES
    assert sorted(ap._HOMES) == ap.__all__
    assert set(ap.__all__) | {"__version__"} <= set(dir(ap))
    for name in ap.__all__:
        assert getattr(ap, name).__name__ == name


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'attn_plugins' has no attribute 'swap'"):
        _ = ap.swap


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert ap.__version__ == "0+unknown"


def test_the_command_line_answers_without_torch():
    code = """
import sys
from attn_plugins.cli import main
for arguments in (["list"], ["--help"], ["finetune", "--help"]):
    sys.argv = ["attn-plugins", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    assert run(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import attn_plugins; from transformers.models.llama import LlamaForCausalLM",
        "import attn_plugins.hf.attention_function",  # which imports transformers while it is half imported itself
    ],
)
def test_the_flag_is_known_as_soon_as_transformers_is_there(imports):
    known = "import sys; print(hasattr(sys.modules['transformers'].PreTrainedConfig, 'attn_plugin'))"
    assert run(f"{imports}\n{known}") == "True"
