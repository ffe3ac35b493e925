"""Answers of a trained run as a page: single prompts, whole stories, dialogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from minigpt5_jax.config import PACKAGED, ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.text.prompts import DIALOG_SYSTEM, VICUNA_V0
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN
from minigpt5_jax.inference.conversation import Conversation, ImagePart, Message, chat, continue_story
from minigpt5_jax.inference.page import Entry, is_free, write_page
from minigpt5_jax.inference.prompts import file_prompts, text_prompt
from minigpt5_jax.inference.session import Generation, Prompt
from minigpt5_jax.inference.transcript import (
    entry_of,
    read_records,
    record_of,
    seed_of,
    turns_of,
    write_records,
)
from minigpt5_jax.wiring.restore import OpenedRun
from minigpt5_jax.wiring.session import dialog_window

MODES = ("story", "chat")
NO_IMAGE = "no image was written; --inference force_image=first (or after_text) makes one certain"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer.

    Attributes:
      mode: one of :data:`MODES`; None answers single prompts.
      texts: single prompts; of ``chat`` the user's turns of one dialogue, of ``story`` the opening of one.
      images: input images of the one single prompt, or of the opening.
      jsonl: file of records, each a prompt, or a story or dialogue of a mode.
      allow_outside_images: whether image paths in it may lead out of its folder.
      seed: of the first sample; the others count up from it.  num_samples: answers to each prompt.
      batch_size: answers made together at most.
      template: how ``texts`` are put to the model: ``bare`` as a caption (stage 1), ``dialog`` as a user
        turn of a dialogue (stage 2); None follows the run's stage, and the images.
      scenes: of a story, to tell.
      window: turns of a dialogue that are read; None for all, 3 for runs trained on MMDialog, as there.
    """

    mode: str | None = None
    texts: Sequence[str] = ()
    images: Sequence[str] = ()
    jsonl: str | None = None
    allow_outside_images: bool = False
    seed: int = 0
    num_samples: int = 1
    batch_size: int = 4
    template: str | None = None
    scenes: int = 4
    window: int | None = None


def claim_output(folder: str | Path) -> None:
    """Refuse a folder that the page could not be written to, before the work is done.

    Raises:
      FileExistsError: it is a file, or holds other things and no page of ours.
    """
    if not is_free(Path(folder)):
        raise FileExistsError(f"--output={folder} holds other things; choose another folder")


