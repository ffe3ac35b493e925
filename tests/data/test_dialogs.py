"""Dialogues: windows, filters and both loader generations; samples by hand (fidelity 5.4)."""

from __future__ import annotations

import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.dialogs import BAD_MEDIA_IDS, LOADERS, Dialog, DialogRules, DialogTurn


def turns(*items):
    """Turns of texts, or of (text, id of its image, ...)."""
    made = []
    for item in items:
        text, *media = (item,) if isinstance(item, str) else item
        made.append(DialogTurn(text, f"{media[0]}.jpg" if media else None, tuple(media)))
    return Dialog("9", tuple(made), "f.jsonl:3")


def there(picture):
    return picture != "gone.jpg"


def words(text):
    return len(text.split())


def use(rules, dialog):
    usable, remarks = rules.usable(dialog, there, words)
    return usable, [(remark.kind, str(remark)) for remark in remarks]


@pytest.mark.parametrize("loader", LOADERS)
def test_what_each_turn_is_written_after(loader):
    dialog = turns(*(f"t{n}" for n in range(9)))
    rules = DialogRules(loader)
    seen = {i: [n for n in range(9) if f"t{n}" in rules.example(dialog, i).source] for i in range(1, 9)}
    assert seen == {
        1: [0],
        2: [0, 1],
        3: [0, 1, 2],
        4: [2, 3],
        5: [2, 3, 4],
        6: [4, 5],
        7: [4, 5, 6],
        8: [6, 7],
    }
    for i in range(1, 9):
        source = rules.example(dialog, i).source
        assert source.endswith("###Assistant:" if i % 2 else "###Human:")
        assert all(f"###{'Assistant' if n % 2 else 'Human'}: t{n}" in source for n in seen[i])


def test_names_of_both_loaders():
    dialog = turns("a", "b", "c")
    assert [DialogRules("head").example(dialog, i).item_id for i in (1, 2)] == ["9_1-mm", "9_2-mm"]
    assert DialogRules("release").example(dialog, 2).item_id == "mmdialog9_2"
    with pytest.raises(DataError, match="unknown loader 'old'; known: head, release"):
        DialogRules("old")


def test_only_images_of_the_window_are_read():
    dialog = turns(("t0", "0"), ("t1", "1"), "t2", ("t3", "3"), "t4")
    for loader in LOADERS:
        rules = DialogRules(loader)
        assert rules.example(dialog, 3).images == ("0.jpg", "1.jpg")
        assert rules.example(dialog, 3).target_image == "3.jpg"
        assert rules.example(dialog, 4).images == ("3.jpg",)
        assert rules.example(dialog, 4).target_image is None
        for turn in range(1, 5):
            example = rules.example(dialog, turn)
            assert example.source.count("<ImageHere>") == len(example.images)
            assert ("[IMG0]" in example.target) == (example.target_image is not None)
            assert example.caption is None and example.task == "mmdialog" and example.where == "f.jsonl:3"


LONG = "w " * 51
END = "; the dialogue ends before it"


@pytest.mark.parametrize(
    "bad, kind, detail",
    [
        ("", "empty text", "no text"),
        (("  ", "7"), "empty text", "no text"),
        ("photo.jpg", "file name as text", "the text 'photo.jpg' is a file name"),
        (LONG, "over 50 tokens", "51 tokens"),
        (("t", "gone"), "missing image", "image gone is missing"),
        (("t", "gone", "7"), "missing image", "image gone is missing"),
        (("t", BAD_MEDIA_IDS[0]), "bad image", "image -3872362534310063124 is in the list of bad ones"),
        (
            ("t", "3713630103994725971"),
            "bad image",
            "image 3713630103994725971 is in the list of bad ones",
        ),
    ],
)
def test_one_bad_turn_ends_a_dialogue(bad, kind, detail):
    rules = DialogRules("head")
    for place in range(4):
        items = ["a", "b", "c", "d"]
        items[place] = bad
        assert use(rules, turns(*items)) == (place, [(kind, f"f.jsonl:3: turn {place}: {detail}{END}")])


