"""Prompts as users give them: typed, or as records of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import TextLines, check_jsonl
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.data.samples.records import Record, parse_record, prompt_of
from minigpt5_jax.data.text import templates
from minigpt5_jax.data.text.prompts import VICUNA_V0, PromptStyle
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN
from minigpt5_jax.inference.session import Prompt


def text_prompt(text: str, images: Sequence[str], *, dialog: bool, style: PromptStyle = VICUNA_V0) -> Prompt:
    """A prompt from what a user typed.

    Args:
      text: with ``<ImageHere>`` where each of ``images`` belongs; without any they stand before it.
      dialog: as the user's turn of a dialogue; otherwise as a caption, cleaned as in training.
      style: how the language model is spoken to.

    Raises:
      DataError: nothing is left of the text, or it holds what has a meaning of its own in prompts.
    """
    if not dialog:
        if images or IMAGE_TOKEN in text:
            raise DataError("a caption has no images; use --template dialog")
        caption = templates.clean_caption(text)
        if not caption:
            raise DataError(f"prompt {text!r} is empty" + (" after cleaning" if text.strip() else ""))
        return Prompt(caption, typed=text)
    if not text.strip() and not images:
        raise DataError(f"prompt {text!r} is empty")
    if style.end in text:
        raise DataError(f"prompt {text!r} contains {style.end}, which ends a turn")
    written = text.replace(style.image, IMAGE_TOKEN).replace(IMAGE_TOKEN, style.image)
    if IMAGE_TOKEN not in text:
        written = " ".join([*[style.image] * len(images), text]).strip()
    source = style.dialog(style.dialog_system, [(style.speakers["user"], written)])
    return Prompt(source, tuple(images), typed=text)


OUTSIDE = "put the file into a folder above the image, or allow it: --allow_outside_images"


def file_prompts(path: str | Path, allow_outside_images: bool = False) -> list[Prompt]:
    """A prompt from each line of a JSONL file; image paths are relative to its folder.

    Args:
      path: the file.  allow_outside_images: whether image paths may lead out of the folder.

    Raises:
      DataError: no such file, a line that breaks the schema or ends in an assistant's turn, no line.
    """
    prompts, folder = [], Path(path).expanduser().parent
    for where, record in file_records(path, allow_outside_images):
        if not record.pair and record.turns[-1].role != "user":
            raise SampleError(where, "a prompt ends in a user turn; this ends in an answer")
        turns = 1 if record.pair else len(record.turns)
        prompts.append(Prompt(*prompt_of(record, turns, folder)))
    return prompts


def file_records(path: str | Path, allow_outside_images: bool = False) -> Iterator[tuple[str, Record]]:
    """(``file:line``, record) of each line of a JSONL file that is not blank.

    Args:
      path: the file.  allow_outside_images: whether image paths that are read may lead out of its folder.

    Raises:
      DataError: no such file, not UTF-8, no line, a line that breaks the schema or whose images lie outside.
    """
    lines = TextLines(Path(path).expanduser())
    check_jsonl(lines.path, lines[0])
    images = ImageFolder(lines.path.parent, allow_outside_images, remedy=OUTSIDE)
    for number in range(len(lines)):
        where = lines.where(number)
        record = parse_record(lines[number], where)
        for turn in record.turns[:1] if record.pair else record.turns:  # what a pair draws is not read
            for image in turn.images():
                images.path(image.path, where)
        yield where, record
