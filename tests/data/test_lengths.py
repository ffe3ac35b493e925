"""The length index: sizes as the template makes them, of the longest wording, kept in a file."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.data.batches import lengths
from minigpt5_jax.data.batches.lengths import length_index, measure
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.text.templates import IMAGE, expand, target_text
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer


class Words:
    """A source of texts alone."""

    ends_in_vokens = False
    image_root = ""

    def __init__(self, texts, name="a"):
        self._texts, self._name = texts, name

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, index):
        return self.example(index)

    def example(self, index, epoch=0):
        raise AssertionError("images are not needed to measure words")

    def texts(self, index):
        if self._texts[index] is None:
            raise SampleError("f:1", "unreadable")
        return self._texts[index]

    def fingerprint(self):
        return self._name

    def describe(self):
        return "words"


@pytest.fixture(scope="module")
def tokenizer(oracle_dir):
    return LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")


TEXTS = [
    [("the lake", target_text("", draws=True))],
    [("we", target_text("went", draws=False)), ("we went to the lake", target_text("went", draws=False))],
    None,
    [(f"one {IMAGE} two {IMAGE}", target_text("three", draws=True))],
]


def test_sizes_are_those_of_the_expanded_sample(tokenizer):
    index = measure(Words(TEXTS), tokenizer, image_tokens=5)

    def size(source, target):
        return len(expand(tokenizer, source, target, image_tokens=5, max_length=1000).tokens)

    whole = [max(size(*words) for words in texts or [("", "")]) for texts in TEXTS]
    assert index.lengths.tolist() == [whole[0], whole[1], 0, whole[3]]
    assert index.images.tolist() == [0, 0, 0, 2] and len(index) == 4


def test_the_index_is_made_once_for_what_it_depends_on(tokenizer, tmp_path, monkeypatch):
    made = []
    real = lengths.measure
    monkeypatch.setattr(lengths, "measure", lambda *args: made.append(1) or real(*args))
    first = length_index(Words(TEXTS), tokenizer, 5, tmp_path)
    again = length_index(Words(TEXTS), tokenizer, 5, tmp_path)
    assert made == [1]
    np.testing.assert_array_equal(first.lengths, again.lengths)
    length_index(Words(TEXTS, "b"), tokenizer, 5, tmp_path)
    length_index(Words(TEXTS), tokenizer, 6, tmp_path)
    assert len(made) == 3 and len(list(tmp_path.iterdir())) == 3


def test_a_broken_file_is_one_clear_error(tokenizer, tmp_path):
    length_index(Words(TEXTS), tokenizer, 5, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"length index .* is broken .*; delete it"):
        length_index(Words(TEXTS), tokenizer, 5, tmp_path)
