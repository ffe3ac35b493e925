"""Pages and image grids: what is written can be read back, and nothing foreign is overwritten."""

from __future__ import annotations

import html.parser

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.inference.page import Entry, draw_grid, write_page


def image(seed: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


class Reader(html.parser.HTMLParser):
    """Collects tags, image sources and text; fails on tags that do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.sources, self.data, self.tags = [], [], [], set()
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


ENTRIES = [
    Entry(
        ['a <b>red</b> & "blue" circle', image(0)],
        ["then\nthis", image(1), "and", image(2)],
        seed=7,
        notes="<i>held out</i>",
    ),
    Entry(["# 1. *plain*"], ["bell \x07 \x1b[31mred \u202eback", "- no [link](x) <script>alert(1)</script>"]),
]


def test_page_holds_every_text_and_image(tmp_path):
    index = write_page(tmp_path / "page", "Title <1>", ENTRIES, {"sampler": "pndm & co", "steps": 50})
    assert index == tmp_path / "page" / "index.html"
    page = Reader(index.read_text(encoding="utf-8"))
    text = "".join(page.data)
    for expected in (
        'a <b>red</b> & "blue" circle',
        "then\nthis",
        "seed 7 · <i>held out</i>",
        "Title <1>",
        "pndm & co",
        "50",
        "# 1. *plain*",
        "bell \\x07 \\x1b[31mred \\u202eback",
        "<script>alert(1)</script>",
    ):
        assert expected in text
    assert not page.tags & {"b", "i", "script", "link"}
    assert page.sources == [
        "images/001-prompt-1.png",
        "images/001-output-1.png",
        "images/001-output-2.png",
    ]
    for source, seed in zip(page.sources, (0, 1, 2)):
        np.testing.assert_array_equal(np.asarray(Image.open(index.parent / source)), image(seed))


def test_a_second_page_replaces_the_first_and_leaves_other_files(tmp_path):
    write_page(tmp_path, "one", ENTRIES)
    (tmp_path / "images" / "mine.png").write_bytes(b"x")
    write_page(tmp_path, "two", [Entry([image(3)], ["only"])])
    assert "<h1>two</h1>" in (tmp_path / "index.html").read_text()
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"001-prompt-1.png", "mine.png"}


@pytest.mark.parametrize("name", ["notes.txt", "index.html"])
def test_a_foreign_directory_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("<html>somebody else's</html>")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_page(tmp_path, "t", ENTRIES)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "<html>somebody else's</html>"


def test_a_file_in_the_way_and_an_empty_page_are_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        write_page(tmp_path / "f", "t", ENTRIES)
    with pytest.raises(ValueError, match="at least one entry"):
        write_page(tmp_path / "new", "t", [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "bad, found",
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\]"),
    ],
)
def test_other_arrays_are_not_images(bad, found):
    with pytest.raises(ValueError, match=found):
        Entry([], [bad])


def test_grid_lays_images_out_row_by_row():
    images = np.stack([image(seed) for seed in range(5)])
    grid = draw_grid(images, columns=3, min_side=1)
    assert grid.shape == (2 * (8 + 6) + 6, 3 * (12 + 6) + 6, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        y, x = 6 + row * 14, 6 + column * 18
        np.testing.assert_array_equal(grid[y : y + 8, x : x + 12], images[index])
    assert (grid[20:28, 42:] == 255).all()  # the sixth cell is empty


def test_small_images_are_enlarged():
    grid = draw_grid(np.stack([image(0), image(1)]), columns=9)
    assert grid.shape == (88 + 12, 2 * (132 + 6) + 6, 3)  # 12 px wide, enlarged 11 times


def test_grid_refuses_what_does_not_fit_together():
    images = np.stack([image(0), image(1)])
    with pytest.raises(ValueError, match="0 columns"):
        draw_grid(images, 0)
    with pytest.raises(ValueError, match="u8"):
        draw_grid(images[0], 1)
