"""Every prompt as the original spells it, and CC3M's samples id by id (fidelity 5.2 to 5.4)."""

from __future__ import annotations

import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.templates import IMAGE

IMAGES_FIRST = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once "
    "I provide it to you. "
)


def test_system_prompts():
    assert prompts.CC3M_SYSTEM == "You will be able to generate image according to command."
    assert prompts.STORY_SYSTEM == IMAGES_FIRST + "Please understanding images and generate story."
    assert prompts.DIALOG_SYSTEMS == {
        "head": IMAGES_FIRST + "Please generate conversations with appropriate images.",
        "release": IMAGES_FIRST + "Please generate conversation with appropriate image.",
    }


CC3M = [
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
]


def test_cc3m_wordings_of_both_generations():
    assert list(prompts.CC3M_PROMPTS["head"]) == CC3M
    assert list(prompts.CC3M_PROMPTS["release"]) == [*CC3M[:5], "a image with caption:", CC3M[6]]


def test_story_wordings_of_both_generations():
    head = {
        "gen": ("Generate an image with the scene description: {text}", "the scene description: {text}"),
        "multimodal": (
            "Tell me the next scene with image.",
            "Generate the next scene with image.",
            "What should happen then?",
        ),
        "understanding": (
            "Tell me the next scene description by this image: <Img><ImageHere></Img>",
            "What happen in the next scene image: <Img><ImageHere></Img>",
        ),
    }
    assert prompts.STORY_PROMPTS["head"] == head
    older = ("Generate a image with the scene description: {text}", head["gen"][1])
    assert prompts.STORY_PROMPTS["release"] == {**head, "gen": older}


def test_story_source():
    assert prompts.story_source([], "R.") == prompts.STORY_SYSTEM + "###Human: R. ###Assistant:"
    assert prompts.story_source(["a .", IMAGE, "b .", IMAGE], "R.") == prompts.STORY_SYSTEM + (
        "###Human:a .<Img><ImageHere></Img>b .<Img><ImageHere></Img>\n R. ###Assistant:"
    )


def test_dialog_sources():
    said = [("Human", "a"), ("Assistant", "b")]
    assert prompts.dialog_source("S.", said, "Human") == "S. ###Human: a ###Assistant: b ###Human:"
    assert prompts.dialog_source("S.", said[:1]) == "S. ###Human: a ###Assistant:"
    assert prompts.dialog_source_release("S.", said, "Human") == "S.###Human: a\n###Assistant: b\n###Human:"


def test_unknown_prompt_set():
    prompts.check_prompt_set("release")
    with pytest.raises(DataError, match="unknown prompt_set 'old'; known: head, release"):
        prompts.check_prompt_set("old")


# Ids by the pieces of the tiny tokenizer: ▁You ▁will ▁be ▁able ▁to ▁generate ▁image ▁according ▁to ▁command
# .### Human :, and at the end ▁### Assistant :
SYSTEM = [337, 339, 322, 338, 279, 313, 270, 424, 279, 423, 334, 310, 977]
ASSISTANT = [835, 312, 977]
VOKENS = [1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 835]
LABELS = [1000, -100, -100, -100, -100, -100, -100, 1007, 835]
LAKE, WENT = [277, 650], [508, 822]  # ▁the ▁lake, ▁we ▁went
SPELT = "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"


@pytest.mark.parametrize(
    "caption, source, ids, voken",
    [
        ("A dog.", "a dog", [301, 806], 3),  # ▁a ▁dog
        ("the  LAKE!", "the lake", LAKE, 3),
        (
            "We went - to (the) lake",
            "we went - to the lake",
            [*WENT, 953, 48, 279, *LAKE],
            8,
        ),  # ▁ and the byte of -
    ],
)
def test_golden_cc3m(check_golden, caption, source, ids, voken):
    got = PairRules().example(Pair(7, caption, "7.jpg", "f:8"), instruction=False)
    check_golden(got, source, SPELT, ids, VOKENS, LABELS, voken)
    assert (got.item_id, got.caption) == ("cc3m_7", source)


@pytest.mark.parametrize(
    "prompt_set, number, caption, words, ids, voken",
    [
        # ▁generate ▁image ▁with ▁caption :
        (
            "head",
            0,
            "The lake.",
            "generate image with caption: the lake",
            [313, 270, 303, 422, 977, *LAKE],
            24,
        ),
        # ▁according ▁to ▁caption , ▁generate ▁image :
        (
            "head",
            4,
            "We went",
            "according to caption, generate image: we went",
            [424, 279, 422, 47, 313, 270, 977, *WENT],
            26,
        ),
        # ▁an ▁image ▁with ▁caption : in one generation of the code, ▁a in the other
        ("head", 5, "we went", "an image with caption: we went", [329, 270, 303, 422, 977, *WENT], 24),
        ("release", 5, "we went", "a image with caption: we went", [301, 270, 303, 422, 977, *WENT], 24),
    ],
)
def test_golden_cc3m_instruction(check_golden, prompt_set, number, caption, words, ids, voken):
    rules, pair = PairRules(prompt_set=prompt_set), Pair(100, caption, "100.jpg", "f:101")
    source = f"You will be able to generate image according to command.###Human: {words} ###Assistant:"
    assert rules.texts(pair, True)[number] == (source, SPELT)
    drawn = (rules.example(pair, True, epoch) for epoch in range(200))
    got = next(example for example in drawn if example.source == source)
    check_golden(got, source, SPELT, [*SYSTEM, *ids, *ASSISTANT], VOKENS, LABELS, voken)
    assert got.item_id == "cc3m_100_instruction"
