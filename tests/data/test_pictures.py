"""Columns of pictures: what is wrong with a row is said at once, and every picture becomes RGB."""

import gzip
import io
import struct

import datasets
import pytest
from conftest import write_rows
from PIL import Image

from attn_plugins.data.idx import idx_splits
from attn_plugins.data.pictures import check_pictures, read_pictures, rgb
from attn_plugins.data.sources import DataConfig, load_data


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_what_is_no_picture_is_named(tmp_path):
    whole = png(Image.new("RGB", (30, 30), "red"))
    (tmp_path / "whole.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder").mkdir()

    def wrong(*names):
        data = datasets.Dataset.from_dict({"image": list(names)})
        with pytest.raises(ValueError, match=r"^a\.jsonl") as error:
            check_pictures(read_pictures(data, "image", tmp_path), "image", "a.jsonl")
        return str(error.value).replace(str(tmp_path), "")

    check_pictures(
        read_pictures(datasets.Dataset.from_dict({"image": ["whole.png"]}), "image", tmp_path), "image", "a.jsonl"
    )
    assert wrong("whole.png", "none.png") == "a.jsonl: row 2 of 2, /none.png, is no file"
    assert wrong("folder") == "a.jsonl: row 1 of 1, /folder, is no file"
    assert wrong("whole.png", None) == "a.jsonl: row 2 of 2 is null"
    assert wrong("text.png").startswith("a.jsonl: row 1 of 1, /text.png, does not open: cannot identify image file")
    assert wrong("cut.png").startswith("a.jsonl: row 1 of 1, /cut.png, does not open: ")
    assert wrong("empty.jpg", "whole.png", "none.png").endswith("; and 1 more rows have no picture that opens")
    with pytest.raises(ValueError, match=r"a\.jsonl holds int64; allowed: pictures, or the paths of their files"):
        check_pictures(datasets.Dataset.from_dict({"image": [1]}), "image", "a.jsonl")


def test_a_picture_that_breaks_off_is_named_as_it_is_decoded(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-400])
    with pytest.raises(ValueError, match=r"a picture, .*cut\.jpg, cannot be decoded: image file is truncated"):
        rgb({"path": str(tmp_path / "cut.jpg"), "bytes": None})


def test_every_picture_becomes_rgb(tmp_path):
    def read(picture):
        return rgb({"path": None, "bytes": png(picture)})

    assert read(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert read(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert read(Image.new("RGBA", (2, 2), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert read(Image.new("LA", (2, 2), (9, 255))).getpixel((0, 0)) == (9, 9, 9)
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).quantize()
    assert read(palette).getpixel((0, 0)) == (10, 20, 30)
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert rgb({"path": str(tmp_path / "turned.jpg"), "bytes": None}).size == (2, 4)


@pytest.fixture
def stamps(tmp_path):
    """A folder of pictures in folders, with two tables at its top."""
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    rows = [{"image": f"cats/{number}.png", "text": f"{number}"} for number in range(3)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", [{"image": "dogs/2.png", "text": "2"}])
    return tmp_path


def test_tables_beside_their_pictures_are_its_splits(stamps):
    train, held_out = load_data(DataConfig(source=str(stamps)), ("image", "text"))
    assert [rgb(row["image"]).getpixel((0, 0)) for row in train] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert [row["text"] for row in held_out] == ["2"]
    (stamps / "validation.jsonl").unlink()
    train, held_out = load_data(DataConfig(source=str(stamps)), ("image", "text"))
    assert (len(train), len(held_out)) == (2, 1), "a table that is alone is the training split, whatever its name"


def test_a_folder_as_datasets_knows_it(stamps):
    (stamps / "train.jsonl").unlink()
    (stamps / "validation.jsonl").unlink()
    train, held_out = load_data(DataConfig(source=str(stamps), eval_fraction=0.3), ("image", "label"))
    assert (len(train), len(held_out)) == (4, 2)
    assert train.features["label"].names == ["cats", "dogs"]
    rows = [{"file_name": f"{number}.png", "text": f"{number}"} for number in range(3)]
    write_rows(stamps / "cats" / "metadata.jsonl", rows)
    train, held_out = load_data(DataConfig(source=str(stamps / "cats"), eval_fraction=0.3), ("image", "text"))
    for row in [*train, *held_out]:
        assert rgb(row["image"]).getpixel((0, 0)) == (int(row["text"]), 0, 0)


def idx(path, shape, content):
    path.write_bytes(gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content))


def test_idx_files_are_pictures_and_classes(tmp_path):
    for split, rows in (("train", 3), ("t10k", 2)):
        idx(tmp_path / f"{split}-images-idx3-ubyte.gz", (rows, 2, 3), bytes(range(6 * rows)))
        idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", (rows,), bytes(range(rows)))
    train, held_out = load_data(DataConfig(source=str(tmp_path), eval_split="test"), ("image", "label"))
    assert (train["label"][:], held_out["label"][:]) == ([0, 1, 2], [0, 1])
    picture = rgb(train[1]["image"])
    assert picture.size == (3, 2)
    assert [picture.getpixel((x, y))[0] for y in range(2) for x in range(3)] == list(range(6, 12))


def test_idx_files_that_are_not_whole_are_named(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    assert idx_splits(tmp_path) == {}
    idx(images, (2, 2, 2), bytes(8))
    with pytest.raises(ValueError, match=r"cannot read .*train-labels-idx1-ubyte\.gz: No such file"):
        idx_splits(tmp_path)
    idx(labels, (3,), bytes(3))
    with pytest.raises(ValueError, match="has 2 images, and its file of labels 3 labels"):
        idx_splits(tmp_path)
    idx(images, (2, 2, 2), bytes(7))
    with pytest.raises(ValueError, match="says that it holds 8 bytes, and holds 7"):
        idx_splits(tmp_path)
    idx(images, (8,), bytes(8))
    with pytest.raises(ValueError, match="is no idx file of bytes in 3 dimensions: it starts 00 00 08 01"):
        idx_splits(tmp_path)
    whole = labels.read_bytes()
    images.write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=r"cannot read .*images-idx3-ubyte\.gz: "):
        idx_splits(tmp_path)
