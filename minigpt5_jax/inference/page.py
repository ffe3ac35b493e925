"""HTML pages of interleaved text and images, and image grids."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_jax.data.errors import printable

Part = str | np.ndarray
"""One piece of an interleaved sequence: text, or an image u8[H W 3]."""

_MARK = '<meta name="generator" content="minigpt5_jax">'
_IMAGES = "images"
_IMAGE_NAME = re.compile(r"\d{3,}-(prompt|output)-\d+\.png")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fdb; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 54rem;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
details { margin: 0 0 2rem; }
summary { cursor: pointer; opacity: .7; }
table { border-collapse: collapse; margin-top: .5rem; font-size: .85rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
         border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
article { border: 1px solid var(--line); border-radius: .75rem; margin: 0 0 1.5rem; overflow: hidden; }
section { padding: .9rem 1.1rem; }
section.prompt { background: var(--soft); border-bottom: 1px solid var(--line); }
section.output { border-left: .25rem solid var(--accent); }
h2 { font-size: .72rem; letter-spacing: .08em; text-transform: uppercase; opacity: .6; margin: 0 0 .4rem; }
p { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
img { display: inline-block; margin: .3rem .5rem .3rem 0; min-width: 12rem; max-width: 100%;
      border-radius: .4rem; }
footer { padding: .5rem 1.1rem; font-size: .8rem; opacity: .7; border-top: 1px solid var(--line); }
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One generated sequence.

    Attributes:
      prompt: what the model was given; output: what it answered.  Lists of text and u8[H W 3].
      seed: of its random draws, shown with it.
      notes: one line under the sequence, such as the held-out caption or the time it took.

    Raises:
      ValueError: an image of another shape or dtype.
    """

    prompt: Sequence[Part]
    output: Sequence[Part]
    seed: int | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        for part in (*self.prompt, *self.output):
            if not isinstance(part, str):
                _check_images(part, dims=3)


def write_page(
    directory: str | Path, title: str, entries: Sequence[Entry], metadata: Mapping[str, object] | None = None
) -> Path:
    """Write ``index.html`` and ``images/*.png``, in place of an earlier page; returns the former's path.

    ``metadata`` (checkpoint, sampler, ...) is shown in a folded table.

    Raises:
      FileExistsError: the directory holds other things and no page of ours.
      ValueError: there is nothing to write.
    """
    if not entries:
        raise ValueError("a page needs at least one entry")
    directory = Path(directory)
    _claim(directory)
    metadata = {key: str(value) for key, value in (metadata or {}).items()}
    index = directory / "index.html"
    # First of all files: should the writing be interrupted, the directory is known to be ours.
    index.write_text(printable(_html(title, entries, metadata)), encoding="utf-8")
    (directory / _IMAGES).mkdir(exist_ok=True)
    for number, entry in enumerate(entries, 1):
        for _, part, name in _named_parts(number, entry):
            if name:
                Image.fromarray(np.asarray(part)).save(directory / name)
    return index


def draw_grid(images: np.ndarray, columns: int, *, min_side: int = 128) -> np.ndarray:
    """u8[n H W 3] as one image u8[h w 3] of ``columns`` columns, row by row.

    Images narrower than ``min_side`` pixels are enlarged by a whole factor.

    Raises:
      ValueError: images of another shape or dtype, or no columns.
    """
    _check_images(images, dims=4)
    count, height, width, _ = images.shape
    if columns < 1 or not count:
        raise ValueError(f"{count} images in {columns} columns: need at least one of each")
    factor = max(1, -(-min_side // width))
    width, height, gap = width * factor, height * factor, 6
    columns, rows = min(columns, count), -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap), gap + row * (height + gap)
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
    return np.asarray(canvas)


def _check_images(value: np.ndarray, dims: int) -> None:
    if value.ndim != dims or value.shape[-1] != 3 or value.dtype != np.uint8:
        want = "u8[H W 3]" if dims == 3 else "u8[n H W 3]"
        raise ValueError(f"an image must be {want}, got {value.dtype}{list(value.shape)}")


def is_free(directory: Path) -> bool:
    """Whether a page may be written there: nothing is, or an empty folder, or an earlier page of ours."""
    if not directory.is_dir():
        return not directory.exists()
    index = directory / "index.html"
    ours = index.is_file() and _MARK in index.read_text(encoding="utf-8", errors="replace")
    return ours or not any(directory.iterdir())


def _claim(directory: Path) -> None:
    """Make ``directory``, or clear the images of our earlier page; refuse what is not ours."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, a page needs a directory")
    directory.mkdir(parents=True, exist_ok=True)
    if not is_free(directory):
        raise FileExistsError(f"{directory} is not empty and holds no page of minigpt5_jax; choose another")
    for image in (directory / _IMAGES).glob("*.png"):
        if _IMAGE_NAME.fullmatch(image.name):
            image.unlink()


def _named_parts(number: int, entry: Entry) -> Iterator[tuple[str, Part, str]]:
    """(section, part, relative file name or "" for text) of an entry."""
    for section, parts in (("prompt", entry.prompt), ("output", entry.output)):
        images = 0
        for part in parts:
            images += not isinstance(part, str)
            name = "" if isinstance(part, str) else f"{_IMAGES}/{number:03d}-{section}-{images}.png"
            yield section, part, name


def _html(title: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>\n"
        for key, value in metadata.items()
    )
    table = f"<details><summary>How it was made</summary><table>\n{rows}</table></details>\n" if rows else ""
    articles = "".join(_html_entry(number, entry) for number, entry in enumerate(entries, 1))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{table}{articles}</body>\n</html>\n"
    )


def _html_entry(number: int, entry: Entry) -> str:
    sections = {"prompt": "", "output": ""}
    for section, part, name in _named_parts(number, entry):
        if name:
            sections[section] += f'<img src="{name}" alt="{section} image of entry {number}">\n'
        else:
            sections[section] += f"<p>{html.escape(part)}</p>\n"
    body = "".join(
        f'<section class="{section}"><h2>{section}</h2>\n{content}</section>\n'
        for section, content in sections.items()
        if content
    )
    seed = "" if entry.seed is None else f"seed {entry.seed}"
    line = " · ".join(filter(None, (seed, entry.notes)))
    footer = f"<footer>{html.escape(line)}</footer>\n" if line else ""
    return f'<article id="entry-{number}">\n{body}{footer}</article>\n'
