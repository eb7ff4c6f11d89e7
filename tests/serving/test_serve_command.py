"""The verb `serve`: its options are transformers' own and two more, what is wrong is said before anything listens."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from chatting import LINEAR, LOCAL, expected, save_model
from typer.testing import CliRunner

import attn_plugins as ap
from attn_plugins import cli
from attn_plugins.serving.server import Server

pytestmark = pytest.mark.usefixtures("one_thread")


def serve(*arguments, status=0, columns=200):
    ran = CliRunner().invoke(cli.app, ["serve", *arguments], env={"COLUMNS": str(columns)})
    assert ran.exit_code == status, ran.output + str(ran.exception)
    return ran


@pytest.fixture
def started(monkeypatch):
    """The servers that would have listened."""
    servers = []
    # uvicorn's closes the handlers that there are, absl's its stream, which is pytest's while another is sys.stderr
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    monkeypatch.setattr(Server, "run", lambda server: servers.append(server))
    return servers


def test_help_shows_the_options_of_both():
    shown = serve("--help").output
    ours = ["--attn", "--held-mib"]
    theirs = ["--host", "--port", "--device", "--dtype", "--compile", "--continuous-batching", "--chat-template-kwargs"]
    assert [name for name in [*ours, *theirs] if name not in shown] == []
    assert "--force-model" not in shown
    assert "non-blocking" not in shown
    assert serve().output == shown


def test_options_reach_the_server_in_any_order(started, tmp_path):
    folder = save_model(tmp_path)
    lines = serve("--port", "8123", "--attn", json.dumps(LOCAL), folder, "--dtype", "bfloat16").stdout.splitlines()
    assert lines == [
        f"serving {folder}: local in 2",
        f'OpenAI clients: base_url="http://localhost:8123/v1", model="{folder}"',
    ]
    (server,) = started
    model, _ = server.loaded()
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generate.func.__self__.room == 2**30
    assert [row.options["window_size"] for row in ap.describe_attention(model)] == [16, 16]


def test_a_model_that_cannot_chat_is_said_to(started, tmp_path):
    folder = save_model(tmp_path, LINEAR, chat_template=None)
    lines = serve(folder, "--held-mib", "0").stdout.splitlines()
    assert lines[2:] == ["note: its tokenizer has no chat template, so /v1/completions is all that it can answer"]
    assert "generate" not in vars(started[0].loaded()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attn", "lcoal"], "lcoal"),
        (["--attn", "{type: local, window_size: 0}"], "window_size"),
        (
            ["--attn", "local", "--continuous-batching"],
            "--continuous-batching keeps .* got local; allowed: ",
        ),
        (["--held-mib", "-1"], "--held-mib -1; allowed: 0"),
        (["--dtype", "float3"], "Unsupported dtype: 'float3'"),
        (["--quantization", "4bit"], "Unsupported quantization method: '4bit'"),
        (["--chat-template-kwargs", "{"], "Expecting"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_is_wrong_is_one_line(options, message, started, tmp_path):
    ran = serve(save_model(tmp_path), *options, status=2)
    assert ran.stdout == ""
    line = [line for line in ran.stderr.splitlines() if not line.startswith(("Writing", "Loading"))][-1]
    assert re.match(f"error: .*{message}", line)
    assert started == []


def test_models_that_are_not_there_are_refused(started, tmp_path):
    assert "no such model folder" in serve("./nowhere", status=2).stderr
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    assert "is an adapter of PEFT" in serve(str(tmp_path), status=2).stderr
    (tmp_path / "adapter_config.json").unlink()
    (line,) = serve(str(tmp_path), status=2).stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "openai"])
def test_a_missing_package_is_named_with_its_extra(missing, started, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    ran = serve(str(tmp_path), status=2)
    assert ran.stderr == f"error: this needs the package {missing!r}: pip install 'attn-plugins[serve]'\n"


def test_a_transformers_without_a_server_is_said_to_be_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", None)
    assert "the transformers that is installed has no server of this kind" in serve("x", status=2).stderr


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "busy"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM, idle", "SIGINT, answering"]
)
def test_a_server_of_its_own_answers_and_ends_when_it_is_told_to(number, busy, tmp_path):
    openai, port = pytest.importorskip("openai"), free_port()
    folder = save_model(tmp_path / "model", LOCAL)
    command = [sys.executable, "-m", "attn_plugins", "serve", folder, "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
            while True:
                try:
                    (model,) = client.models.list()
                    break
                except openai.APIConnectionError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            messages = [{"role": "user", "content": "the cat is good ."}]
            asked = {"model": model.id, "messages": messages, "temperature": 0}
            got = client.chat.completions.create(**asked, max_tokens=6).choices[0].message.content
            assert got == expected(folder, messages)
            parts = []
            if busy:
                whole = {"max_tokens": 400, "logit_bias": {"2": -100.0}}  # no end of its own accord
                parts = client.chat.completions.create(**asked, **whole, stream=True)
                next(iter(parts))
            process.send_signal(number)
            if busy:
                assert list(parts)[-1].usage.completion_tokens == 400, "an answer that was begun is given whole"
            assert process.wait(60) == -number
        finally:
            process.kill()
            process.wait()
        text = (tmp_path / "log").read_text()
    assert f'model="{folder}"' in text
    assert "Finished server process" in text
    assert "Traceback" not in text
