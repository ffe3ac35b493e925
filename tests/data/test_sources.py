"""CC3M tables and JSONL files: what is read, and what is said about files that are wrong."""

from __future__ import annotations

import csv
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.prepare.builders.units import Raw
from minigpt5_jax.data.prepare.check import check
from minigpt5_jax.data.samples import records
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.records import RecordRules
from minigpt5_jax.data.sources import Cc3mSource, JsonlSource, Source, TextLines, VistSource, kinds
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.tokenizer import voken_text


def write_tsv(folder, rows, header="caption\timage_path", end="\n"):
    path = folder / "cc3m_val.tsv"
    path.write_bytes(end.join([header, *rows]).encode("utf-8"))
    return path


def captions(n):
    return [f"Picture number {i} .\tval/{i:09d}.jpg" for i in range(n)]


# ------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    "data, want",
    [
        (b"a\nb", {1: "a", 2: "b"}),
        (b"a\r\nb\r\n", {1: "a", 2: "b"}),
        (b"\xef\xbb\xbfa\n\n\r\nb\n\n", {1: "a", 4: "b"}),
        ("é中\n😀".encode(), {1: "é中", 2: "😀"}),
    ],
)
def test_lines_by_number(tmp_path, data, want):
    path = tmp_path / "lines.txt"
    path.write_bytes(data)
    lines = pickle.loads(pickle.dumps(TextLines(path)))
    assert {lines.number(i): lines[i] for i in range(len(lines))} == want


