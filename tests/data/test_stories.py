"""Stories: samples, their order and wordings; strings, ids, labels and positions by hand (fidelity 5.3)."""

from __future__ import annotations

import os

import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.stories import (
    TASKS,
    Step,
    Story,
    StoryRules,
)
from minigpt5_jax.data.sources import VistSource
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.templates import expand
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer

TEXTS = ["we went .", "a dog .", "the lake .", "a dog ran .", "the end ."]
STORY = Story("77", tuple(Step(text, f"{n}.jpg", n) for n, text in enumerate(TEXTS)), "f.json: story 77")


def test_thirteen_samples_in_training_and_five_in_testing():
    assert StoryRules().samples(5) == [
        (0, "gen"),
        *((step, task) for step in (1, 2, 3, 4) for task in ("gen", "multimodal", "understanding")),
    ]
    assert len(StoryRules().samples(5)) == 13
    assert StoryRules(training=False).samples(5) == [(step, "gen") for step in range(5)]
    assert [len(StoryRules().samples(n)) for n in (0, 1, 2, 6)] == [0, 1, 4, 16]


def test_tasks_by_name_go_before_the_mode():
    assert StoryRules(training=False, tasks=("understanding", "gen")).samples(3) == [
        (0, "gen"),
        (1, "gen"),
        (1, "understanding"),
        (2, "gen"),
        (2, "understanding"),
    ]
    assert StoryRules(tasks=["multimodal"]).samples(2) == [(1, "multimodal")]
    with pytest.raises(DataError, match="some of gen, multimodal, understanding; got gen, draw"):
        StoryRules(tasks=("gen", "draw"))
    with pytest.raises(DataError, match="got none"):
        StoryRules(tasks=())


def test_names_and_images_of_every_sample():
    rules = StoryRules()
    got = [rules.example(STORY, *sample) for sample in rules.samples(5)]
    assert [example.item_id for example in got[:5]] == [
        "77_0-gen",
        "77_1-gen",
        "77_1-multimodal",
        "77_1-understanding",
        "77_2-gen",
    ]
    assert got[-1].item_id == "77_4-understanding" and got[-1].where == "f.json: story 77"
    assert {example.task for example in got} == {f"story-{task}" for task in TASKS}
    for (step, task), example in zip(rules.samples(5), got):
        before = tuple(f"{n}.jpg" for n in range(step))
        assert example.images == (before + (f"{step}.jpg",) if task == "understanding" else before)
        assert example.target_image == (None if task == "understanding" else f"{step}.jpg")
        assert example.source.count("<ImageHere>") == len(example.images)
        assert example.caption is None


def test_the_number_in_the_file_names_the_sample_and_the_place_gives_the_history():
    story = Story("8", (Step("a .", "a.jpg", 1), Step("b .", "b.jpg", 4)), "f")
    got = StoryRules().worded(story, 1, "multimodal", wording=2)
    assert got.item_id == "8_4-multimodal" and got.images == ("a.jpg",)


def test_wordings_are_drawn_by_seed_sample_and_epoch():
    def words(rules, epoch):
        return [rules.example(STORY, *sample, epoch).source for sample in rules.samples(5)]

    rules = StoryRules()
    assert words(rules, 3) == words(StoryRules(), 3)
    assert words(rules, 3) != words(rules, 4) and words(rules, 3) != words(StoryRules(seed=1), 3)
    fixed = StoryRules(resample_prompts=False)
    assert words(fixed, 3) == words(fixed, 4) == words(rules, 0)
    for sample in rules.samples(5):
        drawn = {rules.example(STORY, *sample, epoch).source for epoch in range(40)}
        possible = rules.texts(STORY, *sample)
        assert drawn == {source for source, _ in possible}
        assert len(possible) == (3 if sample[1] == "multimodal" else 2)
    with pytest.raises(DataError, match="known: head, release"):
        StoryRules(prompt_set="new")


