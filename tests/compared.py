"""A comparison as it looks on disk, without a model: figures that are easy to reckon with."""

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.html.runs import write_plan
from attn_plugins.benchmark.results.store import Results
from attn_plugins.core.options import build

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
CHOSEN = {"choose": {"attention": LOCAL, "budget": 0.5}}
PERPLEXITY = {"dense": 10.0, "window": 12.0, "chosen": 10.5, "<b>odd</b>": 40.0, "broken": 0.0, "late": 0.0}
SPEED = {"dense": 1.0, "window": 4.0, "chosen": 2.0, "<b>odd</b>": 3.0, "broken": 1.0, "late": 1.0}
NOISE = {0: -0.1, 1: 0.0, 2: 0.12}


def config(folder, **changes):
    """Six attentions: one fails, one has not run, one has a name that is HTML, one is chosen by heads."""
    attentions = {"dense": None, "broken": {"type": "local", "layers": 7}, "window": LOCAL, "chosen": CHOSEN}
    attentions |= {"<b>odd</b>": "linear", "late": {"type": "local", "window_size": 9}}
    tree = {
        "models": {"tiny": "somewhere/tiny"},
        "attentions": attentions,
        "bar": "window",
        "data": {"source": "text.jsonl"},
        "evaluation": [{"task": "perplexity", "length": 16}, {"task": "recall", "distances": [8, 16]}],
        "finetune": {"block_size": 16, "training": {"max_steps": 4}},
        "speed": {"lengths": {"attention": [16, 32]}, "passes": ["forward"], "rounds": 2},
        "memory": {"lengths": {"attention": [16, 32]}, "passes": ["forward"]},
        "cost": {"lengths": [32], "what": ["cache", "decode"]},
        "seeds": [0, 1, 2],
    }
    return build(CompareConfig, {**tree, "output_dir": str(folder), **changes})


def result(cell):
    """What a cell of it found."""
    if cell.measure in ("speed", "memory"):
        times = SPEED[cell.attention] * cell.settings["length"] / 32
        speed = {"times_as_fast": times, "lowest": 0.9 * times, "highest": 1.1 * times, "seconds": 0.01 / times}
        size = {"bytes": cell.settings["length"] * 2**20 / SPEED[cell.attention]}
        return {"passes": {"forward": speed if cell.measure == "speed" else size}}
    if cell.measure == "cost":
        times = SPEED[cell.attention]
        speed = {"times_as_fast": times, "lowest": times, "highest": times, "seconds": 0.01}
        return {"bytes": 2**20 / times} if cell.settings["what"] == "cache" else speed
    tuned = cell.measure == "finetune"
    value = PERPLEXITY[cell.attention] * (0.8 if tuned else 1) + (NOISE[cell.seed] if tuned else 0)
    parts = [{"distance": 8, "accuracy": 0.75}, {"distance": 16, "accuracy": 0.5}]
    recall = {"accuracy": 0.625, "by_distance": parts}
    found = {
        "metric": "perplexity",
        "better": "lower",
        "value": value,
        "figures": {
            "perplexity": value,
            "by_position": [
                {"from": 1, "to": 8, "perplexity": value + 1},
                {"from": 9, "to": 15, "perplexity": value - 1},
            ],
        },
        "others": {"recall": {**recall, "by_part": {"passkey": recall, "copy": recall}}},
        "attention": {"modules": {"own (sdpa)": 2}, "new_params": 0},
    }
    if tuned:
        losses = [{"step": step, "loss": value / step} for step in (1, 2, 3, 4)]
        found["train"] = {"losses": losses, "steps": 4, "rows": 4, "seconds": 2.0}
    if cell.attention == "chosen" and not tuned:
        heads = [(layer, head) for layer in range(3) for head in range(2)]
        found["scores"] = [
            {"role": "decoder", "layer": layer, "kv_head": head, "score": layer + head / 2, "kept": layer == 2}
            for layer, head in heads
        ]
    if cell.attention == "window":
        found["attention"]["map"] = {"decoder": [["local"], ["local", "softmax"], ["own (sdpa)"]]}
    return found


def write_run(folder, **changes):
    """Write its results.jsonl and plan; returns (config, results)."""
    own = config(folder, **changes)
    results = Results(folder / "results.jsonl")
    write_plan(folder, [(None, own)])
    for cell in cells(own):
        if cell.attention == "late":
            continue
        record = {"key": cell.key, **cell.labels, "settings": cell.settings, "seconds": 1.5}
        record |= {"finished": "2026-01-02T03:04:05+00:00", "versions": {"attn_plugins": "0.1.0", "device": "abacus"}}
        if cell.attention == "broken":
            why = {"status": "error", "error": "ValueError: layers=7 is out of range", "traceback": "Traceback: here"}
            results.add({**record, **why})
        else:
            results.add({**record, "status": "ok", "result": result(cell)})
    return own, results
