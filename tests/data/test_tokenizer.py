"""Tokenizers against ids recorded from the original code; the stock model's golden ids where it is there."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer, voken_text


@pytest.fixture(scope="module")
def llama(oracle_dir):
    return LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")


@pytest.fixture(scope="module")
def clip(oracle_dir):
    return ClipTokenizer(oracle_dir / "tokenizer_clip")


@pytest.mark.parametrize("case", range(11))
def test_llama_ids_and_text_are_the_originals(llama, oracle_cases, case):
    text, ids = str(oracle_cases[f"s1/tok/text_{case}"]), oracle_cases[f"s1/tok/ids_{case}"]
    assert llama.encode(text) == ids.astype(int).tolist()
    assert llama.decode(ids) == str(oracle_cases[f"s1/tok/decoded_{case}"])


def test_llama_numbers(llama):
    assert (llama.vocab_size, llama.first_voken_id, llama.image_id, len(llama)) == (1000, 1000, 1008, 1009)
    assert llama.voken_ids == tuple(range(1000, 1008))
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 2)
    assert set(llama.identity()) == {"sha256", "vocab_size", "num_vokens", "bos_id"}


def test_llama_control_tokens_are_glued_to_the_next_word(llama):
    words = llama.encode("we went")
    assert llama.decode([1, *words, 1000, 835]) == "<s>we went [IMG0] ###"
    assert llama.decode([1, 1000, 835]) == "<s> [IMG0] ###"


def test_llama_written_control_tokens_stay_text(llama):
    assert llama.bos_id not in llama.encode("a <s> b") and llama.eos_id not in llama.encode("</s>")


def test_llama_other_voken_counts_and_table_sizes(oracle_dir):
    file = oracle_dir / "tokenizer_llama" / "tokenizer.model"
    padded = LlamaTokenizer(file, num_vokens=2, bos_id=2, vocab_size=1001)
    assert padded.encode("[IMG0][IMG1] <ImageHere>") == [1001, 1002, 1003]
    assert padded.encode("[IMG2]") != [1003]  # not a voken of this model: ordinary text
    assert padded.decode([1001, 1003]) == "[IMG0] <ImageHere>"
    assert padded.identity() != LlamaTokenizer(file, num_vokens=2, bos_id=1, vocab_size=1001).identity()
    with pytest.raises(DataError, match="id 1000 is outside"):
        padded.decode([1000])
    with pytest.raises(DataError, match="999 is less than the 1000 pieces"):
        LlamaTokenizer(file, vocab_size=999)


def test_llama_travels_to_workers(llama):
    text = "c0<Img><ImageHere></Img>c1 [IMG0]"
    assert pickle.loads(pickle.dumps(llama)).encode(text) == llama.encode(text)


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_llama_bad_file_is_one_clear_error(tmp_path, content):
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        LlamaTokenizer(file)


@pytest.mark.parametrize("case", ["empty", "0", "1"])
def test_clip_ids_are_the_originals(clip, oracle_cases, case):
    text = "" if case == "empty" else str(oracle_cases["s1/a/in/caption"][int(case)])
    ids, mask = clip.encode([text])
    np.testing.assert_array_equal(ids, oracle_cases[f"s1/sdtok/ids_{case}"])
    np.testing.assert_array_equal(mask, oracle_cases[f"s1/sdtok/mask_{case}"])


CAPTIONS = [
    "Hello, World!! it's 5,000 -- naïve café ÉÀ 中文  \n two\t",
    "x" * 300,
    "don't we'll I'M 12345 ... \u00a0 ??",
    "! a !",
    "word<|endoftext|>word",
]


def test_clip_equals_transformers(clip, oracle_dir):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(oracle_dir / "tokenizer_clip")
    want = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    ids, mask = pickle.loads(pickle.dumps(clip)).encode(CAPTIONS)
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"])
    assert ids.dtype == mask.dtype == np.int32


def test_clip_words_that_are_looked_up_are_the_rules(clip):
    """Plain ASCII takes a short cut; letters, digits, signs and white space of every kind, in any case."""
    random, signs = np.random.default_rng(0), "".join(map(chr, range(128)))
    alphabets = [signs, "ab c'sS 12_-.,", "don't we'LL they've I'm he'd  \t\n\x1c\x1f<|endoftext|>!", "Zz '"]
    for alphabet in alphabets:
        for _ in range(150):
            text = "".join(random.choice(list(alphabet), random.integers(0, 30)))
            ids, mask = clip.encode([text])
            want = clip._bpe.encode(text).ids[:75]
            assert ids[0, 1 : mask[0].sum() - 1].tolist() == want, repr(text)


def test_clip_other_length(oracle_dir):
    ids, mask = ClipTokenizer(oracle_dir / "tokenizer_clip", max_length=5).encode(["a b c d e", "a"])
    assert ids.shape == (2, 5) and ids[0, 0] == 526 and ids[0, 4] == 527
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_clip_bad_folder_is_one_clear_error(tmp_path, oracle_dir):
    with pytest.raises(DataError, match=r"vocab\.json"):
        ClipTokenizer(tmp_path)
    folder = tmp_path / "clip"
    shutil.copytree(oracle_dir / "tokenizer_clip", folder)
    (folder / "vocab.json").write_text('{"a": 0,')
    with pytest.raises(DataError, match="not readable"):
        ClipTokenizer(folder)
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(DataError, match="not in its vocabulary"):
        ClipTokenizer(folder)


# Section 11 of the reference; these need the stock 32,000-piece LLaMA model (499,723 bytes).
GOLDEN = {
    voken_text(8) + " ###": [*range(32000, 32008), 835],
    "hello###": [22172, 2277, 29937],
    "x\n###": [921, 13, 2277, 29937],
    "shot of the full tree": [10322, 310, 278, 2989, 5447],
    "burning candle on the background of the aquarium with small fish": [
        25535,
        23794,
        280,
        373,
        278,
        3239,
        310,
        278,
        10592,
        22826,
        411,
        2319,
        9427,
    ],
    "we ended the day shooting off some fireworks . " + voken_text(8) + " ###": [
        591,
        9698,
        278,
        2462,
        27904,
        1283,
        777,
        3974,
        13129,
        869,
        *range(32000, 32008),
        835,
    ],
}


@pytest.mark.skipif(
    not os.environ.get("MINIGPT5_LLAMA_TOKENIZER"),
    reason="set MINIGPT5_LLAMA_TOKENIZER=/path/to/stock/tokenizer.model to check the golden ids",
)
def test_stock_llama_golden_ids():
    from minigpt5_jax.data.text.templates import expand

    stock = LlamaTokenizer(os.environ["MINIGPT5_LLAMA_TOKENIZER"])
    for text, ids in GOLDEN.items():
        assert stock.encode(text) == ids
    assert stock.image_id == 32008
    assert stock.encode("<ImageHere></Img>")[1:] == [1533, 25518, 29958]
    assert stock.encode("a <Img>")[-3:] == [529, 25518, 29958]
    assert stock.encode("a.<Img>")[-3:] == [19423, 25518, 29958]
    assert stock.encode("a<Img>")[-3:] == [29966, 25518, 29958]

    caption = "burning candle on the background of the aquarium with small fish"
    row = expand(stock, caption, voken_text(8) + " ###", image_tokens=32, max_length=64)
    assert len(row.tokens) == 23 and row.voken_start == 14
    story = (
        "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images "
        "once I provide it to you. Please understanding images and generate story."
    )
    ids = stock.encode(story)
    assert (len(ids), ids[0], ids[-1]) == (37, 25538, 29889)
    demo = story + (
        "###Human:my sister arrived early to help me with the family bar bq.<Img><ImageHere></Img>"
        "every one else arrived soon after.<Img><ImageHere>\n Tell me the next scene with image. "
        "###Assistant:"
    )
    assert len(stock.encode(demo)) == 84
    assert len(expand(stock, demo, "", image_tokens=32, max_length=512).tokens) == 147


def clip_from_tokenizer_json(oracle_dir, folder, merges=None):
    """The oracle's CLIP tokenizer as newer versions of transformers write it."""
    folder.mkdir()
    vocab = json.loads((oracle_dir / "tokenizer_clip/vocab.json").read_text())
    lines = (oracle_dir / "tokenizer_clip/merges.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    model = {"type": "BPE", "vocab": vocab, "merges": merges or pairs, "end_of_word_suffix": "</w>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    shutil.copy(oracle_dir / "tokenizer_clip/tokenizer_config.json", folder)
    return folder


def test_clip_from_tokenizer_json_alone(oracle_dir, tmp_path):
    ours = ClipTokenizer(clip_from_tokenizer_json(oracle_dir, tmp_path / "new"))
    theirs = ClipTokenizer(oracle_dir / "tokenizer_clip")
    texts = ["a red circle", "", "The fox's den, 3 trees!", "\u00e9t\u00e9"]
    for mine, want in zip(ours.encode(texts), theirs.encode(texts), strict=True):
        np.testing.assert_array_equal(mine, want)
    assert ours.identity() != theirs.identity(), "a run says so where its tokenizer comes from another file"
    other = tmp_path / "new/tokenizer.json"
    other.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(DataError, match="no tokenizer of CLIP"):
        ClipTokenizer(tmp_path / "new")
    other.write_text("[]")
    with pytest.raises(DataError, match="new is not readable"):
        ClipTokenizer(tmp_path / "new")


def test_tokenizer_files_that_are_none(oracle_dir, tmp_path):
    path = tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"only tokenizer\.json.*put tokenizer\.model of the same model"):
        LlamaTokenizer(path)
    path.symlink_to("blobs/0")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model, a link to blobs/0, where nothing is"):
        LlamaTokenizer(path)
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match=r"Git LFS pointer; run `git lfs pull`"):
        LlamaTokenizer(path)
    path.unlink()
    shutil.copy(oracle_dir / "tokenizer_llama/tokenizer.model", path)
    assert len(LlamaTokenizer(path)) == 1009