@pytest.mark.parametrize(
    ("context", "before", "images"),
    [
        ("none", "", ()),
        ("text", "we went .a dog .\n", ()),
        ("image", "<Img><ImageHere></Img><Img><ImageHere></Img>\n", ("0.jpg", "1.jpg")),
    ],
)
def test_what_is_read_of_the_steps_before(context, before, images):
    drawn = StoryRules().worded(STORY, 2, "gen", wording=1, context=context)
    request = "the scene description: the lake . ###Assistant:"
    assert drawn.source == f"{prompts.STORY_SYSTEM}###Human:{before} {request}" and drawn.images == images
    told = StoryRules().worded(STORY, 2, "understanding", wording=0, context=context)
    assert told.images == (*images, "2.jpg") and told.target == "the lake . ###"
    with pytest.raises(DataError, match="unknown context 'images'; known: none, text, image, image"):
        StoryRules().worded(STORY, 2, "gen", wording=0, context="images")


def test_a_share_of_contexts_is_thinned():
    rules = StoryRules(context_dropout=0.5)
    thinned = {"text": 0, "image": 0}
    for epoch in range(200):
        got, full = (one.example(STORY, 3, "gen", epoch) for one in (rules, StoryRules()))
        assert got == rules.example(STORY, 3, "gen", epoch)
        wording = [example.source for example in rules.wordings(STORY, 3, "gen")].index(full.source)
        for context in thinned:
            thinned[context] += got == StoryRules().worded(STORY, 3, "gen", wording=wording, context=context)
        if got.source == full.source:
            assert got == full
    assert all(30 <= count <= 70 for count in thinned.values())  # 50 of 200 each, standard deviation 6
    first = [rules.example(STORY, 0, "gen", epoch) for epoch in range(9)]
    assert first == [StoryRules().example(STORY, 0, "gen", epoch) for epoch in range(9)]
    # Rows are planned for the whole context: nothing that is drawn is longer.
    for sample in rules.samples(5):
        sizes = [
            (len(source + target), source.count("<ImageHere>"))
            for source, target in rules.texts(STORY, *sample)
        ]
        for got in (rules.example(STORY, *sample, epoch) for epoch in range(9)):
            assert len(got.images) == got.source.count("<ImageHere>") <= max(count for _, count in sizes)
            assert len(got.source + got.target) <= max(size for size, _ in sizes)
    with pytest.raises(DataError, match=r"context_dropout=1.5 is no share"):
        StoryRules(context_dropout=1.5)


def test_texts_are_taken_as_they_are_written():
    story = Story("8", (Step("It's {0} A DOG!  ", "a", 0), Step("{text} b", "b", 1)), "f")
    got = StoryRules().worded(story, 1, "gen", wording=1)
    assert got.source == prompts.STORY_SYSTEM + (
        "###Human:It's {0} A DOG!  <Img><ImageHere></Img>\n the scene description: {text} b ###Assistant:"
    )


# ------------------------------------------------------------------------------------------ golden

