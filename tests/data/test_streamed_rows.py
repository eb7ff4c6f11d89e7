"""Rows that are read as they are needed: which come, in which order, to whom, and what is said where they are wrong."""

import gc
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import write_rows
from PIL import Image
from torch.utils.data import DataLoader

from attn_plugins.data import sources, stream
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.stream import Stream, StreamError
from attn_plugins.data.text import NoExamplesError

TEXTS = [f"text {number}" for number in range(23)]


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [{"n": at, "text": text} for at, text in enumerate(TEXTS)])


def opened(source, columns=("text",), **options):
    return load_data(DataConfig(source=source, streaming=True, **options), columns)


def texts(rows):
    return [{"text": text} for text in rows["text"]]


def one_round(rows, seed=0):
    return [row["text"] for row in rows.some(texts, 1000, seed=seed)]


def rounds(rows, number, shares=1, seed=0):
    return [row["text"] for row in islice(rows.examples(texts, seed=seed, shares=shares), number)]


def test_what_is_held_out_is_not_trained_on(source):
    train, held_out = opened(source, max_eval_rows=4, chunk_rows=5, shuffle_rows=6)
    assert held_out["text"][:] == TEXTS[:4]
    assert train.first["text"][:] == TEXTS[4:9]
    assert held_out.column_names == train.first.column_names == ["text"]
    assert sorted(one_round(train)) == sorted(TEXTS[4:])
    limited, _ = opened(source, max_eval_rows=4, max_train_rows=7)
    assert sorted(one_round(limited)) == sorted(TEXTS[4:11])


def test_held_out_rows_of_another_source_or_split(source, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "another"}, {"text": "third"}])
    train, held_out = opened(source, eval_source=other)
    assert (held_out["text"][:], sorted(one_round(train))) == (["another", "third"], sorted(TEXTS))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "validation.jsonl", [{"text": "another"}, {"text": "third"}])
    train, held_out = opened(str(folder), max_eval_rows=1)
    assert (held_out["text"][:], sorted(one_round(train))) == (["another"], sorted(TEXTS))


def test_rows_come_round_after_round_in_an_order_of_the_seed(source):
    kept, _ = opened(source, max_eval_rows=3, chunk_rows=7, shuffle_rows=0)
    assert rounds(kept, 40) == TEXTS[3:] * 2
    mixed, _ = opened(source, max_eval_rows=3, chunk_rows=7, shuffle_rows=8)
    found = rounds(mixed, 40)
    first, second = found[:20], found[20:]
    assert sorted(first) == sorted(second) == sorted(TEXTS[3:])
    assert first != second
    assert sum(one != other for one, other in zip(first, TEXTS[3:], strict=True)) > 10
    assert rounds(mixed, 40) == found
    assert rounds(mixed, 40, seed=1) != found


def share_of(rows, shares, process, processes, skip=0):
    loader = DataLoader(rows.examples(texts, seed=0, shares=shares), batch_size=2, collate_fn=list)
    placed = {"num_processes": processes, "process_index": process, "dispatch_batches": False}
    loader = prepare_data_loader(loader, **placed)
    return (row["text"] for batch in skip_first_batches(loader, skip) for row in batch)


@pytest.mark.parametrize("shuffle_rows", [0, 6])
def test_no_row_is_in_the_shares_of_two_processes_and_none_is_left_out(source, shuffle_rows):
    train, _ = opened(source, max_eval_rows=3, chunk_rows=4, shuffle_rows=shuffle_rows)
    shares = [list(islice(share_of(train, 2, process, 2), 20)) for process in range(2)]
    for turn in (slice(0, 10), slice(10, 20)):
        assert sorted(shares[0][turn] + shares[1][turn]) == sorted(TEXTS[3:])
    assert list(islice(share_of(train, 2, 1, 2, skip=3), 14)) == shares[1][6:]


def test_each_worker_of_a_process_has_a_share_of_its_own(source, monkeypatch):
    train, _ = opened(source, max_eval_rows=3, shuffle_rows=0)
    found = []
    for process in range(2):
        loader = DataLoader(train.examples(texts, seed=0, shares=4), batch_size=2, collate_fn=list)
        placed = prepare_data_loader(loader, num_processes=2, process_index=process, dispatch_batches=False)
        for worker in range(2):
            place = SimpleNamespace(num_workers=2, id=worker)
            monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda place=place: place)
            found += [row["text"] for row in islice(placed.dataset, 5)]
            monkeypatch.undo()
    assert sorted(found) == sorted(TEXTS[3:])


