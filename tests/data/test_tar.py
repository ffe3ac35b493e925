"""CC3M in tar shards: the samples of the table, random access, and every way a shard can be wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import tar_index
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.data.sources.cc3m import Cc3mSource
from minigpt5_jax.data.sources.tar import Cc3mTarSource


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def members(first, count, caption="A dog, number {}!"):
    """What img2dataset puts into a shard, sample by sample."""
    for i in range(first, first + count):
        yield f"{i:09d}.jpg", jpeg(i)
        yield f"{i:09d}.txt", caption.format(i).encode()
        yield f"{i:09d}.json", json.dumps({"caption": "not this one", "key": f"{i:09d}"}).encode()


def write_tar(path, files, **kwargs):
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1234.5  # a fraction makes tarfile write a PAX header, as webdataset's writer does
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    write_tar(folder / "00000.tar", members(0, 3))
    write_tar(folder / "00001.tar", members(10000, 2))
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_samples_are_those_of_the_table(shards, tmp_path):
    keys = ["000000000", "000000001", "000000002", "000010000", "000010001"]
    lines = ["caption\timage_path"]
    for key in keys:
        lines.append(f"A dog, number {int(key)}!\t{key}.jpg")
        (tmp_path / f"{key}.jpg").write_bytes(jpeg(int(key)))
    (tmp_path / "table.tsv").write_text("\n".join(lines))
    for kwargs in ({}, {"training": False}, {"instruction_every": 2, "prompt_set": "release", "seed": 5}):
        rules = PairRules(**kwargs)
        table, tar = Cc3mSource(tmp_path / "table.tsv", rules=rules), Cc3mTarSource(shards, rules)
        assert len(tar) == len(table)
        for i in range(len(table)):
            want, got = table.example(i, 3), tar.example(i, 3)
            assert tar.texts(i) == table.texts(i)
            for field in ("source", "target", "caption", "task", "item_id", "images"):
                assert getattr(got, field) == getattr(want, field)
            assert got.target_image == open(want.target_image, "rb").read()


def test_a_source_is_a_source_and_travels_to_workers(shards):
    source = Cc3mTarSource(shards, rules=PairRules(training=False))
    assert isinstance(source, Source)
    example = pickle.loads(pickle.dumps(source))[4]
    assert example.caption == "a dog, number 10001" and example.where == f"{shards}/00001.tar:000010001"
    assert load_image(example.target_image).size == (8, 8)
    assert "CC3M test: 5 samples of 5 pairs in 2 tar shards" in source.describe()
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize("given", ["00001.tar", "*1.tar", "."])
def test_a_file_a_pattern_or_a_folder(shards, given):
    source = Cc3mTarSource(shards / given, rules=PairRules(training=False))
    assert source[len(source) - 1].caption == "a dog, number 10001"
    assert len(source) == (5 if given == "." else 2)


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_in_any_order_with_any_names(tmp_path, fmt):
    """Every dialect of tar that Python writes, with long names in a folder, as GNU tar would pack them."""
    folder = "part/" + "x" * 60 + "/" + "y" * 60
    files = [(f"{folder}/{name}", data) for name, data in members(0, 3)]
    files = [*files[::-1], ("./README", b"hello"), ("plain.PNG", jpeg(9)), ("plain.txt", "é".encode())]
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=fmt) as tar:
        tar.addfile(directory := tarfile.TarInfo("part"))
        assert directory.isreg()  # an empty file; then the real folder
        folder_info = tarfile.TarInfo("part/" + "x" * 60)
        folder_info.type = tarfile.DIRTYPE
        tar.addfile(folder_info)
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = Cc3mTarSource(path, rules=PairRules(training=False))
    captions = [source[i].caption for i in range(len(source))]
    assert captions == ["a dog, number 2", "a dog, number 1", "a dog, number 0", "é"]
    assert [source[i].target_image for i in range(4)] == [jpeg(2), jpeg(1), jpeg(0), jpeg(9)]


def test_the_places_are_tarfiles(shards):
    with tarfile.open(shards / "00000.tar") as tar:
        want = [(m.name, m.offset_data, m.size) for m in tar]
    got = [(m.name, m.start, m.size) for m in tar_index.read_members(shards / "00000.tar")]
    assert got == want


def test_missing_members_are_samples_that_cannot_be_fetched(tmp_path):
    files = [f for f in members(0, 3) if f[0] not in ("000000000.txt", "000000001.jpg")]
    files += [
        ("000000003.jpg", jpeg(3)),
        ("000000003.txt", b"caf\xe9"),
        ("000000004.jpg", jpeg(4)),
        ("000000004.txt", b" . "),
    ]
    source = Cc3mTarSource(write_tar(tmp_path / "00000.tar", files), rules=PairRules(training=False))
    assert len(source) == 5 and source[2].caption == "a dog, number 2"
    reasons = {
        0: "no caption (.txt)",
        1: "no image",
        3: "caption is not UTF-8 (byte 0xe9)",
        4: "empty caption",
    }
    for index, reason in reasons.items():
        with pytest.raises(SampleError) as caught:
            source[index]
        assert reason in str(caught.value) and f"00000.tar:00000000{index}" in str(caught.value)


def broken_shards(whole):
    nothing = io.BytesIO()
    tarfile.open(fileobj=nothing, mode="w").close()
    import gzip

    header = 512 + 512 + 512  # PAX header, its records, the member's header
    return {
        "zero bytes": (b"", r"empty \(0 bytes\)"),
        "no members": (nothing.getvalue(), "no samples"),
        "cut in a member": (whole[: header + 100], "cut short.*000000000.jpg ends at"),
        "cut in a header": (whole[:700], "cut short|without its end mark"),
        "cut between members": (whole[: header + 512 * 3], "without its end mark|cut short"),
        "half": (whole[: len(whole) // 2], "cut short|without its end mark"),
        "damaged": (whole[:1100] + b"zzz" + whole[1103:], "no tar header at byte 1,024.*damaged"),
        "no tar": (b"<html>404</html>" * 100, "no tar header at byte 0.*damaged"),
        "compressed": (gzip.compress(whole), "compressed; unpack it"),
    }


@pytest.mark.parametrize("kind", broken_shards(b"x" * 9999))
def test_a_broken_shard_is_one_error_that_names_it(shards, kind):
    data, reason = broken_shards((shards / "00000.tar").read_bytes())[kind]
    for path in shards.glob("*.tar"):
        path.unlink()
    (shards / "00007.tar").write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        Cc3mTarSource(shards)
    assert "00007.tar" in str(caught.value) or kind == "no members"
    assert not list(shards.glob("*.part"))


def test_every_cut_is_noticed(shards):
    """A shard without its last bytes is never taken for a smaller one."""
    whole = (shards / "00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for stop in range(512, end, 512):
        (shards / "00000.tar").write_bytes(whole[:stop])
        with pytest.raises(DataError, match="cut short|without its end mark"):
            list(tar_index.read_members(shards / "00000.tar"))


def usable(source):
    found = []
    for row in range(source.rows):
        try:
            found.append(source.pair(row).caption)
        except SampleError as error:
            assert "the same sample is in" in str(error)
    return found


def test_copies_are_counted_but_keys_may_begin_again_in_each_shard(shards):
    (shards / "00000 (1).tar").write_bytes((shards / "00000.tar").read_bytes())
    assert Cc3mTarSource(shards).rows == 8 and len(usable(Cc3mTarSource(shards))) == 5
    (shards / "more").mkdir()
    (shards / "00000 (1).tar").rename(shards / "more" / "00000.tar")
    both = Cc3mTarSource(shards.parent / "**" / "*.tar")
    assert both.rows == len(usable(both)) == 8
    write_tar(
        shards / "00001.tar", members(0, 3, "A cat, number {}!")
    )  # the same keys and sizes, other words
    assert len(usable(Cc3mTarSource(shards))) == 6


def test_names_with_dots_are_samples_of_their_own(tmp_path, caplog):
    """The key is what stands before the last dot; what only adds to a sample is counted and named."""
    names = ("22.05", "22.06", "photo.v2", "7")
    files = [f for name in names for f in ((f"{name}.jpg", jpeg(0)), (f"{name}.txt", name.encode()))]
    extra = [("7.mask.png", jpeg(1)), ("9.gif", b"GIF"), ("7.json", b"{}"), ("8.05.jpg", jpeg(2))]
    source = Cc3mTarSource(write_tar(tmp_path / "00000.tar", files), PairRules(training=False))
    assert [source.pair(row).caption for row in range(source.rows)] == list(names) and not source.unused
    source = Cc3mTarSource(write_tar(tmp_path / "00000.tar", files + extra), PairRules(training=False))
    assert [name for _, name in source.unused] == ["9.gif", "7.mask.png"] and "7.mask.png" in caplog.text
    with pytest.raises(SampleError, match=r"8\.05: no caption"):
        source.pair(4)


def test_a_sample_with_two_images_is_one_that_cannot_be_used(tmp_path):
    files = [("a.jpg", jpeg(0)), ("a.png", jpeg(1)), ("a.txt", b"x"), ("b.jpg", jpeg(2)), ("b.txt", b"y")]
    source = Cc3mTarSource(write_tar(tmp_path / "00000.tar", files), PairRules(training=False))
    assert source.pair(1).caption == "y"
    with pytest.raises(SampleError, match=r"00000\.tar:a: .*two images or two texts, the second is a\.png"):
        source.pair(0)


def member(name, size):
    """A tar header with any size field."""
    header = bytearray(512)
    header[: len(name)], header[124 : 124 + len(size)], header[156:157] = name, size, b"0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(record):
    header = tarfile.TarInfo("p")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    return header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (member(b"a.json", b"-0000001000"), "a.json .*has the size -512"),
        (pax(b"13 size=-512\n") + member(b"a.json", b"0"), "a.json .*has the size -512"),
        (pax(b"12 size=abc\n") + member(b"a.json", b"0"), "damaged PAX header"),
    ],
)
def test_sizes_that_are_none_end_the_reading(tmp_path, data, message):
    (tmp_path / "0.tar").write_bytes(data + bytes(1024))
    with pytest.raises(DataError, match=message):
        Cc3mTarSource(tmp_path)


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match=r"no regular file .*loop\.tar"):
            Cc3mTarSource(tmp_path, cache_dir=cache)
    (tmp_path / "loop.tar").unlink()
    (tmp_path / "gone.tar").symlink_to("nothing")
    with pytest.raises(DataError, match=r"no regular file .*gone\.tar"):
        Cc3mTarSource(tmp_path)


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match="no .tar file in the folder"):
        Cc3mTarSource(tmp_path)
    with pytest.raises(DataError, match="is no file, no folder and no pattern"):
        Cc3mTarSource(tmp_path / "*.tar")


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(shards, tmp_path, monkeypatch):
    calls = []
    make = tar_index.make_index
    monkeypatch.setattr(tar_index, "make_index", lambda path: calls.append(path.name) or make(path))
    first = Cc3mTarSource(shards)
    assert calls == ["00000.tar", "00001.tar"] and (shards / "00000.tar.index.npz").is_file()
    assert Cc3mTarSource(shards).fingerprint() == first.fingerprint() and len(calls) == 2
    write_tar(shards / "00001.tar", members(10000, 4))
    changed = Cc3mTarSource(shards)
    assert calls[2:] == ["00001.tar"] and changed.rows == 7
    assert changed.fingerprint() != first.fingerprint()
    (shards / "00000.tar.index.npz").write_bytes(b"PK damaged")
    assert Cc3mTarSource(shards).fingerprint() == changed.fingerprint() and calls[3:] == ["00000.tar"]
    Cc3mTarSource(shards, cache_dir=tmp_path / "cache")
    Cc3mTarSource(shards, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2 and len(calls) == 6


def test_a_folder_that_cannot_be_written_is_read_all_the_same(shards, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way of the cache folder")
    source = Cc3mTarSource(shards, cache_dir=tmp_path / "file" / "cache")
    assert source.rows == 5 and "is rebuilt by every run" in caplog.text


def test_the_fingerprint_is_of_content_and_meaning_not_of_names(shards):
    first = Cc3mTarSource(shards).fingerprint()
    os.utime(shards / "00000.tar", ns=(1, 1))
    (shards / "00001.tar").rename(shards / "00002.tar")
    assert Cc3mTarSource(shards).fingerprint() == first
    assert Cc3mTarSource(shards, rules=PairRules(training=False)).fingerprint() != first
    write_tar(shards / "00002.tar", members(10000, 2, "A cat, number {}!"))  # the same sizes
    assert Cc3mTarSource(shards).fingerprint() != first


def test_a_shard_that_shrinks_after_it_was_indexed_is_named(shards):
    source = Cc3mTarSource(shards, rules=PairRules(training=False))
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[:2048])
    with pytest.raises(SampleError, match="00001.tar:000010001: shard ends early"):
        source[4]
    (shards / "00001.tar").unlink()
    with pytest.raises(SampleError, match="00001.tar:000010001: shard cannot be read"):
        source[4]
