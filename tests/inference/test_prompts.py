"""Prompts from words and files."""

from __future__ import annotations

import json

import pytest

from minigpt5_jax.data.errors import DataError
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
    with pytest.raises(DataError, match="holds no record"):
        file_prompts(file)