def test_lines_that_cannot_be_read(tmp_path):
    path = tmp_path / "lines.txt"
    with pytest.raises(DataError, match=r"not found: .*lines\.txt"):
        TextLines(path)
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match="empty"):
        TextLines(path)
    path.write_bytes("good\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"lines\.txt:2 is not UTF-8 \(byte 0xe9\).*iconv"):
        TextLines(path)


# -------------------------------------------------------------------------------------------- CC3M


def test_cc3m_training_and_test_samples(tmp_path):
    path = write_tsv(tmp_path, captions(2), end="\r\n")
    training, test = Cc3mSource(path), Cc3mSource(path, rules=PairRules(training=False))
    assert isinstance(training, Source)
    assert (len(training), len(test)) == (3, 2)  # 2 rows and the instruction of row 0
    assert [training[i].item_id for i in range(3)] == ["cc3m_0", "cc3m_0_instruction", "cc3m_1"]
    plain, instruction = training[0], training[1]
    assert plain.source == plain.caption == "picture number 0"
    assert plain.target == instruction.target == voken_text(8) + " ###"
    assert plain.images == () and plain.target_image == str(tmp_path / "val/000000000.jpg")
    assert plain.where == f"{path}:2" and training[2].where == f"{path}:3"
    wordings = {prompts.cc3m_instruction(plain.caption, p) for p in prompts.CC3M_PROMPTS["head"]}
    assert instruction.source in wordings and instruction.caption == plain.caption
    assert [test[i].item_id for i in range(2)] == ["cc3m_0", "cc3m_1"]
    with pytest.raises(IndexError):
        test[2]


def test_cc3m_every_hundredth_row_gives_a_second_sample(tmp_path):
    source = Cc3mSource(write_tsv(tmp_path, captions(201)))
    ids = [source[i].item_id for i in range(len(source))]
    assert len(ids) == 204 and sorted(set(ids)) == sorted(ids)
    assert [i for i in ids if "instruction" in i] == [f"cc3m_{r}_instruction" for r in (0, 100, 200)]
    assert [i for i in ids if "instruction" not in i] == [f"cc3m_{r}" for r in range(201)]


@pytest.mark.parametrize("every, extra", [(0, 0), (1, 7), (3, 3), (7, 1)])
def test_cc3m_instruction_rate_is_a_setting(tmp_path, every, extra):
    source = Cc3mSource(write_tsv(tmp_path, captions(7)), rules=PairRules(instruction_every=every))
    ids = [source[i].item_id for i in range(len(source))]
    assert len(set(ids)) == len(ids) == 7 + extra
    assert [i for i in ids if "instruction" not in i] == [f"cc3m_{r}" for r in range(7)]
    assert sum("instruction" in i for i in ids) == extra
    with pytest.raises(DataError, match="got -1"):
        Cc3mSource(write_tsv(tmp_path, captions(7)), rules=PairRules(instruction_every=-1))


def test_cc3m_wording_is_drawn_by_seed_row_and_epoch(tmp_path):
    path = write_tsv(tmp_path, captions(4000))
    words = lambda source, epoch: [source.example(101 * k + 1, epoch).source for k in range(40)]  # noqa: E731
    source = Cc3mSource(path)
    assert words(source, 3) == words(Cc3mSource(path), 3)
    another = Cc3mSource(path, rules=PairRules(seed=1))
    assert words(source, 3) != words(source, 4) and words(source, 3) != words(another, 3)
    fixed = Cc3mSource(path, rules=PairRules(resample_prompts=False))
    assert words(fixed, 3) == words(fixed, 4) == words(source, 0)
    used = {p for p in prompts.CC3M_PROMPTS["head"] if any(p in w for w in words(source, 0))}
    assert len(used) == 7
    release = words(Cc3mSource(path, rules=PairRules(prompt_set="release")), 0)
    assert release == [w.replace(" an image with", " a image with") for w in words(source, 0)]


def test_cc3m_fingerprint_and_description(tmp_path):
    path = write_tsv(tmp_path, captions(3))
    prints = {Cc3mSource(path).fingerprint(), Cc3mSource(path, rules=PairRules(training=False)).fingerprint()}
    assert Cc3mSource(path).fingerprint() in prints and len(prints) == 2
    assert "4 samples of 3 rows" in Cc3mSource(path).describe()
    write_tsv(tmp_path, captions(4))
    assert Cc3mSource(path).fingerprint() not in prints


def test_cc3m_other_columns_and_folders(tmp_path):
    (tmp_path / "images").mkdir()
    path = write_tsv(tmp_path, ["7\ta.jpg\tA dog!"], header="id\timage_path\tcaption")
    example = pickle.loads(pickle.dumps(Cc3mSource(path, tmp_path / "images")))[0]
    assert (example.caption, example.target_image) == ("a dog", str(tmp_path / "images" / "a.jpg"))


def test_cc3m_files_that_are_wrong(tmp_path):
    with pytest.raises(DataError, match=r"not found: .*none\.tsv"):
        Cc3mSource(tmp_path / "none.tsv")
    path = write_tsv(tmp_path, captions(1), header="caption,image_path")
    with pytest.raises(
        DataError, match=r"cc3m_val\.tsv:1: no column caption and image_path.*'caption,image_path'"
    ):
        Cc3mSource(path)
    path = write_tsv(tmp_path, captions(1), header="caption\turl")
    with pytest.raises(DataError, match=r"no column image_path; columns found: \['caption', 'url'\]"):
        Cc3mSource(path)
    path = write_tsv(tmp_path, [])
    with pytest.raises(DataError, match="no rows"):
        Cc3mSource(path)
    path = write_tsv(tmp_path, captions(1))
    with pytest.raises(DataError, match="image folder not found"):
        Cc3mSource(path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="known: head, release"):
        Cc3mSource(path, rules=PairRules(prompt_set="new"))


def test_cc3m_rows_that_are_wrong_are_named_when_met(tmp_path):
    rows = ["good\ta.jpg", "no path", " . !\tb.jpg", "good\t ", "a\tb\tc"]
    source = Cc3mSource(write_tsv(tmp_path, rows), rules=PairRules(training=False))
    assert source[0].caption == "good"
    reasons = {
        1: "1 tab-separated cells, the header has 2",
        2: "empty caption",
        3: "empty image_path",
        4: "3 tab",
    }
    for row, reason in reasons.items():
        with pytest.raises(SampleError, match=reason) as caught:
            source[row]
        assert caught.value.where.endswith(f"cc3m_val.tsv:{row + 2}")


QUOTED = [
    '"a red ""big"" square"\tp/ok.jpg',
    '"a caption\nwith a newline"\t"p/ok2.png"',
    '"a caption\twith a tab"\tp/ok.jpg',
    'say "hello" twice\tp/ok.jpg',
    '"hello\tp/lone.jpg',
    '"never closed',
    "good\tp/ok.jpg",
]


def test_a_table_with_quotes_is_read_by_the_rules_of_pandas(tmp_path):
    """As the original reads it; a quote that is never closed takes no other rows with it."""
    path = write_tsv(tmp_path, QUOTED, header='"caption"\t"image_path"', end="\r\n")
    source = Cc3mSource(path, rules=PairRules(training=False))
    assert source.rows == 7
    pairs = [source.pair(row) for row in (0, 1, 2, 3, 4, 6)]
    captions = [
        'a red "big" square',
        "a caption\nwith a newline",
        "a caption\twith a tab",
        'say "hello" twice',
    ]
    assert [pair.caption for pair in pairs] == [*captions, '"hello', "good"]
    assert pairs[1].image == str(tmp_path / "p/ok2.png") and pairs[2].where == f"{path}:5"
    with pytest.raises(SampleError, match=r"tsv:8: opens a quote that it does not close; .*QUOTE_NONE"):
        source.pair(5)
    found = check(path)
    assert found.doubtful == 6 + 1 and found.entries == 7, "the check reads the same rows"
    assert [p.where for p in found.problems if "opens a quote" in p.reason] == [f"{path}:8"]


def test_quoted_cells_are_those_of_the_csv_module(tmp_path):
    random = np.random.default_rng(0)
    rows = [["".join(random.choice(list('ab"\n '), 5)) + "x", "i.jpg"] for _ in range(100)]
    path = tmp_path / "t.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([["caption", "image_path"], *rows])
    source = Cc3mSource(path, rules=PairRules(training=False))
    squeeze = lambda text: re.sub("\n+", "\n", text)  # blank lines are not kept # noqa: E731
    assert [squeeze(source.pair(row).caption) for row in range(source.rows)] == [
        squeeze(row[0]) for row in rows
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"caption": "a", "image": "b.jpg"}', "looks like JSONL: read it with data.format=jsonl"),
        ("caption\turl", "table of URLs and not of images: fetch the images first"),
        (
            "a dog\thttps://host/a.jpg",
            r"give it a header, with: \(printf 'caption.turl.n'; cat cc3m_val.tsv\)",
        ),
    ],
)
def test_files_that_are_no_tables_of_images(tmp_path, header, message):
    path = write_tsv(tmp_path, ["a cat\tb.jpg"], header=header)
    with pytest.raises(DataError, match=message):
        Cc3mSource(path)
    assert any(re.search(message, problem.reason) for problem in check(path, format="cc3m").problems)


