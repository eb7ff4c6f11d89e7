"""Tables of where attentions start: what is measured, and what a table says of it."""

from attn_plugins.benchmark.pages.starts_table import at_start, starts
from attn_plugins.benchmark.results.store import Results


def record(key, attention, **more):
    settings = {"attention": attention, "rules": attention, "model": "m", "length": 512, "seed": 0}
    made = {"torch": "9.9", "attn_plugins": "0", "device": "an abacus", "threads": "1"}
    return {"key": key, "status": "ok", "settings": settings, "versions": made, **more}


def test_each_attention_is_measured_at_its_defaults_and_without_first_tokens():
    causal, bidirectional = at_start("causal"), at_start("bidirectional")
    assert causal["local"] == {"type": "local"}
    assert causal["local, num_sink_tokens: 0"] == {"type": "local", "num_sink_tokens": 0}
    assert causal["block_topk, init_blocks: 0"] == {"type": "block_topk", "init_blocks": 0}
    assert "softmax" in causal
    assert "nystrom" not in causal
    assert "nystrom" in bidirectional


def test_a_table_has_the_columns_that_were_measured(tmp_path):
    results = Results(tmp_path / "starts.jsonl")
    results.add(record("a", "dense", result={"perplexity": 14.68, "recall": {"passkey": 1.0}}))
    results.add(record("b", "local", result={"perplexity": 16.004, "recall": {"passkey": 0.25}, "error": 0.04}))
    results.add(record("c", "lsh", status="refused", error="no"))
    lines = starts(results.path, tmp_path / "none.jsonl")
    assert lines[1].startswith("model m, length 512, seed 0; torch 9.9, ")
    assert lines[3:] == [
        "| attention | perplexity | pass key | error of layers |",
        "|---|---|---|---|",
        "| dense | 14.68 | 1.00 |  |",
        "| local | 16.00 | 0.250 | 0.040 |",
        "",
        "Refused, since they cannot serve this model: lsh.",
    ]
    assert starts(tmp_path / "none.jsonl") == []