def test_rows_that_give_nothing_are_passed_over_unless_all_do(source):
    train, _ = opened(source, max_eval_rows=3, chunk_rows=4, shuffle_rows=0)

    def some(rows):
        found = [{"text": text} for text in rows["text"] if int(text.split()[1]) % 11 == 0]
        if not found:
            raise NoExamplesError("none of these")
        return found

    examples = train.examples(some, seed=0, shares=1)
    assert [row["text"] for row in islice(examples, 4)] == ["text 11", "text 22"] * 2

    def none(rows):
        raise NoExamplesError("none of these")

    with pytest.raises(StreamError, match=r"rows\.jsonl gives nothing to train on; allowed: more rows"):
        next(iter(train.examples(none, seed=0, shares=1)))
    with pytest.raises(StreamError, match=r"rows\.jsonl gives no example"):
        train.some(none, 3, seed=0)
    few, _ = opened(source, max_eval_rows=22)
    placed = few.examples(texts, seed=0, shares=2).shard(2, 1)
    with pytest.raises(StreamError, match=r"share 2 of 2 of .*, every 2th row, gives nothing to train on"):
        next(iter(placed))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # pandas leaves a CSV open of which it reads a part
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "folder", "python-docs"])
def test_rows_of_a_stream_are_those_of_its_source(kind, source, tmp_path):
    rows = datasets.Dataset.from_list([{"text": text, "n": at} for at, text in enumerate(TEXTS)])
    column = {}
    if kind == "csv":
        rows.to_csv(source := str(tmp_path / "rows.csv"))
    elif kind == "parquet":
        rows.to_parquet(source := str(tmp_path / "rows.parquet"))
    elif kind == "txt":
        for at, text in enumerate(TEXTS):
            (tmp_path / f"{at:02}.txt").write_text(f"{text}\n\nand more\n")
        source = str(tmp_path / "*.txt")
    elif kind == "folder":
        rows.save_to_disk(source := str(tmp_path / "saved"))
    elif kind == "python-docs":
        source, column = kind, {"text_column": "topic"}
    every, rest = load_data(DataConfig(source=source, **column))
    train, held_out = opened(source, **column, max_eval_rows=3, chunk_rows=4, shuffle_rows=0)
    if kind == "python-docs":  # which has a held-out split
        assert held_out["text"][:] == rest["text"][:3]
        assert one_round(train) == every["text"][:1000]
    else:
        wanted = sorted([*every["text"], *rest["text"]])
        assert sorted([*held_out["text"], *one_round(train)]) == wanted
        assert len(wanted) == 23
    gc.collect()


def test_a_long_text_file_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 10)
    (tmp_path / "long.txt").write_text("one two three\nfour five six seven\nend")
    train, held_out = opened(str(tmp_path / "long.txt"), max_eval_rows=1, shuffle_rows=0)
    assert [*held_out["text"], *one_round(train)] == ["one two three\n", "four five six seven\n", "end"]