# Ids by the pieces of the tiny tokenizer and the rules of fidelity 1.6.  The system prompt up to its last
# word: ▁Give ▁the ▁following ▁images ▁in ▁< Img > ImageContent </ Img > ▁format . ▁You ▁will ▁be ▁able ▁to
# ▁see ▁the ▁images ▁once ▁I ▁provide ▁it ▁to ▁you . ▁Please ▁understanding ▁images ▁and ▁generate ▁story;
# its full stop joins the turn mark: .### Human :
SYSTEM = [
    400,
    277,
    412,
    306,
    360,
    327,
    274,
    981,
    413,
    304,
    274,
    981,
    407,
    984,
    337,
    339,
    322,
    338,
    279,
    396,
    277,
    306,
    401,
    382,
    410,
    387,
    279,
    397,
    984,
    406,
    415,
    306,
    395,
    313,
    402,
    334,
    310,
    977,
]
IMAGE = [1008, 367, 274, 981]  # <ImageHere> ▁</ Img >
OPEN = [980, 274, 981]  # < Img > behind a space and full stop
WENT, GLUED_WENT = [508, 822, 581], [524, 822, 581]  # ▁we ▁went ▁.  and, glued to "Human:", we ▁went ▁.
DOG, GLUED_DOG = [301, 806, 581], [955, 806, 581]  # ▁a ▁dog ▁.  and a ▁dog ▁.
LAKE = [277, 650, 581]
ONE = [*GLUED_WENT, *OPEN, *IMAGE, 13]  # the history of step 1, its newline 13
TWO = [*GLUED_WENT, *OPEN, *IMAGE, *GLUED_DOG, *OPEN, *IMAGE, 13]
GENERATE_AN = [
    411,
    329,
    270,
    303,
    277,
    326,
    414,
    977,
]  # ▁Generate ▁an ▁image ▁with ▁the ▁scene ▁description :
GENERATE_A = [411, 301, *GENERATE_AN[2:]]
SCENE = [277, 326, 414, 977]  # ▁the ▁scene ▁description :
TELL = [371, 346, 277, 373, 326, 303, 270, 984]  # ▁Tell ▁me ▁the ▁next ▁scene ▁with ▁image .
NEXT = [411, 277, 373, 326, 303, 270, 984]  # ▁Generate ▁the ▁next ▁scene ▁with ▁image .
WHAT = [372, 376, 375, 374, 990]  # ▁What ▁should ▁happen ▁then ?
# ▁Tell ▁me ▁the ▁next ▁scene ▁description ▁b y ▁t hi s ▁image : ▁< Img >
TELL_BY = [371, 346, 277, 373, 326, 414, 284, 973, 261, 589, 962, 270, 977, 327, 274, 981, *IMAGE]
# ▁What ▁happen ▁in ▁the ▁next ▁scene ▁image : ▁< Img >
WHAT_IN = [372, 375, 360, 277, 373, 326, 270, 977, 327, 274, 981, *IMAGE]
ASSISTANT = [835, 312, 977]  # ▁### Assistant :

SYSTEM_TEXT = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    "provide it to you. Please understanding images and generate story.###Human:"
)
IMG = "<Img><ImageHere></Img>"
VOKENS = [1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 835]
LABELS = [1000, -100, -100, -100, -100, -100, -100, 1007, 835]
SPELT = "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"


@pytest.mark.parametrize(
    "prompt_set, step, wording, words, ids, voken",
    [
        (
            "head",
            0,
            0,
            " Generate an image with the scene description: we went .",
            [*GENERATE_AN, *WENT],
            1 + 38 + 11 + 3,
        ),
        (
            "head",
            1,
            0,
            f"we went .{IMG}\n Generate an image with the scene description: a dog .",
            [*ONE, *GENERATE_AN, *DOG],
            1 + 38 + (11 + 31) + 11 + 3,
        ),
        (
            "head",
            2,
            1,
            f"we went .{IMG}a dog .{IMG}\n the scene description: the lake .",
            [*TWO, *SCENE, *LAKE],
            1 + 38 + (21 + 2 * 31) + 7 + 3,
        ),
        (
            "release",
            1,
            0,
            f"we went .{IMG}\n Generate a image with the scene description: a dog .",
            [*ONE, *GENERATE_A, *DOG],
            1 + 38 + (11 + 31) + 11 + 3,
        ),
    ],
)
def test_golden_gen(check_golden, prompt_set, step, wording, words, ids, voken):
    got = StoryRules(prompt_set=prompt_set).worded(STORY, step, "gen", wording=wording)
    source, source_ids = f"{SYSTEM_TEXT}{words} ###Assistant:", [*SYSTEM, *ids, *ASSISTANT]
    check_golden(got, source, SPELT, source_ids, VOKENS, LABELS, voken)


