"""``prepare check``: every problem is found and named by its line, and good data have none."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.builders.run import prepare
from minigpt5_jax.data.prepare.builders.shards import Job
from minigpt5_jax.data.prepare.builders.units import Raw
from minigpt5_jax.data.prepare.check import Findings, check
from minigpt5_jax.data.sources import Cc3mSource, Cc3mTarSource
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer

ASSETS = Path(__file__).parents[2] / "minigpt5_jax/shapes/assets"


def draw(path: Path, size=(12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def listed(findings: Findings) -> list[str]:
    """Problems without the folder."""
    return [f"{problem.where.rpartition('/')[2]}: {problem.reason}" for problem in findings.problems]


def table(folder: Path, *rows: str, header: str = "caption\timage_path", end: str = "\n") -> Path:
    for name in "abc":
        draw(folder / f"{name}.jpg")
    path = folder / "cc3m.tsv"
    path.write_bytes(end.join((header, *rows)).encode("utf-8"))
    return path


# -------------------------------------------------------------------------------------------- CC3M


def test_a_good_table(tmp_path):
    path = table(tmp_path, "A cat\ta.jpg", "A dog\tb.jpg", "Another cat\ta.jpg", end="\r\n")
    found = check(path)
    assert found.problems == [] and found.bad == 0
    assert (found.format, found.samples, found.images) == ("cc3m", 4, 3)
    assert found.sizes == {"12x9": 2}  # each file once
    assert found.notes["lines end in CR LF"][0] == 3
    assert found.notes["rows whose image another row has too"] == (1, f"{path}:4: a.jpg")
    assert "nothing is wrong" in found.summary(256)


def test_every_problem_of_a_table_is_listed(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(draw(tmp_path / "a.jpg").read_bytes()[:120])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    rows = [
        "A cat\ta.jpg",
        "no tab",
        " . !\tb.jpg",
        "A dog\t",
        "A cat\ta.jpg",
        "x\ty\tz",
        "",  # blank lines are skipped
        "gone\tnope.jpg",
        "gone too\tnope.jpg",
        "half\tbroken.jpg",
        "nothing\tempty.jpg",
        "words\ttext.jpg",
        "good\tc.jpg",
    ]
    path = table(tmp_path, *rows)
    data = path.read_bytes().replace(b"good\t", "café\t".encode("latin-1"))
    path.write_bytes(data)
    found = check(path)
    images, known = tmp_path, "JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF"
    assert listed(found) == [
        "cc3m.tsv:3: 1 tab-separated cells, the header has 2",
        "cc3m.tsv:4: empty caption",
        "cc3m.tsv:5: empty image_path",
        f"cc3m.tsv:6: the same caption and image as {path}:2",
        "cc3m.tsv:7: 3 tab-separated cells, the header has 2",
        f"cc3m.tsv:9: {images}/nope.jpg: image cannot be read (No such file or directory)",
        f"cc3m.tsv:10: {images}/nope.jpg: image cannot be read (No such file or directory)",
        listed(found)[7],  # PIL's own words
        f"cc3m.tsv:12: {images}/empty.jpg: image file is empty (0 bytes)",
        f"cc3m.tsv:13: {images}/text.jpg: no known image format (8 bytes); known: {known}",
        "cc3m.tsv:14: not UTF-8 (byte 0xe9 at column 4)",
    ]
    assert listed(found)[7].startswith(f"cc3m.tsv:11: {images}/broken.jpg: image is broken (")
    assert found.bad == 11 and "11 problems in 11 of 12 rows" in found.summary(256)
    assert (found.entries, found.samples, found.doubtful) == (12, 3, 5)
    assert "12 rows, 3 training samples (and 5 of rows with an unusable image)" in found.summary(256)


@pytest.mark.parametrize(
    "header, missing", [("caption\turl", "image_path"), ("text,file", "caption and image_path")]
)
def test_a_table_without_its_columns(tmp_path, header, missing):
    path = table(tmp_path, "A cat\ta.jpg", header=header)
    (problem,) = listed(check(path))
    assert problem.startswith(f"cc3m.tsv:1: no column {missing}, found ")
    assert check(path).summary(256).endswith("\n1 problem")


@pytest.mark.parametrize("name", ["it's mine.csv", "table.txt"])
def test_a_table_with_commas_is_told_how_it_becomes_one_with_tabs(tmp_path, name):
    given = table(tmp_path, '"A ""cat"", sitting",a.jpg', "A dog,b.jpg", header="caption,image_path").rename(
        tmp_path / name
    )
    with pytest.raises(DataError) as error:
        Cc3mSource(given)
    (problem,) = listed(check(given))
    for message in (problem, str(error.value)):
        command = message.partition("convert it with: ")[2].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert [Cc3mSource(tmp_path / "new.tsv").pair(row).caption for row in (0, 1)] == [
            'A "cat", sitting', "A dog"
        ]  # fmt: skip
        (tmp_path / "new.tsv").unlink()


def test_a_failed_image_is_named_wherever_it_is_used(tmp_path, monkeypatch):
    from minigpt5_jax.data.prepare import check as module

    monkeypatch.setattr(module, "BATCH", 2)
    path = table(tmp_path, *(f"row {i}\t{name}.jpg" for i, name in enumerate("axbxcxx")))
    assert [problem.where for problem in check(path).problems] == [f"{path}:{i}" for i in (3, 5, 7, 8)]


def test_processes_find_the_same(tmp_path):
    path = table(tmp_path, *(f"row {i}\t{name}.jpg" for i, name in enumerate("abxc")))
    alone, together = check(path), check(path, workers=1)
    assert listed(alone) == listed(together) and len(alone.problems) == 1
    assert alone.sizes == together.sizes == {"12x9": 3}


def test_images_that_cannot_be_padded_to_a_square(tmp_path):
    path = table(tmp_path, "wide\twide.png")
    Image.new("L", (20_000, 1)).save(tmp_path / "wide.png")
    (problem,) = listed(check(path))
    assert "a white square around this image of 20000x1 has over 89,478,485 pixels" in problem


def test_lengths_against_the_limit(tmp_path):
    path = table(tmp_path, "a\ta.jpg", "a large red circle " * 20 + "\tb.jpg")
    tokenizer = LlamaTokenizer(ASSETS / "llama/tokenizer.model")
    found = check(path, tokenizer=tokenizer, max_length=40)
    assert len(found.lengths) == found.samples == 3 and found.problems == []
    longest = (
        1 + len(tokenizer.encode(("a large red circle " * 20).strip())) + 8 + len(tokenizer.encode("###"))
    )
    assert found.longest == (longest, f"{path}:3") and max(found.lengths) == longest
    assert "1 are over --max_length 40" in found.summary(40)


def test_shards(tmp_path):
    image = draw(tmp_path / "a.jpg")
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / f"tars/0000{shard}.tar", "w") as tar:
            for row in range(2):
                (tmp_path / "caption").write_text("A cat" if row else " . ")
                tar.add(image, f"{shard}{row}.jpg")
                tar.add(tmp_path / "caption", f"{shard}{row}.txt")
    cut = tmp_path / "tars/00001.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    before = sorted(path.name for path in (tmp_path / "tars").iterdir())
    found = check(tmp_path / "tars")
    assert found.format == "cc3m_tar"
    assert [problem.reason for problem in found.problems if "empty" in problem.reason] == [
        "empty caption"
    ] * 2
    assert [p.where for p in found.problems] == [
        f"{tmp_path}/tars/00000.tar:00",
        f"{cut}",
        f"{tmp_path}/tars/00002.tar:20",
    ]
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == before  # nothing is written


def test_a_shard_that_may_not_be_read_does_not_hide_the_others(tmp_path, monkeypatch):
    image = draw(tmp_path / "a.jpg")
    (tmp_path / "caption").write_text("A cat")
    (tmp_path / "tars").mkdir()
    for shard in "01":
        with tarfile.open(tmp_path / f"tars/{shard}.tar", "w") as tar:
            tar.add(image, f"{shard}.jpg")
            tar.add(tmp_path / "caption", f"{shard}.txt")

    def refuse(shards, **options):  # the tests may run as root, who may read everything
        if shards == tmp_path / "tars/0.tar":
            raise PermissionError(13, "Permission denied", str(shards))
        return Cc3mTarSource(shards, **options)

    monkeypatch.setattr("minigpt5_jax.data.prepare.checks.files.Cc3mTarSource", refuse)
    found = check(tmp_path / "tars")
    assert listed(found) == ["0.tar: tar shard cannot be read (Permission denied)"]
    assert found.entries == 1 and found.samples == 2


# -------------------------------------------------------------------------------------------- VIST


def vist(folder: Path, stories: dict, mapping: dict | None = None) -> Path:
    for name in "abc":
        draw(folder / f"{name}.jpg")
    path = folder / "val_cleaned.json"
    path.write_text(json.dumps(stories, indent=1), encoding="utf-8")
    mapping = {name: f"{name}.jpg" for name in "abc"} if mapping is None else mapping
    (folder / "val_image_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return path


def steps(images: str) -> list[dict]:
    return [{"caption": f"text {k}", "image_id": p, "sequence_index": k} for k, p in enumerate(images)]


def test_stories(tmp_path):
    found = check(vist(tmp_path, {"1": steps("aabbc"), "2": steps("ab")}))
    assert found.problems == [] and found.samples == 13 + 4 and found.images == 7
    assert found.notes["stories without 5 steps"][0] == 1


def test_stories_that_are_wrong_are_all_listed(tmp_path):
    bad = steps("ab")
    del bad[1]["caption"]
    stories = {"10": steps("abc"), "11": steps("ax"), "12": bad, "13": [], "14": steps("abcd")}
    mapping = {"a": "a.jpg", "b": "b.jpg", "c": "c.jpg", "d": "gone.jpg", "e": "idle.jpg"}
    path = vist(tmp_path, stories, mapping)
    lines = path.read_text().splitlines()
    line = {name: 1 + lines.index(f' "{name}": [') for name in ("10", "11", "12", "14")}
    problems = listed(check(path))
    assert len(problems) == 4
    assert problems[0].startswith(f"val_cleaned.json:{line['11']}: story 11: step 1.image_id: image x is not")
    assert problems[1].startswith(f"val_cleaned.json:{line['12']}: story 12: step 1: lacks caption")
    assert problems[2].endswith("story 13: no steps")
    assert problems[3].startswith(f"val_cleaned.json:{line['14']}: {tmp_path}/gone.jpg: image cannot be read")


def test_json_that_is_cut_or_repeats_itself(tmp_path):
    path = vist(tmp_path, {"1": steps("abcab"), "2": steps("ab")})
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    (problem,) = listed(check(path))
    assert problem.startswith("val_cleaned.json:") and "no valid JSON" in problem and "cut off" in problem
    path.write_text('{"1": [],\n"2": [],\n"1": []}')
    problems = listed(check(path))
    assert "val_cleaned.json:1: key '1' occurs twice" in problems
    path.write_text("[" * 100_000)
    (problem,) = listed(check(path))
    assert problem.startswith("val_cleaned.json:1: ") and "recursion" in problem
    path.write_bytes(whole.replace("text 1", "caf\xe9").encode("latin-1"))
    (problem,) = listed(check(path))
    assert "not UTF-8 (byte 0xe9)" in problem
    (tmp_path / "val_image_mapping.json").unlink()
    with pytest.raises(DataError, match="not found"):
        check(path)


# ------------------------------------------------------------------------------- MMDialog and JSONL


def test_dialogues(tmp_path):
    draw(tmp_path / "7.jpg")

    def talk(number: int, *turns: list) -> str:
        return json.dumps({"conversation_id": number, "conversation": [{"turn": turn} for turn in turns]})

    text, media = lambda words: {"__TEXT__": words}, lambda name: {"__MEDIA__": name}
    lines = [
        talk(1, [text("hello"), media("7")], [text("hi")]),
        talk(2, [text("hello"), media("8")], [text("hi")]),
        talk(1, [text("a")], [text("b")]),
        talk(3, [text("a")], [text("")]),
        talk(4, [text("a"), media("7"), media("7")], [text("word " * 60)]),
        talk(5, [text("alone")]),
        talk(6, [text("a"), text("b")], [text("c")]),
        talk(7, [text("[IMG0]")], [text("b")]),
        talk(8, [text("a")], [text("b")])[:-9],
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    tokenizer = LlamaTokenizer(ASSETS / "llama/tokenizer.model")
    found = check(path, tokenizer=tokenizer)
    assert found.format == "mmdialog"
    problems = listed(found)
    wanted = [
        (2, "8.jpg: image cannot be read"),
        (3, "conversation_id was used in line 1 already"),
        (4, "turn 1: no text; the dialogue ends before it"),
        (6, "turn 0: the dialogue has 1 turns"),
        (7, "turn 0: has 2 texts"),
        (8, "[IMG0]"),
        (9, "no valid JSON"),
    ]
    assert len(problems) == len(wanted)
    for problem, (line, words) in zip(problems, wanted):
        assert problem.startswith(f"train.jsonl:{line}: ") and words in problem
    assert (found.samples, found.doubtful) == (1, 1), "line 2 lacks its image, line 5 is over 50 tokens"
    assert found.notes["turns: further images of a turn"][0] == 1
    assert found.notes["turns: over 50 tokens"][0] == 1


def test_jsonl_of_ones_own(tmp_path):
    draw(tmp_path / "a.jpg")
    answer = {"role": "assistant", "content": "Yes."}
    lines = [
        {"caption": "A cat", "image": "a.jpg", "id": "one"},
        {"caption": "A cat", "image": "b.jpg", "id": "one"},
        {"caption": "A cat"},
        {"turns": [{"role": "user", "content": "###"}, answer]},
        {"turns": [{"role": "user", "content": "Hello"}]},
        {"turns": [{"role": "user", "content": [{"type": "image", "path": "c.jpg"}]}, answer]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), '{"caption": "cut', "[1]"]))
    found = check(path)
    problems = listed(found)
    assert found.format == "jsonl" and (found.samples, found.doubtful) == (1, 1)
    wanted = [
        (2, "id 'one' was used in line 1 already"),
        (3, "lacks image"),
        (4, "text contains ###"),
        (5, "no assistant turn"),
        (6, "c.jpg"),
    ]
    wanted += [(7, "no valid JSON"), (8, "expected an object, found list")]
    assert len(problems) == len(wanted)
    for problem, (line, words) in zip(problems, wanted):
        assert problem.startswith(f"own.jsonl:{line}: ") and words in problem


# ---------------------------------------------------------------------------------- prepared, format


def test_prepared_data(tmp_path):
    path = table(tmp_path / "raw", "A cat\ta.jpg", "A dog\tb.jpg", "A fish\tc.jpg")
    folder = prepare(Job.plan(Raw("cc3m", str(path)), tmp_path / "out", num_shards=3), show_progress=False)
    found = check(tmp_path / "out")
    assert (found.format, found.entries, found.images, found.problems) == ("prepared", 3, 3, [])
    assert found.samples == check(path).samples == 3 + 1  # the instruction sample of row 0 with them
    shard = next(folder.glob("*00001-of-00003"))
    shard.write_bytes(shard.read_bytes()[:70])
    (problem,) = check(folder).problems
    assert problem.where.endswith("record 1") and "cannot be read" in problem.reason


def test_formats_that_cannot_be_told(tmp_path):
    with pytest.raises(DataError, match="nothing to check"):
        check(tmp_path / "none.tsv")
    with pytest.raises(DataError, match="nothing to check"):
        check(tmp_path / "none.tsv", format="cc3m")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"cannot tell what .*a\.txt is; give --format, one of cc3m, "):
        check(tmp_path / "a.txt")
    with pytest.raises(DataError, match="unknown format 'coco'"):
        check(tmp_path / "a.txt", format="coco")
    with pytest.raises(DataError, match="image folder not found"):
        check(table(tmp_path, "A cat\ta.jpg"), image_root=tmp_path / "nowhere")
    (tmp_path / "b.tsv").write_bytes(b" \n")
    with pytest.raises(DataError, match="is empty"):
        check(tmp_path / "b.tsv")
    with pytest.raises(DataError, match=r"is a folder; name one of the files in it: b\.tsv, cc3m\.tsv"):
        check(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no prepared split"):
        check(tmp_path / "empty")
    path = table(tmp_path, "A cat\ta.jpg").rename(tmp_path / "table")
    assert check(path).format == "cc3m" and check(path).guessed == "its header"
