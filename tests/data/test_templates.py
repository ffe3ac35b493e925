"""Templates against the recorded stage-1 batch and sequences written out by hand (fidelity 2.2, 5.2)."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text import prompts, templates
from minigpt5_jax.data.text.templates import IGNORE, IMAGE, clean_caption, expand, label_ids, target_text
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer, voken_text

VOKENS = list(range(1000, 1008))
NO = [IGNORE]


@pytest.fixture(scope="module")
def tokenizer(oracle_dir):
    return LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")


@pytest.mark.parametrize(
    "raw, clean",
    [
        ('A "Big" Dog!! (cute): #1; ~ok*', "a big dog cute 1 ok"),
        ("It's 5,000 - really?", "it's 5,000 - really?"),
        ("shot of the full tree .\n", "shot of the full tree"),
        ("tabs\t\tand\n\nlines", "tabs and lines"),
        (" ... ", ""),
    ],
)
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


def test_prompt_sets_differ_by_one_word():
    head, release = prompts.CC3M_PROMPTS["head"], prompts.CC3M_PROMPTS["release"]
    assert len(head) == len(release) == 7
    assert [(a, b) for a, b in zip(head, release) if a != b] == [
        ("an image with caption:", "a image with caption:")
    ]
    assert prompts.cc3m_instruction("a dog", head[0]) == (
        "You will be able to generate image according to command."
        "###Human: generate image with caption: a dog ###Assistant:"
    )


def test_target_text():
    assert target_text("", draws=True) == voken_text(8) + " ###"
    assert target_text("hi .", draws=True, num_vokens=2) == "hi . [IMG0][IMG1] ###"
    assert target_text("hi .", draws=False) == "hi . ###"


def test_dialog_source_joins_pieces_with_single_spaces():
    history = [("Human", f"look {IMAGE}"), ("Assistant", "nice"), ("Human", "more")]
    assert prompts.dialog_source("S.", history) == (
        "S. ###Human: look <Img><ImageHere></Img> ###Assistant: nice ###Human: more ###Assistant:"
    )


@pytest.mark.parametrize("row", [0, 1])
def test_expand_equals_the_recorded_batch(tokenizer, oracle_cases, row):
    source, target = (str(oracle_cases[f"s1/a/in/{name}"][row]) for name in ("source", "target"))
    got = expand(tokenizer, source, target, image_tokens=32, max_length=64)
    length = int(oracle_cases["s1/a/mid/llm_attention_mask"][row].sum())
    ids = oracle_cases["s1/a/in/input_ids"][row][: length - 1]
    assert got.tokens.tolist() == [tokenizer.bos_id, *ids.tolist()]
    assert got.labels.tolist() == oracle_cases["s1/a/mid/llm_labels"][row][:length].tolist()
    # The original's index is that of the state predicting [IMG0], one before it.
    assert got.voken_start == int(oracle_cases["s1/a/mid/voken_index"][row][1]) + 1
    assert (got.images, got.dropped) == ((), 0)


@pytest.mark.parametrize(
    "num_vokens, all_inner, want",
    [
        (8, False, [7, 1000, *NO * 6, 1007, 835]),
        (8, True, [7, 1000, *NO * 7, 835]),
        (2, False, [7, 1000, 1001, 835]),
        (2, True, [7, 1000, *NO, 835]),
        (1, False, [7, 1000, 835]),
        (1, True, [7, 1000, 835]),
    ],
)
def test_label_mask(num_vokens, all_inner, want):
    target = [7, *VOKENS[:num_vokens], 835]
    assert label_ids(target, 1000, num_vokens, mask_all_inner_vokens=all_inner) == want
    assert label_ids([7, 835], 1000, num_vokens) == [7, 835]


def test_expand_images_by_hand(tokenizer):
    # <Img> a </Img>: 327 274 981 / 367 274 981 as in the recorded ids of "<Img><ImageHere></Img>".
    got = expand(tokenizer, f"{IMAGE}{IMAGE}", voken_text(8) + " ###", image_tokens=3, max_length=64)
    img = 1008
    text = [1, 327, 274, 981, *[img] * 3]
    between = tokenizer.encode("</Img><Img>")
    assert got.tokens.tolist() == [*text, *between, *[img] * 3, 367, 274, 981, *VOKENS, 835]
    assert got.image_start == (4, 7 + len(between)) and got.images == (0, 1)
    assert got.voken_start == len(text) + len(between) + 6
    assert got.labels.tolist() == [*NO * got.voken_start, 1000, *NO * 6, 1007, 835]


def test_a_prompt_is_a_sample_without_target(tokenizer):
    got = expand(tokenizer, f"hello{IMAGE}", "", image_tokens=4, max_length=64)
    assert got.voken_start is None and (got.labels == IGNORE).all()
    assert (got.tokens == tokenizer.image_id).sum() == 4


def long_sample(tokenizer, **kwargs):
    """Two images and a tail; 1 + 7 + 4 * 2 + ... positions."""
    source = f"one{IMAGE}two{IMAGE} the lake ###"
    whole = expand(tokenizer, source, target_text("we went", draws=True), image_tokens=4, max_length=99)
    cut = expand(tokenizer, source, target_text("we went", draws=True), image_tokens=4, **kwargs)
    return whole, cut


@pytest.mark.parametrize("truncation", ["left_history", "right"])
def test_truncation_keeps_the_named_side_whole_images_and_all_vokens(tokenizer, truncation):
    whole = long_sample(tokenizer, max_length=99)[0]
    target = whole.tokens[-(8 + 1 + 2) :].tolist()  # we went, vokens, ###
    full_source = whole.tokens[1 : -len(target)].tolist()
    for length in range(len(target) + 1, len(whole.tokens)):
        cut = long_sample(tokenizer, max_length=length, truncation=truncation)[1]
        got = cut.tokens.tolist()
        assert len(got) <= length and got[0] == 1 and got[-len(target) :] == target
        source = got[1 : -len(target)]
        kept = full_source[len(full_source) - len(source) :] if truncation == "left_history" else full_source
        assert source == kept[: len(source)]
        assert source.count(tokenizer.image_id) == 4 * len(cut.images) == 4 * len(cut.image_start)
        assert all(got[s : s + 4] == [tokenizer.image_id] * 4 for s in cut.image_start)
        assert cut.images == ((0, 1), (0,) if truncation == "right" else (1,), ())[2 - len(cut.images)]
        assert cut.dropped == len(whole.tokens) - len(got)
        assert got[cut.voken_start : cut.voken_start + 8] == VOKENS
        assert len(cut.labels) == len(got)


STORY = f"S.###Human:we left{IMAGE}we swam{IMAGE}\n Tell me the next scene with image. ###Assistant:"
TALK = f"S. ###Human: one {IMAGE} ###Assistant: two ###Human: three {IMAGE} ###Assistant:"
RELEASE = "S.###Human: one\n###Assistant: two\n###Human: three\n###Assistant:"


@pytest.mark.parametrize(
    "source, want",
    [
        (STORY, [f"we left{IMAGE}", f"we swam{IMAGE}\n"]),
        (TALK, [f"###Human: one {IMAGE} ", "###Assistant: two "]),
        (RELEASE, ["###Human: one\n", "###Assistant: two\n"]),
        ("S.###Human: \n first step ###Assistant:", []),
        ("S.###Human: the scene description: we left ###Assistant:", []),
        ("a bare caption", []),
        (
            f"S.###Human:we left{IMAGE}\n What happen in the next scene image: {IMAGE} ###Assistant:",
            [f"we left{IMAGE}\n"],
        ),
    ],
)
def test_history_is_found_turn_by_turn_and_step_by_step(source, want):
    assert [source[start:stop] for start, stop in templates.history_spans(source)] == want


@pytest.mark.parametrize(
    "source, left",
    [
        (
            STORY,
            [
                f"S.###Human:we swam{IMAGE}\n Tell me the next scene with image. ###Assistant:",
                "S.###Human: Tell me the next scene with image. ###Assistant:",
            ],
        ),
        (
            TALK,
            [
                f"S. ###Assistant: two ###Human: three {IMAGE} ###Assistant:",
                f"S. ###Human: three {IMAGE} ###Assistant:",
            ],
        ),
    ],
)
def test_long_histories_lose_whole_turns_from_the_left(tokenizer, source, left):
    def expanded(words, length=999, **kwargs):
        target = target_text("we went", draws=True)
        return expand(tokenizer, words, target, image_tokens=4, max_length=length, **kwargs)

    sizes = [len(expanded(words).tokens) for words in (source, *left)]
    assert sizes[0] > sizes[1] > sizes[2]
    for length in range(sizes[2], sizes[0]):
        cut = expanded(source, length)
        want = expanded(left[0] if length >= sizes[1] else left[1])
        np.testing.assert_array_equal(cut.tokens, want.tokens)
        np.testing.assert_array_equal(cut.labels, want.labels)
        assert cut.dropped == sizes[0] - len(want.tokens) and cut.image_start == want.image_start
        assert cut.images == tuple(range(2 - len(want.images), 2)), "the newest images stay"
    assert len(expanded(source, sizes[2] - 1).tokens) == sizes[2] - 1, "a single turn is cut by tokens"
    fewer = expanded(source, max_images=1)
    np.testing.assert_array_equal(fewer.tokens, expanded(left[0]).tokens)
    assert fewer.images == (1,)


def test_truncation_by_images(tokenizer):
    whole, cut = long_sample(tokenizer, max_length=99, max_images=1)
    assert cut.images == (1,) and len(cut.image_start) == 1
    assert cut.tokens[1:].tolist() == whole.tokens[whole.image_start[0] + 4 :].tolist()


def test_a_target_longer_than_the_model_loses_text_never_vokens(tokenizer):
    words = "we went to the lake " * 20
    cut = expand(tokenizer, "hello", target_text(words, draws=True), image_tokens=4, max_length=30)
    assert len(cut.tokens) == 30
    assert cut.tokens[-9:].tolist() == [*VOKENS, 835] and cut.voken_start == 21
    assert cut.tokens[1:21].tolist() == tokenizer.encode(words)[:20]
    text_only = expand(tokenizer, "hello", target_text(words, draws=False), image_tokens=4, max_length=30)
    assert len(text_only.tokens) == 30 and text_only.voken_start is None
    with pytest.raises(DataError, match="7 positions are left for a target, its vokens and ending take 9"):
        expand(tokenizer, "hello", target_text("", draws=True), image_tokens=4, max_length=8)


def test_label_slots_bound_the_text_of_a_target(tokenizer):
    words = "we went to the lake " * 3
    whole = expand(tokenizer, "hello", target_text(words, draws=True), image_tokens=4, max_length=90)
    total = int((whole.labels != IGNORE).sum())
    for slots in range(3, total + 2):
        cut = expand(
            tokenizer,
            "hello",
            target_text(words, draws=True),
            image_tokens=4,
            max_length=90,
            max_targets=slots,
        )
        assert (cut.labels != IGNORE).sum() == min(slots, total)
        assert cut.tokens[-9:].tolist() == [*VOKENS, 835]
        assert cut.dropped == max(0, total - slots)


def test_unknown_truncation_is_an_error(tokenizer):
    with pytest.raises(DataError, match="'left_history' or 'right', got 'middle'"):
        expand(tokenizer, "a", "b", image_tokens=1, max_length=9, truncation="middle")


def test_written_special_tokens_are_found():
    assert templates.find_special("see [IMG12] there") == "[IMG12]"
    assert templates.find_special("an <ImageHere>") == "<ImageHere>"
    assert templates.find_special("an [IMG] <Img>") is None


def test_arrays_are_int32(tokenizer):
    got = expand(tokenizer, "a", "b", image_tokens=1, max_length=9)
    assert got.tokens.dtype == got.labels.dtype == np.int32
