"""Columns of files: paths start at their table, bytes are left as they are, and nothing is decoded on the way."""

import datasets
import pytest
from conftest import write_rows

from attn_plugins.data.columns import ROLES, Role
from attn_plugins.data.media import located, opened
from attn_plugins.data.sources import DataConfig, load_data

FEATURES = {"audio": datasets.Audio(decode=False), "image": datasets.Image(decode=False)}


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_paths_start_at_the_folder_and_bytes_stay(tmp_path, feature):
    there = str(tmp_path / "there.bin")
    paths = datasets.Dataset.from_dict({"file": ["a.bin", "b/c.bin", there, None]})
    found = located(paths, "file", tmp_path, feature)
    assert [row and row["path"] for row in found["file"]] == [
        str(tmp_path / "a.bin"),
        str(tmp_path / "b" / "c.bin"),
        there,
        None,
    ]
    assert located(found, "file", tmp_path / "other", feature)["file"][:] == found["file"][:]
    kept = datasets.Dataset.from_dict({"file": [{"path": None, "bytes": b"xyz"}, {"path": there, "bytes": None}]})
    kept = located(kept, "file", tmp_path, feature)
    assert opened(kept[0]["file"]).read() == b"xyz"
    assert opened(kept[1]["file"]) == there
    numbers = datasets.Dataset.from_dict({"file": [1, 2]})
    assert located(numbers, "file", tmp_path, feature)["file"][:] == [1, 2]


def test_tables_and_folders_say_where_paths_start(tmp_path, monkeypatch):
    def read(data, role, folder):
        return located(data, role, folder, FEATURES["audio"])

    def check(data, role, what):
        checked.append((data.column_names, role, what))

    checked = []
    monkeypatch.setitem(ROLES, "file", Role(option="audio_column", check=check, read=read))
    rows = [{"clip": f"{number}.wav", "said": "x"} for number in range(4)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", rows)

    def paths(**options):
        config = DataConfig(audio_column="clip", text_column="said", **options)
        return [row["path"] for split in load_data(config, ("file", "text")) for row in split["file"]]

    table = str(tmp_path / "one" / "train.jsonl")
    for source in (table, [table], str(tmp_path / "one")):
        assert sorted(paths(source=source)) == [str(tmp_path / "one" / f"{number}.wav") for number in range(4)]
    assert checked[0] == (["file", "text"], "file", f"{table}: column 'clip' (audio_column)")
    apart = paths(source=table, eval_source=[str(tmp_path / "two" / "train.jsonl")])
    assert apart[4:] == [str(tmp_path / "two" / f"{number}.wav") for number in range(4)]
    assert sorted(set(paths(source=str(tmp_path / "*" / "train.jsonl")))) == [f"{number}.wav" for number in range(4)]
