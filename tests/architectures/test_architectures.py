"""The flag on tiny models: a spread of model types by default, all of them with ``-m architectures``."""

import json
from pathlib import Path

import checks
import matrix
import pytest
import tiny_model
import transformers

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


ROWS, VERSIONS = matrix.read(DOCS)
HELD = {row["model_type"]: row for row in ROWS}


def marks(name: str) -> list:
    if name in (*SPREAD, *tiny_model.OWN):
        return []
    beyond = HELD.get(name, {}).get("versions")
    return [pytest.mark.architectures, *([pytest.mark.packages] if beyond else [])]


def cases() -> list:
    return [pytest.param(name, marks=marks(name), id=name) for name in (*tiny_model.model_types(), *tiny_model.OWN)]


@pytest.mark.filterwarnings("default")  # what models warn of is not what is tested here
@pytest.mark.parametrize("model_type", cases())
def test_every_attention_module_of_a_model_type_is_served(model_type):
    row = checks.examine(model_type)
    if row.status in ("no attention", "inline attention", "not built") and model_type not in SPREAD:
        said = HELD.get(model_type, {}).get("status")
        lost = said == "passed" and not matrix.lacks_package(row.to_dict())
        same = VERSIONS.get("transformers") == transformers.__version__
        assert not (lost and same), f"the page says that it passed, and now: {row.status}: {row.reason}"
        pytest.skip(f"{row.status}: {row.reason}")
    assert row.status == "passed", row.reason


def test_the_page_says_what_was_found():
    assert (DOCS / "architectures.md").read_text(encoding="utf8") == matrix.document(ROWS, VERSIONS)
    status = {row["model_type"]: row["status"] for row in ROWS}
    assert [name for name in SPREAD if status[name] != "passed"] == []
    assert sum(found == "passed" for found in status.values()) >= 300
    counts = f"{sum(found == 'passed' for found in status.values())} of the {len(status)} model types"
    assert counts in " ".join((DOCS.parent / "README.md").read_text(encoding="utf8").split())
    for row in ROWS:
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


WITHOUT = checks.Row("edgetam", status="not built", reason="needs timm").to_dict()
WITH = checks.Row("edgetam", versions={"timm": "1.2"}).to_dict()


def test_rows_that_need_an_absent_package_stay_as_they_were_measured():
    lost = checks.Row("llama", status="not built", reason="ValueError: planted").to_dict()
    passed, failed = checks.Row("llama").to_dict(), checks.Row("edgetam", status="failed", reason="planted").to_dict()
    assert matrix.with_held([WITHOUT, lost], [WITH, passed]) == [WITH, lost]
    assert matrix.with_held([failed], [WITH]) == [failed]  # it was built: what is found now is what holds
    assert matrix.with_held([WITHOUT], [WITHOUT]) == [WITHOUT]
    assert matrix.with_held([WITHOUT], []) == [WITHOUT]
    page = matrix.document([WITH, lost], {"transformers": "1.2"})
    assert "1 with timm 1.2, of which 1 pass (edgetam)." in page
    assert "make setup" not in matrix.document([lost], {"transformers": "1.2"})


def test_a_few_rows_are_written_into_the_page(tmp_path, monkeypatch):
    ran = []

    def run(names, results, workers):
        ran.append(names)
        return [{**(WITH if name == "edgetam" else checks.Row(name).to_dict()), "reason": "new"} for name in names]

    monkeypatch.setattr(matrix, "run", run)
    matrix.write([WITHOUT, checks.Row("llama").to_dict()], matrix.versions(), tmp_path)
    matrix.update([], tmp_path, tmp_path / "results.jsonl", 1)
    matrix.update([], tmp_path, tmp_path / "results.jsonl", 1)
    matrix.update(["bert"], tmp_path, tmp_path / "results.jsonl", 1)
    assert ran == [["edgetam"], ["edgetam"], ["bert"]]
    rows, told = matrix.read(tmp_path)
    assert told == matrix.versions()
    assert [(row["model_type"], row["reason"]) for row in rows] == [("bert", "new"), ("edgetam", "new"), ("llama", "")]
    assert rows[1]["versions"] == {"timm": "1.2"}
    assert "versions" not in rows[2]
    matrix.write(rows, {"transformers": "1.2"}, tmp_path)
    with pytest.raises(
        ValueError, match=r"architectures\.json is of \{'transformers': '1.2'\}, and here are .*run all"
    ):
        matrix.update([], tmp_path, tmp_path / "results.jsonl", 1)


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