def test_filters_of_training_only():
    assert use(DialogRules("head", training=False), turns("a", LONG)) == (2, [])
    assert use(DialogRules("release", training=False), turns("a", LONG)) == (2, [])
    assert not DialogRules("head", training=False).counts_tokens and DialogRules("head").counts_tokens
    assert DialogRules("head", training=False).usable(turns("a", "b"), there) == (2, [])


def test_the_limits_themselves_pass():
    assert use(DialogRules("head"), turns("a", "w " * 50)) == (2, [])
    assert use(DialogRules("release"), turns("a", "w " * 20)) == (2, [])
    kind = ("over 20 words", f"f.jsonl:3: turn 1: 21 words{END}")
    assert use(DialogRules("release"), turns("a", "w " * 21)) == (1, [kind])
    assert use(DialogRules("head", max_tokens=1), turns("a", "b c"))[0] == 1
    assert use(DialogRules("release", max_words=1), turns("a", "b c"))[0] == 1


def test_the_older_loader_looks_for_less():
    dialog = turns("a", "photo.jpg", ("", "7"), ("t", BAD_MEDIA_IDS[0]), ("t", "gone"), "e")
    usable, remarks = use(DialogRules("release"), dialog)
    assert usable == 4 and [kind for kind, _ in remarks] == ["missing image"]
    example = DialogRules("release").example(dialog, 2)
    assert example.target == "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"


def test_bad_pictures_are_a_setting():
    dialog = turns("a", ("b", BAD_MEDIA_IDS[0]), ("c", "5"))
    assert use(DialogRules("head", bad_media_ids=("5",)), dialog)[0] == 2
    assert use(DialogRules("head", bad_media_ids=()), dialog) == (3, [])


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_not_used_is_said(loader):
    more = ("further images of a turn", "f.jsonl:3: turn 1: 3 images, the first is used")
    rules = DialogRules(loader)
    assert use(rules, turns("a", ("b", "1", "2", "3"))) == (2, [more])
    assert rules.example(turns("a", ("b", "1", "2", "3")), 1).target_image == "1.jpg"
    few = "fewer than two turns"
    assert use(rules, turns("a")) == (1, [(few, "f.jsonl:3: turn 0: the dialogue has 1 turns")])
    assert use(rules, turns()) == (0, [(few, "f.jsonl:3: turn 0: the dialogue has 0 turns")])


# ------------------------------------------------------------------------------------------ golden

# Ids by the pieces of the tiny tokenizer and the rules of fidelity 1.6.  What both system prompts share:
# ▁Give ▁the ▁following ▁images ▁in ▁< Img > ImageContent </ Img > ▁format . ▁You ▁will ▁be ▁able ▁to ▁see
# ▁the ▁images ▁once ▁I ▁provide ▁it ▁to ▁you . ▁Please ▁generate ▁con ve r s at i on
SHARED = [
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
    313,
    888,
    351,
    965,
    962,
    275,
    956,
    278,
]
# s ▁with ▁a p p r op ri ate ▁images . ▁### Human :
HEAD = [*SHARED, 962, 303, 301, 971, 971, 965, 467, 350, 285, 306, 984, 835, 310, 977]
# ▁with ▁a p p r op ri ate ▁image .### Human :
RELEASE = [*SHARED, 303, 301, 971, 971, 965, 467, 350, 285, 270, 334, 310, 977]
PICTURE = [327, 274, 981, 1008, 367, 274, 981]  # ▁< Img > <ImageHere> ▁</ Img >
WENT, DOG, LAKE = [508, 822], [301, 806], [277, 650]  # ▁we ▁went, ▁a ▁dog, ▁the ▁lake
HUMAN, ASSISTANT = [835, 310, 977], [835, 312, 977]  # ▁### Human :, ▁### Assistant :
LINE_HUMAN, LINE_ASSISTANT = [13, 263, 310, 977], [13, 263, 312, 977]  # newline ### Human :

SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    "provide it to you. Please generate "
)
HEAD_TEXT = SYSTEM + "conversations with appropriate images. "
RELEASE_TEXT = SYSTEM + "conversation with appropriate image."
IMG = "<Img><ImageHere></Img>"
VOKENS = [1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 835]
LABELS = [1000, -100, -100, -100, -100, -100, -100, 1007, 835]
SPELT = "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"
DIALOG = turns(("we went", "0"), "a dog", "the lake", ("we went", "3"), ("a dog", "4"))


@pytest.mark.parametrize(
    "turn, source, target, source_ids, text_ids, voken",
    [
        (
            1,
            f"###Human: we went {IMG} ###Assistant:",
            "a dog ###",
            [*HEAD, *WENT, *PICTURE, *ASSISTANT],
            DOG,
            None,
        ),
        (
            2,
            f"###Human: we went {IMG} ###Assistant: a dog ###Human:",
            "the lake ###",
            [*HEAD, *WENT, *PICTURE, *ASSISTANT, *DOG, *HUMAN],
            LAKE,
            None,
        ),
        (
            3,
            f"###Human: we went {IMG} ###Assistant: a dog ###Human: the lake ###Assistant:",
            f"we went {SPELT}",
            [*HEAD, *WENT, *PICTURE, *ASSISTANT, *DOG, *HUMAN, *LAKE, *ASSISTANT],
            WENT,
            1 + 52 + 2 + (7 + 31) + 3 + 2 + 3 + 2 + 3 + 2,
        ),
        (
            4,
            f"###Human: the lake ###Assistant: we went {IMG} ###Human:",
            f"a dog {SPELT}",
            [*HEAD, *LAKE, *ASSISTANT, *WENT, *PICTURE, *HUMAN],
            DOG,
            1 + 52 + 2 + 3 + 2 + (7 + 31) + 3 + 2,
        ),
    ],
)
def test_golden_head(check_golden, turn, source, target, source_ids, text_ids, voken):
    got = DialogRules("head").example(DIALOG, turn)
    target_ids = text_ids + ([835] if voken is None else VOKENS)
    labels = text_ids + ([835] if voken is None else LABELS)
    check_golden(got, HEAD_TEXT + source, target, source_ids, target_ids, labels, voken)


@pytest.mark.parametrize(
    "turn, source, target, source_ids, text_ids, voken",
    [
        (
            1,
            f"###Human: we went {IMG}\n###Assistant:",
            "a dog ###",
            [*RELEASE, *WENT, *PICTURE, *LINE_ASSISTANT],
            DOG,
            None,
        ),
        (
            3,
            f"###Human: we went {IMG}\n###Assistant: a dog\n###Human: the lake\n###Assistant:",
            f"we went {SPELT}",
            [*RELEASE, *WENT, *PICTURE, *LINE_ASSISTANT, *DOG, *LINE_HUMAN, *LAKE, *LINE_ASSISTANT],
            WENT,
            1 + 50 + 2 + (7 + 31) + 4 + 2 + 4 + 2 + 4 + 2,
        ),
        (
            4,
            f"###Human: the lake\n###Assistant: we went {IMG}\n###Human:",
            f"a dog {SPELT}",
            [*RELEASE, *LAKE, *LINE_ASSISTANT, *WENT, *PICTURE, *LINE_HUMAN],
            DOG,
            1 + 50 + 2 + 4 + 2 + (7 + 31) + 4 + 2,
        ),
    ],
)
def test_golden_release(check_golden, turn, source, target, source_ids, text_ids, voken):
    got = DialogRules("release").example(DIALOG, turn)
    target_ids = text_ids + ([835] if voken is None else VOKENS)
    labels = text_ids + ([835] if voken is None else LABELS)
    check_golden(got, RELEASE_TEXT + source, target, source_ids, target_ids, labels, voken)