def test_a_table_without_rows_does_not_pass_the_check(tmp_path):
    path = write_tsv(tmp_path, [])
    assert [problem.reason for problem in check(path).problems] == ["a header and no rows"]
    with pytest.raises(DataError, match="a header and no rows"):
        Cc3mSource(path)


def test_images_outside_of_their_folder_are_refused_unless_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    inside = tmp_path / "in" / "a.jpg"
    names = ["a.jpg", "b/../a.jpg", str(inside), "../../etc/passwd", "/etc/passwd", "https://host//a.jpg"]
    table = write_tsv(tmp_path / "in", [f"a\t{name}" for name in names])
    lines = [json.dumps({"caption": "a", "image": name}) for name in names]
    own = write_jsonl(tmp_path / "in", lines)
    refused = {3: "leads out of the image folder", 4: "leads out of", 5: "is a URL.*img2dataset"}
    for open_source in (Cc3mSource, JsonlSource):
        path = table if open_source is Cc3mSource else own
        rules = PairRules(training=False) if open_source is Cc3mSource else RecordRules()
        closed, opened = (open_source(path, rules=rules, allow_outside_images=a) for a in (False, True))
        for row in range(6):
            if row in refused:
                with pytest.raises(SampleError, match=refused[row]):
                    closed.example(row)
            else:
                assert Path(closed.example(row).target_image).resolve() == inside
        assert opened.example(4).target_image == "/etc/passwd"
        found = check(path).problems
        assert [sum(words in p.reason for p in found) for words in ("leads out of", "is a URL")] == [2, 1]
        assert not any("leads out" in p.reason for p in check(path, allow_outside_images=True).problems)
    with pytest.raises(SampleError, match="allow_outside_images"):
        write_vist(tmp_path / "in", "../x.jpg", False)[0]
    assert write_vist(tmp_path / "in", "../x.jpg", True)[0].target_image == f"{tmp_path}/in/../x.jpg"


def write_vist(folder, image, allowed):
    step = {"caption": "a", "image_id": "1", "sequence_index": 0}
    (folder / "a_cleaned.json").write_text(json.dumps({"7": [step]}))
    (folder / "a_image_mapping.json").write_text(json.dumps({"1": image}))
    return VistSource(folder / "a_cleaned.json", allow_outside_images=allowed)


# ------------------------------------------------------------------------------------------- JSONL

PAIR = {"caption": "A red fox!", "image": "fox.jpg"}
STORY = {
    "id": "walk-7",
    "system": "S.",
    "turns": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "We left."},
                {"type": "image", "path": "1.jpg"},
                {"type": "text", "text": "And then?"},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "A lake."},
                {"type": "image", "path": "2.jpg", "caption": "a lake"},
            ],
        },
        {"role": "user", "content": "Nice."},
        {"role": "assistant", "content": "Yes."},
    ],
}