def generate_page(
    run: OpenedRun, request: Request, output: str | Path, report: Callable[[str], None] = lambda line: None
) -> Path:
    """The page of the answers; everything that can be refused is refused before weights are read.

    Args:
      run: an opened run.  output: folder of the page.
      report: called with a line about each stage of the work and its progress.

    Raises:
      ConfigError, DataError, FileExistsError: as their messages say.
    """
    claim_output(output)
    if note := toy_towers(run.config):
        report(note)
    if request.mode is not None:
        given = load_conversations(request)
        check_conversations(run, given)
        run.check()
        return _converse(run, request, given, output, report)
    prompts = single_prompts(run, request)
    run.check()
    report(f"reading the weights of step {run.step} of {run.checkpoints}")
    session = run.session(batch_size=min(request.batch_size, len(prompts)))
    report(f"answering {len(prompts)} prompts; the first ones take longer, as programs are compiled")
    answers = session.generate(prompts, report=report)
    draws = run.config.inference.max_images > 0
    if draws and not any(answer.images for answer in answers):
        report(NO_IMAGE)
    entries = [
        entry(prompt, answer, session.style.image, draws=draws)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return write_answers(run, entries, output)


def single_prompts(run: OpenedRun, request: Request) -> list[Prompt]:
    """Every prompt of a request with its seed; their images are known to be readable.

    Raises:
      DataError: no prompt, images without one prompt, or a prompt that cannot be put to a model.
    """
    if not request.texts and not request.jsonl:
        raise DataError('nothing to answer: give --prompt "..." or --jsonl FILE')
    if request.images and len(request.texts) != 1:
        raise DataError(f"--image goes with one --prompt, not {len(request.texts)}; use --jsonl for several")
    default = "dialog" if run.stage == 2 or request.images else "bare"
    dialog = (request.template or default) == "dialog"
    style = run.spec.parts["backbone"].prompts
    prompts = [text_prompt(text, request.images, dialog=dialog, style=style) for text in request.texts]
    prompts += file_prompts(request.jsonl, request.allow_outside_images) if request.jsonl else []
    for image in {image for prompt in prompts for image in prompt.images}:
        load_image(image)
    return [
        dataclasses.replace(prompt, seed=request.seed + sample)
        for prompt in prompts
        for sample in range(request.num_samples)
    ]


def toy_towers(config: ConfigDict) -> str:
    """What a user of the packaged tiny towers on other data than theirs must know; '' for everyone else."""
    if PACKAGED not in config.weights.values() or config.data.format.startswith(PACKAGED):
        return ""
    return (
        "note: this run stands on the tiny towers that ship with the package, which know coloured shapes: "
        "unless its captions are of the small world, it checks data and machinery, and neither its texts nor "
        'its images are of your captions (README.md, "Your own photos")'
    )


def entry(prompt: Prompt, answer: Generation, placeholder: str, *, draws: bool = False) -> Entry:
    """An answer as the page shows it, its prompt as it was typed, with the images in their places.

    Args:
      draws: whether the answer might have had an image, so that a missing one is explained.
    """
    source, mark = (prompt.typed, IMAGE_TOKEN) if prompt.typed else (prompt.source, placeholder)
    source = source.replace(placeholder, mark)
    if mark not in source:
        source = mark * len(prompt.images) + source
    shown: list[str | np.ndarray] = []
    for number, piece in enumerate(source.split(mark)):
        shown += [piece.strip()] if piece.strip() else []
        if number < len(prompt.images):
            shown.append(np.asarray(load_image(prompt.images[number])))
    notes = [f"{answer.dropped} positions of the prompt did not fit"] * bool(answer.dropped)
    if prompt.typed and prompt.typed.strip() not in prompt.source:
        notes.append(f"the model read: {prompt.source}")
    notes += [NO_IMAGE] * (draws and not answer.images)
    return Entry(shown, list(answer.parts) or ["(nothing)"], seed=answer.seed, notes=" · ".join(notes))


def load_conversations(request: Request) -> list[tuple[Conversation, list[Message]]]:
    """(conversation, its turns) of each record and sample; a story's turns are what was told before.

    Raises:
      DataError: nothing to go on from, or both a file and prompts; a record that breaks the schema, an image
        that cannot be read.
    """
    mode, typed = request.mode, bool(request.texts or request.images)
    if typed == bool(request.jsonl):
        raise DataError(
            f"{mode} goes on from one thing: give --jsonl FILE with records, or --prompt TEXT"
            + (" for each turn of the user" if mode == "chat" else " (and --image FILE) for how it begins")
        )
    found = []
    for name, system, turns in _typed_turns(request) if typed else _file_turns(request):
        if mode == "chat" and not any(turn.role == "user" for turn in turns):
            raise DataError(f"record {name!r} has no user turn to answer")
        for sample in range(request.num_samples):
            label = name if request.num_samples == 1 else f"{name}_{sample}"
            seed = seed_of(name, request.seed, sample)
            messages = list(turns) if mode == "story" else []
            found.append(
                (Conversation(label, seed, messages, system=system if mode == "chat" else ""), turns)
            )
    return found


def _file_turns(request: Request) -> Iterator[tuple[str, str, list[Message]]]:
    """(name, system prompt, turns) of every record of the file."""
    folder = Path(request.jsonl).expanduser().parent
    for name, record in read_records(request.jsonl, request.allow_outside_images):
        yield name, record.system, turns_of(record, folder)


def _typed_turns(request: Request) -> Iterator[tuple[str, str, list[Message]]]:
    """The same of what was typed: a message for each text of a dialogue, one for the whole opening."""
    for text in request.texts:
        if not text.strip():
            raise DataError(f"prompt {text!r} is empty")
        if VICUNA_V0.end in text:
            raise DataError(f"prompt {text!r} contains {VICUNA_V0.end}, which ends a turn")
    for image in request.images:
        load_image(image)
    images = tuple(map(ImagePart, request.images))
    if request.mode == "story":
        turns = [Message("user", (*request.texts, *images))]
    else:
        if images and not request.texts:
            raise DataError("chat: --image goes with the first --prompt; give one")
        turns = [
            Message("user", (*(images if first else ()), text))
            for first, text in zip([True, *[False] * len(request.texts)], request.texts)
        ]
    yield request.mode, DIALOG_SYSTEM, turns


def check_conversations(run: OpenedRun, given: list[tuple[Conversation, list[Message]]]) -> None:
    """ConfigError where a model without vision would have to read images; a warning for runs of stage 1."""
    images = any(isinstance(part, ImagePart) for _, turns in given for turn in turns for part in turn.parts)
    draws = run.config.inference.max_images > 0
    if not run.spec.backbone.image_tokens and (images or draws):
        what = "the records' images" if images else "what it draws itself"
        raise ConfigError(
            f"this run's model has no vision tower and cannot read {what}; use a "
            "run whose backbone sees" + ("" if images else ", or --inference max_images=0 for text alone")
        )
    if run.stage == 1:
        logging.warning(
            "this run is of stage 1, trained on single captions: do not expect it to go on with "
            "a story or dialogue; a stage-2 run (run.init_from) learns that"
        )


def _converse(
    run: OpenedRun,
    request: Request,
    given: list[tuple[Conversation, list[Message]]],
    output: str | Path,
    report: Callable[[str], None],
) -> Path:
    """Tells stories or plays dialogues, and writes page and records."""
    report(f"reading the weights of step {run.step} of {run.checkpoints}")
    session = run.session(batch_size=min(request.batch_size, len(given)))
    conversations = [conversation for conversation, _ in given]
    report(f"{request.mode}: {len(conversations)} records; the first answers are compiled first")
    shown = [len(turns) if request.mode == "story" else 1 for _, turns in given]
    if request.mode == "story":
        continue_story(session, conversations, request.scenes)
    else:
        window = dialog_window(run.config) if request.window is None else request.window
        chat(session, conversations, [turns for _, turns in given], window)
    page = write_answers(run, [entry_of(c, first) for c, first in zip(conversations, shown)], output)
    records = [record_of(c, first, number) for number, (c, first) in enumerate(zip(conversations, shown), 1)]
    write_records(output, records)
    return page


def write_answers(run: OpenedRun, entries: Sequence[Entry], output: str | Path) -> Path:
    """The page of some answers, with everything that made them."""
    inference = {f"inference.{name}": value for name, value in run.config.inference.items()}
    made = {"checkpoint": str(run.checkpoints), "step": run.step, "run": run.config.run.name}
    return write_page(output, "MiniGPT-5", entries, {**made, **inference})
