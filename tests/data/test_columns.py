"""Pairs in columns: parquet files, and what Hugging Face ``datasets`` saves, written here by pyarrow."""

from __future__ import annotations

import io
import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.prepare.check import check
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import ColumnSource

RULES = PairRules(training=False)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


COLOURS = ("red", "lime", "blue", "white", "black")
ROWS = {
    "caption": [f"A {colour} square." for colour in COLOURS],
    "image": [{"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS],
}


def write(path, rows=ROWS):
    """A file as its suffix says: parquet in groups of two rows, or the stream that ``datasets`` saves."""
    table = pyarrow.table(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "data-00000-of-00001.arrow"])
def test_captions_and_images_by_row(name, tmp_path):
    source = ColumnSource(write(tmp_path / name), rules=RULES)
    again = pickle.loads(pickle.dumps(source))
    assert len(source) == 5 and again.fingerprint() == source.fingerprint()
    for row in (4, 0, 2, 3, 1):
        example = again[row]
        assert example.caption == f"a {COLOURS[row]} square" and example.item_id == f"cc3m_{row}"
        assert load_image(example.target_image).getpixel((0, 0)) == Image.new(
            "RGB", (1, 1), COLOURS[row]
        ).getpixel((0, 0))
        assert again.texts(row) == [example.words]
    assert again[3].where == f"{tmp_path / name}:4"
    found = check(tmp_path / name)
    assert (found.format, found.entries, len(found.problems)) == ("parquet", 5, 0)


def test_a_folder_of_files_and_paths_as_images(tmp_path):
    (tmp_path / "red.png").write_bytes(png("red"))
    write(tmp_path / "b.parquet", {"text": ["two"], "image": ["../../etc/passwd"]})
    write(tmp_path / "a.parquet", {"text": ["one"], "image": ["red.png"]})
    source = ColumnSource(tmp_path, rules=RULES)
    assert [source.rows, source[0].caption] == [2, "one"]
    assert source[0].target_image == str(tmp_path / "red.png")
    with pytest.raises(SampleError, match="leads out of"):
        source[1]
    assert check(tmp_path).format == "parquet"


def test_rows_that_cannot_be_used(tmp_path):
    rows = {"caption": [None, "a", "b"], "image": [png("red"), None, b"no image"]}
    path = write(tmp_path / "a.parquet", rows)
    source = ColumnSource(path, rules=RULES)
    for row, message in (
        (0, "caption is NoneType, not a text"),
        (1, "image is NoneType: neither bytes nor a path"),
    ):
        with pytest.raises(SampleError, match=message):
            source[row]
    assert [problem.where.rpartition(":")[2] for problem in check(path).problems] == ["1", "2", "3"]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no .parquet or .arrow file at"):
        ColumnSource(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but nothing else")
    with pytest.raises(DataError, match="a.parquet cannot be read: "):
        ColumnSource(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column caption or text; columns found: \['url'\]"):
        ColumnSource(write(tmp_path / "b.parquet", {"url": ["x"]}))
    with pytest.raises(DataError, match="has columns and no rows"):
        ColumnSource(
            write(
                tmp_path / "c.parquet",
                {"caption": pyarrow.array([], "string"), "image": pyarrow.array([], "string")},
            )
        )
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(DataError, match="holds several splits; name the folder of one: train"):
        ColumnSource(tmp_path / "both")


def test_a_folder_of_several_splits_is_refused(tmp_path):
    hub = tmp_path / "hub"
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001"):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        write(hub / f"{name}.parquet")
    with pytest.raises(
        DataError, match=r"several splits: train \(data/train-0.*, validation .*folder of its"
    ):
        ColumnSource(hub)
    (hub / "train").mkdir()
    for file in (hub / "data").glob("train-*"):
        file.rename(hub / "train" / file.name)
    assert ColumnSource(hub / "train").rows == 10, "the remedy"
    with pytest.raises(DataError, match=r"several splits: .*train \(train/"):
        ColumnSource(hub)
    (tmp_path / "one").mkdir()
    for name in ("train-a", "testimonies", "values"):
        write(tmp_path / "one" / f"{name}.parquet")
    assert ColumnSource(tmp_path / "one").rows == 15, "words that only begin like a split"


def test_only_the_data_of_a_saved_folder_counts(tmp_path):
    for name in ("data-00000-of-00001", "cache-0123", "data-of-before"):
        write(tmp_path / f"{name}.arrow")
    assert ColumnSource(tmp_path).rows == 10, "caches are no data"
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert ColumnSource(tmp_path).rows == 5
    state.write_text(json.dumps({"_data_files": [{"filename": "data-00001-of-00002.arrow"}]}))
    with pytest.raises(DataError, match="lists data-00001-of-00002.arrow, which is not there; save .* again"):
        ColumnSource(tmp_path)
    state.write_text("{")
    with pytest.raises(
        DataError, match="state.json does not list the files of data .*save the dataset again"
    ):
        ColumnSource(tmp_path)
