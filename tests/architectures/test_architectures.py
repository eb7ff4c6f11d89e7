"""The flag on tiny models: a spread of model types by default, all of them with ``-m architectures``."""

import json
from pathlib import Path

import checks
import matrix
import pytest
import tiny_model

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape

DOCS = Path(__file__).parents[2] / "docs"
SPREAD = (
    *("llama", "gpt2", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v32", "diffllama", "doge", "phi3"),
    *("bert", "roberta", "albert", "distilbert", "modernbert", "layoutlm", "splinter", "xlm-roberta", "eurobert"),
    *("mpnet", "deberta-v2", "gptj", "bloom", "falcon", "blip", "t5", "bart", "t5gemma2", "whisper", "wav2vec2"),
    *("speech_to_text", "vit", "dinov2", "clip", "segformer", "swin", "videomae", "beit", "mllama", "aya_vision"),
    *("qwen2_vl", "paligemma"),
)
"""Of every kind, and some of those that have failed once."""


def cases() -> list:
    return [
        pytest.param(name, marks=() if name in (*SPREAD, *tiny_model.OWN) else pytest.mark.architectures, id=name)
        for name in (*tiny_model.model_types(), *tiny_model.OWN)
    ]


@pytest.mark.filterwarnings("default")  # what models warn of is not what is tested here
@pytest.mark.parametrize("model_type", cases())
def test_every_attention_module_of_a_model_type_is_served(model_type):
    row = checks.examine(model_type)
    if row.status in ("no attention", "inline attention", "not built") and model_type not in SPREAD:
        pytest.skip(f"{row.status}: {row.reason}")
    assert row.status == "passed", row.reason


def test_the_page_says_what_was_found():
    held = json.loads((DOCS / "architectures.json").read_text(encoding="utf8"))
    assert (DOCS / "architectures.md").read_text(encoding="utf8") == matrix.document(held["rows"], held["versions"])
    status = {row["model_type"]: row["status"] for row in held["rows"]}
    assert [name for name in SPREAD if status[name] != "passed"] == []
    assert sum(found == "passed" for found in status.values()) >= 300
    counts = f"{sum(found == 'passed' for found in status.values())} of the {len(status)} model types"
    assert counts in " ".join((DOCS.parent / "README.md").read_text(encoding="utf8").split())
    for row in held["rows"]:
        assert row["status"] in matrix.ORDER
        assert row["reason"] or row["status"] in ("passed", "no attention"), row["model_type"]


def test_a_matrix_that_was_stopped_goes_on_where_it_was(tmp_path):
    done = checks.Row("llama", status="failed", reason="planted").to_dict()
    results = tmp_path / "new" / "results.jsonl"
    results.parent.mkdir()
    results.write_text(json.dumps(done) + "\n")
    rows = matrix.run(["fnet", "llama"], results, workers=1)
    assert [(row["model_type"], row["status"]) for row in rows] == [("fnet", "no attention"), ("llama", "failed")]
    assert [json.loads(line) for line in results.read_text().splitlines()] == [done, rows[0]]
    page = matrix.document(rows, {"transformers": "1.2"})
    assert "| llama | failed | planted |" in page
    assert "| fnet | no attention |  |" in page


def failing(model_type: str = "llama") -> list[str]:
    return [name for name, said in checks.examine(model_type).checks.items() if said.startswith("failed")]


def test_checks_tell_what_is_broken(monkeypatch):
    softmax = ap.get_attention("softmax")
    forward = softmax.forward
    assert failing() == []
    with monkeypatch.context() as patch:
        patch.setattr(softmax, "forward", lambda self, *qkv, scale, **by: forward(self, *qkv, scale=2 * scale, **by))
        assert failing() == ["limit"]
    with monkeypatch.context() as patch:
        patch.setattr("attn_plugins.hf.discovery.modules.role_of", lambda *given: "encoder")
        assert "roles" in failing()
    with monkeypatch.context() as patch:
        found = HeadShape(num_heads=4, num_key_value_heads=4, head_dim=8, value_dim=8)
        patch.setattr("attn_plugins.hf.discovery.heads.head_shape", lambda *given: found)
        assert failing() == ["shapes", "linear", "additive", "save"]
    with monkeypatch.context() as patch:
        patch.setattr(ap.get_attention("additive"), "attend", lambda self, q, k, v, **by: v.repeat_interleave(2, dim=1))
        assert failing() == ["additive"]  # no gradient in its weights
    with monkeypatch.context() as patch:
        patch.setattr("attn_plugins.hf.construction.attach_from_config", lambda model: None)
        assert "save" in failing()
    with monkeypatch.context() as patch:
        patch.setattr(ap, "restore_attention", lambda model: model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01))
        assert "restore" in failing()
    with monkeypatch.context() as patch:
        patch.setattr("attn_plugins.core.decode_state.State.seen", 3)
        assert "generate" in failing()