def test_hub_data_is_streamed_without_decoding_pictures(monkeypatch):
    rows = [{"image": Image.new("RGB", (2, 2), (40 * seed, 0, 0)), "label": "ab"[seed % 2]} for seed in range(6)]
    asked = []

    def load_dataset(name, config=None, **options):
        asked.append((name, config, options))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        made = datasets.Dataset.from_list(rows, features=features)
        return {"train": made.to_iterable_dataset(), "test": made.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held_out = opened("some/pictures", ("image", "label"), eval_split="test", max_eval_rows=2)
    assert asked == [("some/pictures", None, {"streaming": True})]
    assert len(held_out) == 2
    assert train.first.features["label"].names == ["a", "b"]
    assert set(train.first[0]["image"]) == {"bytes", "path"}
    assert len(train.some(lambda part: part, 100, seed=0)) == 6


def test_fields_of_columns(tmp_path):
    rows = [{"translation": {"en": text, "fr": text[::-1]}} for text in TEXTS]
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    names = {"source_column": "translation.en", "target_column": "translation.fr"}
    train, held_out = opened(source, ("source", "target"), **names, max_eval_rows=3, chunk_rows=4)
    assert held_out["target"][0] == TEXTS[0][::-1]
    pairs = train.some(lambda part: part, 100, seed=0)
    assert {(row["source"], row["target"]) for row in pairs} == {(text, text[::-1]) for text in TEXTS[3:]}


def broken(after):
    for number in range(after):
        yield {"text": f"text {number}"}
    raise OSError("the line went dead")


def made_of(rows, **options):
    its = {"wanted": {"text": "text"}, "source": "data", "folder": None, "chunk_rows": 2, "shuffle_rows": 0}
    return Stream(rows=rows, **{**its, **options})


def test_what_is_wrong_at_the_start_is_said_before_anything_is_read(tmp_path, source):
    train, _ = opened(source, max_eval_rows=3)
    missing = made_of(train.rows, wanted={"text": "title"})
    with pytest.raises(ValueError, match=r"data has no column 'title' \(text_column\); it has: n, text"):
        _ = missing.first
    with pytest.raises(ValueError, match=r"no column 'title' \(text_column\); it has: n, text"):
        opened(source, text_column="title")
    with pytest.raises(ValueError, match=r"column 'n' \(text_column\) holds int64; allowed: strings"):
        opened(source, text_column="n")
    rows, held_out = opened(source)
    assert len(held_out) == 23
    with pytest.raises(
        ValueError, match=r"rows.jsonl has no rows after the first 1,000, which are held out; allowed: a smaller max_e"
    ):
        _ = rows.first
    with pytest.raises(ValueError, match="python-docs has no split 'test'; it has: train, validation"):
        opened("python-docs", train_split="test")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        opened(str(tmp_path / "empty.jsonl"))


def test_what_is_wrong_further_on_is_named_when_it_comes(tmp_path):
    dead = datasets.IterableDataset.from_generator(broken, gen_kwargs={"after": 5})
    rows = iter(made_of(dead).examples(texts, seed=0, shares=1))
    assert [row["text"] for row in islice(rows, 4)] == ["text 0", "text 1", "text 2", "text 3"]
    with pytest.raises(StreamError, match="cannot read data after 4 rows: the line went dead"):
        next(rows)

    null = datasets.Dataset.from_dict({"text": ["a", "b", "c", None, "e"]}).to_iterable_dataset()
    with pytest.raises(
        StreamError, match=r"data, rows 3 to 4 as they were read: column 'text' \(text_column\) is null"
    ):
        made_of(null).some(texts, 100, seed=0)

    mixed = datasets.IterableDataset.from_generator(lambda: ({"label": one} for one in [1, 2, 3, "four"]))
    with pytest.raises(StreamError, match="data, rows 3 to 4 as they were read: something else than in the first rows"):
        made_of(mixed, wanted={"label": "label"}).some(lambda part: part, 100, seed=0)

    def refuse(part):
        if "c" in part["text"]:
            raise ValueError("no class for c")
        return texts(part)

    whole = datasets.Dataset.from_dict({"text": list("xabcde")}).to_iterable_dataset()
    of_one = iter(made_of(whole).examples(refuse, seed=0, shares=2).shard(2, 1))
    with pytest.raises(StreamError, match="data, rows 2 to 4 as they were read: no class for c"):
        next(of_one)


def test_of_a_streamed_file_the_head_is_checked(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nnull\n')
    with pytest.raises(ValueError, match="line 2 is null"):
        opened(str(path))
    monkeypatch.setattr(sources, "LOOKED_AT", 14)
    sources.check_file(path, sources.LOOKED_AT)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="chunk_rows=0; allowed: at least 1"):
        DataConfig(source="x", chunk_rows=0)
    with pytest.raises(ValueError, match="shuffle_rows=-1; allowed: at least 0"):
        DataConfig(source="x", shuffle_rows=-1)


def test_progress_bars_of_chunks_are_not_shown_and_those_of_others_are(source):
    train, _ = opened(source, max_eval_rows=3)
    datasets.enable_progress_bars()  # a comparison, in another test of this process, has them off from then on
    seen = []
    train.some(lambda part: seen.append(datasets.are_progress_bars_disabled()) or texts(part), 100, seed=0)
    assert set(seen) == {True}
    assert not datasets.are_progress_bars_disabled()