def write_jsonl(folder, items):
    path = folder / "own.jsonl"
    path.write_text("\n".join(i if isinstance(i, str) else json.dumps(i) for i in items), encoding="utf-8")
    return path


def test_jsonl_samples(tmp_path):
    source = JsonlSource(write_jsonl(tmp_path, [PAIR, STORY]))
    assert isinstance(source, Source) and len(source) == 3
    assert "3 samples of 2 lines" in source.describe()
    pair, first, second = (pickle.loads(pickle.dumps(source))[i] for i in range(3))
    assert (pair.source, pair.caption, pair.item_id, pair.task) == ("a red fox", "a red fox", "own_1", "pair")
    assert (pair.target, pair.target_image) == (voken_text(8) + " ###", str(tmp_path / "fox.jpg"))
    image = "<Img><ImageHere></Img>"
    assert first.source == f"S. ###Human: We left. {image} And then? ###Assistant:"
    assert first.target == f"A lake. {voken_text(8)} ###"
    assert first.images == (str(tmp_path / "1.jpg"),) and first.target_image == str(tmp_path / "2.jpg")
    assert (first.caption, first.item_id, first.task) == ("a lake", "walk-7_1", "dialog")
    assert second.source == (
        f"S. ###Human: We left. {image} And then? ###Assistant: A lake. {image} ###Human: Nice. ###Assistant:"
    )
    assert second.target == "Yes. ###" and second.target_image is None and second.caption is None
    assert second.images == (str(tmp_path / "1.jpg"), str(tmp_path / "2.jpg"))
    assert second.where == f"{tmp_path / 'own.jsonl'}:2"
    assert source.texts(2) == [(second.source, second.target)]


def test_an_answer_with_several_images_is_learnt_in_stretches(tmp_path):
    """Each draws one image, and the answer up to there stands before it as the model writes it."""

    def drawn(name):
        return {"type": "image", "path": name, "caption": name.upper()}

    talk = turns(
        ("user", "Tell."),
        ("assistant", ["A.", "a.jpg", "B.", "b.jpg", "C."]),
        ("user", "So?"),
        ("assistant", "D."),
    )
    content = [
        drawn(part) if "jpg" in part else {"type": "text", "text": part}
        for part in talk["turns"][1]["content"]
    ]
    talk = {"id": "t", "system": "", **talk}
    talk["turns"][1]["content"] = content
    source = JsonlSource(write_jsonl(tmp_path, [talk]))
    one, two, three, last = (source[number] for number in range(len(source)))
    voken, opening = voken_text(8), "###Human: Tell. ###Assistant:"
    assert (one.source, one.target) == (opening, f"A. {voken}")
    assert (two.source, two.target) == (f"{opening} A. {voken}", f"B. {voken}")
    assert (three.source, three.target) == (f"{opening} A. {voken} B. {voken}", "C. ###")
    assert [Path(e.target_image).name if e.target_image else None for e in (one, two, three)] == [
        "a.jpg",
        "b.jpg",
        None,
    ]
    assert [e.caption for e in (one, two, three)] == ["A.JPG", "B.JPG", None]
    assert [e.item_id for e in (one, two, three, last)] == ["t_1.0", "t_1.1", "t_1.2", "t_3"]
    assert not one.images and len(last.images) == 2, "later turns read them as images"
    assert last.source.count("<ImageHere>") == 2 and "[IMG" not in last.source
    kind = kinds.RecordKind(records.RecordRules())
    line = json.dumps({"record": json.dumps(talk), "name": "n", "where": "w"})
    assert kind.counts([line], np.array([0]), None) == [4]
    assert kind.texts(json.loads(line), 1) == [(two.source, two.target)]


def test_a_record_that_ends_in_a_user_turn_is_a_prompt(tmp_path):
    record = records.parse_record(json.dumps({"turns": STORY["turns"][:1]}), "own.jsonl:1")
    source, images = records.prompt_of(record, 1, tmp_path)
    assert source.startswith(prompts.DIALOG_SYSTEM + " ###Human: We left. <Img>")
    assert source.endswith("And then? ###Assistant:") and images == (str(tmp_path / "1.jpg"),)
    with pytest.raises(SampleError, match="no assistant turn"):
        JsonlSource(write_jsonl(tmp_path, [{"turns": STORY["turns"][:1]}]))[0]


def turns(*contents):
    return {"turns": [{"role": role, "content": content} for role, content in contents]}