@pytest.mark.parametrize(
    "step, wording, words, text, ids, text_ids, voken",
    [
        (
            1,
            0,
            f"we went .{IMG}\n Tell me the next scene with image.",
            "a dog .",
            [*ONE, *TELL],
            DOG,
            1 + 38 + (11 + 31) + 8 + 3 + 3,
        ),
        (
            1,
            1,
            f"we went .{IMG}\n Generate the next scene with image.",
            "a dog .",
            [*ONE, *NEXT],
            DOG,
            1 + 38 + (11 + 31) + 7 + 3 + 3,
        ),
        (
            2,
            2,
            f"we went .{IMG}a dog .{IMG}\n What should happen then?",
            "the lake .",
            [*TWO, *WHAT],
            LAKE,
            1 + 38 + (21 + 2 * 31) + 5 + 3 + 3,
        ),
    ],
)
def test_golden_multimodal(check_golden, step, wording, words, text, ids, text_ids, voken):
    got = StoryRules().worded(STORY, step, "multimodal", wording=wording)
    check_golden(
        got,
        f"{SYSTEM_TEXT}{words} ###Assistant:",
        f"{text} {SPELT}",
        [*SYSTEM, *ids, *ASSISTANT],
        [*text_ids, *VOKENS],
        [*text_ids, *LABELS],
        voken,
    )


@pytest.mark.parametrize(
    "step, wording, words, text, ids, text_ids",
    [
        (
            1,
            0,
            f"we went .{IMG}\n Tell me the next scene description by this image: {IMG}",
            "a dog .",
            [*ONE, *TELL_BY],
            [301, 806, 581, 835],
        ),
        (
            1,
            1,
            f"we went .{IMG}\n What happen in the next scene image: {IMG}",
            "a dog .",
            [*ONE, *WHAT_IN],
            [301, 806, 581, 835],
        ),
        (
            2,
            1,
            f"we went .{IMG}a dog .{IMG}\n What happen in the next scene image: {IMG}",
            "the lake .",
            [*TWO, *WHAT_IN],
            [277, 650, 581, 835],
        ),
    ],
)
def test_golden_understanding(check_golden, step, wording, words, text, ids, text_ids):
    got = StoryRules().worded(STORY, step, "understanding", wording=wording)
    source, source_ids = f"{SYSTEM_TEXT}{words} ###Assistant:", [*SYSTEM, *ids, *ASSISTANT]
    check_golden(got, source, f"{text} ###", source_ids, text_ids, text_ids, None)


@pytest.mark.parametrize("num_vokens", [1, 4])
def test_number_of_vokens(num_vokens):
    vokens = "".join(f"[IMG{n}]" for n in range(num_vokens))
    assert StoryRules(num_vokens=num_vokens).example(STORY, 1, "multimodal").target == f"a dog . {vokens} ###"


# Fidelity 11, stock LLaMA tokenizer, story 40470 of VIST's validation split:
# step -> (source ids, expanded length, [IMG0], first and last state the mapper reads).
STOCK = {
    0: (69, 79, 70, 69, 76),
    1: (84, 125, 116, 115, 122),
    2: (99, 171, 162, 161, 168),
    3: (118, 221, 212, 211, 218),
    4: (135, 269, 260, 259, 266),
}


@pytest.mark.skipif(
    not {"MINIGPT5_LLAMA_TOKENIZER", "MINIGPT5_VIST_CLEANED"} <= os.environ.keys(),
    reason="set MINIGPT5_LLAMA_TOKENIZER=/path/to/stock/tokenizer.model and MINIGPT5_VIST_CLEANED=/path/to/"
    "val_cleaned.json (with story 40470) to check the lengths of a real story",
)
def test_stock_lengths_of_a_real_story():
    stock = LlamaTokenizer(os.environ["MINIGPT5_LLAMA_TOKENIZER"])
    source = VistSource(os.environ["MINIGPT5_VIST_CLEANED"], rules=StoryRules(training=False))
    story = next(s for s in map(source.story, range(source.rows)) if s.id == "40470")
    for step, want in STOCK.items():
        example = StoryRules().worded(story, step, "gen", wording=0)
        got = expand(stock, example.source, example.target, image_tokens=32, max_length=512)
        start = got.voken_start
        assert (len(stock.encode(example.source)), len(got.tokens), start, start - 1, start + 6) == want
