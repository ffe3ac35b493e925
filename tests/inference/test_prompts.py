"""Prompts from words and files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.check import check
from minigpt5_jax.data.samples.records import RecordRules
from minigpt5_jax.data.sources import JsonlSource
from minigpt5_jax.data.text.prompts import DIALOG_SYSTEM
from minigpt5_jax.data.text.templates import IMAGE
from minigpt5_jax.inference.prompts import file_prompts, text_prompt


def test_what_a_user_types_becomes_what_the_model_was_trained_on():
    assert text_prompt(" A Red  Fox!", [], dialog=False).source == "a red fox"
    head = f"{DIALOG_SYSTEM} ###Human:"
    asked = text_prompt("What next?", ["1.png", "2.png"], dialog=True)
    assert asked.source == f"{head} {IMAGE} {IMAGE} What next? ###Assistant:"
    assert asked.images == ("1.png", "2.png")
    for placeholder in ("<ImageHere>", IMAGE):
        placed = text_prompt(f"Look {placeholder} well", ["1.png"], dialog=True)
        assert placed.source == f"{head} Look {IMAGE} well ###Assistant:"
    with pytest.raises(DataError, match="ends a turn"):
        text_prompt("a ### b", [], dialog=True)
    with pytest.raises(DataError, match="--template dialog"):
        text_prompt("a dog", ["1.png"], dialog=False)


def test_records_become_prompts(tmp_path):
    ask = {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image", "path": "a.png"}]}
    answer = {"role": "assistant", "content": "I see."}
    file = tmp_path / "prompts.jsonl"
    lines = [{"caption": "A dog.", "image": "b.png"}, {"system": "", "turns": [ask, answer, ask]}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pair, dialog = file_prompts(file)
    assert (pair.source, pair.images) == ("a dog", ())
    assert dialog.source == (
        f"###Human: Look {IMAGE} ###Assistant: I see. ###Human: Look {IMAGE} ###Assistant:"
    )
    assert dialog.images == (str(tmp_path / "a.png"),) * 2
    file.write_text(json.dumps({"turns": [ask, answer]}))
    with pytest.raises(DataError, match=r"prompts.jsonl:1: a prompt ends in a user turn"):
        file_prompts(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="data file is empty"):
        file_prompts(file)


def test_image_paths_of_a_file_stay_in_its_folder(tmp_path):
    file = tmp_path / "in/prompts.jsonl"
    file.parent.mkdir()
    look = {"role": "user", "content": [{"type": "image", "path": "../a.png"}]}
    file.write_text(json.dumps({"turns": [look]}))
    with pytest.raises(
        DataError, match=r"prompts.jsonl:1: .*leads out of .*allow it: --allow_outside_images"
    ):
        file_prompts(file)
    (prompt,) = file_prompts(file, allow_outside_images=True)
    assert prompt.images == (f"{tmp_path}/in/../a.png",)
    file.write_text(json.dumps({"caption": "A dog.", "image": "../a.png"}))
    assert file_prompts(file)[0].images == (), "what a pair would draw is not read"


def test_lines_are_read_as_training_reads_them(tmp_path):
    """U+2028 and U+0085 in a string, a byte order mark, CR LF; what is not UTF-8 is one clear error."""
    file, captions = tmp_path / "prompts.jsonl", ("a red\u2028square", "a red\x85square")
    lines = [json.dumps({"caption": text, "image": "a.png"}, ensure_ascii=False) for text in captions]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rules = RecordRules()
    source = JsonlSource(file, rules=rules)
    assert [prompt.source for prompt in file_prompts(file)] == [source[i].source for i in range(2)]
    file.write_bytes('{"caption": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"prompts\.jsonl:1 is not UTF-8 \(byte 0xe9\).*iconv"):
        file_prompts(file)


@pytest.mark.parametrize("open_file", [file_prompts, JsonlSource, check])
def test_json_over_several_lines_is_one_error_whose_remedy_works(tmp_path, open_file):
    file = tmp_path / "pretty.jsonl"
    record = {"turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text(json.dumps(record, indent=2))
    with pytest.raises(DataError, match="one JSON value over several lines") as caught:
        open_file(file)
    assert f"python -m json.tool --no-indent {file.name} > new.jsonl" in str(caught.value)
    command = [sys.executable, "-m", "json.tool", "--no-indent", str(file)]
    new = tmp_path / "new.jsonl"
    new.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(JsonlSource(new)) == 1
    file.write_text("caption\timage\na\tb.png\n")
    if open_file is not check:  # which guesses that it is a table
        with pytest.raises(DataError, match="is a table, not JSONL.*data.format=cc3m"):
            open_file(file)