IMAGE = {"type": "image", "path": "a.jpg"}
BROKEN = [
    ('{"caption": "a", "ima', "no valid JSON .* cut off"),
    ("[1]", "expected an object, found list"),
    ({"caption": "a"}, "lacks image"),
    ({"caption": "a", "image": "b", "url": "c"}, r"has unknown keys url \(known: caption, image, id\)"),
    ({"caption": " . ", "image": "b"}, "caption: text is empty"),
    ({"caption": "a", "image": 7}, "image: expected text, found int"),
    ({"turns": []}, "turns: expected a list with at least one turn"),
    (turns(("human", "a")), r"turns\[0\].role: expected user or assistant, found 'human'"),
    (turns(("user", ""), ("assistant", "a")), r"turns\[0\].content\[0\].text: text is empty"),
    (turns(("user", []), ("assistant", "a")), r"turns\[0\].content: expected text or a list"),
    (turns(("user", [{"type": "video"}])), r"turns\[0\].content\[0\]: expected an object with type"),
    (turns(("user", [{"type": "image", "path": " "}])), r"content\[0\].path: path of an image is empty"),
    ('{"caption": "half \\ud83d", "image": "b"}', "caption: text is no Unicode at character 5"),
    (turns(("user", "see [IMG0]"), ("assistant", "a")), r"contains \[IMG0\]"),
    (turns(("user", "an <ImageHere>"), ("assistant", "a")), "contains <ImageHere>"),
    (turns(("user", "a ###Human: b"), ("assistant", "a")), "contains ###"),
    (turns(("user", "a"), ("assistant", "b")) | {"system": "see <ImageHere>"}, "system: text contains"),
    (turns((["user"], "a")), r"turns\[0\].role: expected user or assistant, found \['user'\]"),
    ('{"caption": "a", "image": "b.jpg", "caption": "c"}', "key 'caption' occurs twice in one object"),
    ("[" * 100_000, "no valid JSON .nested too deeply"),
    ('{"caption": "a", "image": "b.jpg", "id": ' + "9" * 5000 + "}", "a number with too many digits"),
    ({"caption": "a", "image": "b\0.jpg"}, "image: path of an image contains a null character"),
]


@pytest.mark.parametrize("item, reason", BROKEN)
def test_jsonl_lines_that_are_wrong(tmp_path, item, reason):
    path = write_jsonl(tmp_path, [PAIR, item])
    source = JsonlSource(path)
    assert len(source) == 2 and source[0].caption == "a red fox"
    assert "1 lines unusable" in source.describe()
    with pytest.raises(SampleError, match=rf"own\.jsonl:2: .*{reason}"):
        source[1]


def test_a_line_far_longer_than_a_record_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("minigpt5_jax.data.samples.fields.MAX_LINE", 100)
    source = JsonlSource(write_jsonl(tmp_path, [PAIR, {"caption": "a" * 100, "image": "b.jpg"}]))
    with pytest.raises(SampleError, match=r"jsonl:2: a line of 1\d\d characters; one record has at most 100"):
        source[1]


def test_jsonl_files_that_are_wrong(tmp_path):
    with pytest.raises(DataError, match="not found"):
        JsonlSource(tmp_path / "none.jsonl")
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(DataError, match="data file is empty"):
        JsonlSource(tmp_path / "own.jsonl")


def test_an_id_that_is_repeated_is_one_unusable_sample(tmp_path):
    """As `prepare check` and `prepare jsonl` count it, and within the error budget."""
    Image.new("RGB", (8, 8)).save(tmp_path / PAIR["image"])
    path = write_jsonl(tmp_path, [{**PAIR, "id": "x"}, PAIR, {**PAIR, "id": "x"}, {**PAIR, "id": "y"}])
    source, said = JsonlSource(path), "id 'x' was used in line 1 already"
    assert len(source) == 4 and [source[index].item_id for index in (0, 1, 3)] == ["x", "own_2", "y"]
    with pytest.raises(SampleError, match=rf"own\.jsonl:3: {said}"):
        source[2]
    units = Raw("jsonl", str(path)).open()
    with pytest.raises(SampleError, match=rf"own\.jsonl:3: {said}"):
        units[2]
    found = check(path)
    assert [str(problem) for problem in found.problems] == [f"{path}:3: {said}"] and found.samples == 3


def test_jsonl_fingerprint(tmp_path):
    path = write_jsonl(tmp_path, [PAIR])
    before = JsonlSource(path).fingerprint()
    assert before == JsonlSource(path).fingerprint()
    assert before != JsonlSource(path, rules=RecordRules(num_vokens=4)).fingerprint()
    write_jsonl(tmp_path, [PAIR, PAIR])
    assert JsonlSource(path).fingerprint() != before
