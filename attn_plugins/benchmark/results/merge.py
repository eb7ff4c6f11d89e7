"""Several results.jsonl made one: of shards, of machines, of a run that went on elsewhere."""

from pathlib import Path

from attn_plugins.benchmark.results.store import Results

FILE = "results.jsonl"


def read_results(place: str | Path) -> Results:
    """The results in a folder's results.jsonl, or in a file.

    Raises:
        ValueError: there are none, or a line is damaged; the message has file and line.
    """
    path = Path(place).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no results at {str(place)!r}; allowed: a folder with {FILE}, or such a file")
    return Results(path)


def merge(out: str | Path, places: list[str]) -> tuple[Results, list[str]]:
    """Write into a folder's results.jsonl the last record of each cell, by when it ended, of all these and its own.

    Records without a time come before those with one; of two of the same time the one that is named later counts.

    Returns:
        (what the folder holds now, a line about each source)

    Raises:
        ValueError: a source is not there or damaged, or the folder cannot be written; nothing has changed then.
    """
    target = Path(out).expanduser() / FILE
    sources = [read_results(place) for place in [*([str(target)] if target.is_file() else []), *places]]
    last: dict[str, tuple[str, int]] = {}
    for number, source in enumerate(sources):
        for key, record in source.records.items():
            last[key] = max(last.get(key, ("", -1)), (str(record.get("finished", "")), number))
    kept = sorted((finished, key, number) for key, (finished, number) in last.items())
    merged = Results(target)
    merged.rewrite(sources[number].records[key] for _, key, number in kept)
    lines = []
    for number, source in enumerate(sources):
        own = sum(one == number for _, one in last.values())
        lines.append(
            f"{source.path}: {own} of {len(source.records)} cells" + ("" if own else ", all are elsewhere too")
        )
    return merged, lines
