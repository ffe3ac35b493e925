"""Answer prompts from a checkpoint and write a page of text and pictures.

    python -m minigpt5_jax.generate --checkpoint runs/mine --prompt "a red fox in the snow" --output page
    python -m minigpt5_jax.generate --checkpoint runs/mine --prompt "What came next?" --image photos/1.jpg
    python -m minigpt5_jax.generate --checkpoint runs/mine --jsonl prompts.jsonl --num_samples 3
    python -m minigpt5_jax.generate story --checkpoint runs/stage2 --jsonl begun.jsonl --scenes 4
    python -m minigpt5_jax.generate chat --checkpoint runs/stage2 --jsonl script.jsonl

``--image`` belongs to the one ``--prompt``; its place in the text is ``<ImageHere>``, or before it.  A
record of ``--jsonl`` (:mod:`minigpt5_jax.data.records`) ends in a user turn, or is a pair, whose caption is
the prompt.  A prompt longer than ``data.max_length`` loses its oldest turns, with a warning.

``story`` continues the story that a record tells (its texts and pictures, in order) scene by scene, ``chat``
answers each user turn of a record; every answer is read again before the next.  Both write, beside the
page, ``conversations.jsonl`` in the schema they read.  A conversation's seed follows from ``--seed`` and
its ``id``, so it goes the same way alone and among others.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.build import build, llm_tokenizer
from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data import templates
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.transforms import load_picture
from minigpt5_jax.frozen_sources import check_sources
from minigpt5_jax.inference.conversation import Conversation, Drawn, Said, chat, tell
from minigpt5_jax.inference.page import Entry, write_page
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
from minigpt5_jax.restore import Run, config_of, load_run, open_checkpoints
from minigpt5_jax.sessions import make_session, override
from minigpt5_jax.training.provenance import CheckpointError, bundle
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.table import WeightTableError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's --workdir, or its checkpoints folder.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to answer; may be given several times.")
IMAGE = flags.DEFINE_multi_string("image", [], "Input picture of the one --prompt; several in order.")
JSONL = flags.DEFINE_string("jsonl", None, "File of records, each a prompt.")
OUTPUT = flags.DEFINE_string("output", "page", "Folder of the page.")
SEED = flags.DEFINE_integer("seed", 0, "Of the first sample; the others count up from it.", lower_bound=0)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers to each prompt.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Answers made together at most.", lower_bound=1)
TEMPLATE = flags.DEFINE_enum(
    "template",
    None,
    ["bare", "dialog"],
    "How --prompt is put to the model: as a caption (stage 1), or as a dialogue's user turn (stage 2).  "
    "Default: dialog for runs that started from another one and for prompts with pictures.",
)
INFERENCE = flags.DEFINE_multi_string(
    "inference", [], "KEY=VALUE in place of the run's inference.KEY, for example sampler=ddim."
)
WEIGHTS = flags.DEFINE_multi_string("weights", [], "NAME=PATH where a source of frozen weights moved.")

SCENES = flags.DEFINE_integer("scenes", 4, "story: scenes to tell.", lower_bound=1)
WINDOW = flags.DEFINE_integer(
    "window",
    None,
    "chat: turns that are read; all by default, 3 for runs trained on MMDialog, as there.",
    lower_bound=1,
)
MODES = ("story", "chat")

USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    WeightFileError,
    WeightTableError,
    FileNotFoundError,
    FileExistsError,
)


def read_prompts(*, dialog: bool) -> list[Prompt]:
    """Every prompt of the command line; their pictures are known to be readable.

    Raises:
      DataError: no prompt, pictures without one prompt, or a prompt that cannot be put to a model.
    """
    if not PROMPT.value and not JSONL.value:
        raise DataError('nothing to answer: give --prompt "..." or --jsonl FILE')
    if IMAGE.value and len(PROMPT.value) != 1:
        raise DataError(f"--image goes with one --prompt, not {len(PROMPT.value)}; use --jsonl for several")
    prompts = [text_prompt(text, IMAGE.value, dialog=dialog) for text in PROMPT.value]
    prompts += file_prompts(JSONL.value) if JSONL.value else []
    for picture in {picture for prompt in prompts for picture in prompt.images}:
        load_picture(picture)
    return prompts


def entry(prompt: Prompt, answer: Generation) -> Entry:
    """An answer as the page shows it, its prompt with the pictures in their places."""
    pieces, shown = prompt.source.split(templates.IMAGE), []
    for number, piece in enumerate(pieces):
        shown += [piece.strip()] if piece.strip() else []
        if number < len(prompt.images):
            shown.append(np.asarray(load_picture(prompt.images[number])))
    notes = f"{answer.dropped} positions of the prompt did not fit" if answer.dropped else ""
    return Entry(shown, list(answer.parts) or ["(nothing)"], seed=answer.seed, notes=notes)


def claim_output(folder: str) -> None:
    """Refuse a folder that the page could not be written to, before the work is done.

    Raises:
      FileExistsError: it is a file, or holds other things and no page.
    """
    path = Path(folder)
    foreign = path.is_dir() and any(path.iterdir()) and not (path / "index.html").is_file()
    if foreign or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"--output={folder} holds other things; choose another folder")


def begun(mode: str) -> list[tuple[Conversation, list[Said]]]:
    """(conversation, its turns) of each record and sample; a story's turns are what was told before.

    Raises:
      DataError: no file, a record that breaks the schema, a picture that cannot be read, or flags that
        belong to single prompts.
    """
    if not JSONL.value or PROMPT.value or IMAGE.value:
        raise DataError(f"{mode} reads records: give --jsonl FILE, and neither --prompt nor --image")
    found = []
    for name, record in read_records(JSONL.value):
        turns = turns_of(record, Path(JSONL.value).expanduser().parent)
        if mode == "chat" and not any(turn.role == "user" for turn in turns):
            raise DataError(f"record {name!r} has no user turn to answer")
        for sample in range(NUM_SAMPLES.value):
            label = name if NUM_SAMPLES.value == 1 else f"{name}_{sample}"
            seed = seed_of(name, SEED.value, sample)
            system = record.system if mode == "chat" else ""
            said = list(turns) if mode == "story" else []
            found.append((Conversation(label, seed, said, system=system), turns))
    return found


def described() -> dict[str, Any]:
    """What the checkpoint says of its run."""
    checkpoints = open_checkpoints(CHECKPOINT.value)
    meta = checkpoints.meta(STEP.value)
    checkpoints.close()
    return meta


def stage_of(meta: Mapping[str, Any]) -> int:
    """1 for a run on captions, 2 for one that adapted the language model or started from another run."""
    return bundle(meta["config"], {})["stage"]


def check_settings(meta: Mapping[str, Any], changes: Mapping[str, str], weights: Mapping[str, str]) -> None:
    """Build everything but the weights, so that what does not go together is told before they are read.

    Raises:
      ConfigError: the changed settings, among them more pictures or text than the model has positions for.
    """
    config = override(config_of(meta, weights), changes)
    check_sources(config)
    spec = build(config)
    make_session(Run(config, spec, {}, llm_tokenizer(config, spec.towers), 0))


def check_conversations(
    meta: Mapping[str, Any], changes: Mapping[str, str], given: list[tuple[Conversation, list[Said]]]
) -> None:
    """ConfigError where a model without a vision tower would have to read pictures; a warning where the run
    never read any: a first stage knows captions only."""
    saved = meta["config"]
    pictures = any(isinstance(part, Drawn) for _, turns in given for turn in turns for part in turn.parts)
    draws = int(changes.get("max_images", saved["inference"]["max_images"])) > 0
    if saved["model"]["backbone"].get("vit") == "none" and (pictures or draws):
        what = "the records' pictures" if pictures else "what it draws itself"
        raise ConfigError(
            f"this run's model has no vision tower (model.backbone.vit='none') and cannot read {what}; use a "
            "run whose backbone sees" + ("" if pictures else ", or --inference max_images=0 for text alone")
        )
    if stage_of(meta) == 1:
        logging.warning(
            "this run is of stage 1, trained on single captions: do not expect it to go on with "
            "a story or dialogue; a stage-2 run (run.init_from) learns that"
        )


def converse(mode: str, run: Run, config: ConfigDict, given: list[tuple[Conversation, list[Said]]]) -> Path:
    """Tells stories or plays dialogues, and writes page and records."""
    session = make_session(run, batch_size=min(BATCH_SIZE.value, len(given)))
    conversations = [conversation for conversation, _ in given]
    shown = [len(turns) if mode == "story" else 1 for _, turns in given]
    if mode == "story":
        tell(session, conversations, SCENES.value)
    else:
        as_there = WINDOW.value is None and config.data.format in ("mmdialog", "shapes_dialogs")
        window = 3 if as_there else WINDOW.value
        chat(session, conversations, [turns for _, turns in given], window)
    page = show([entry_of(c, first) for c, first in zip(conversations, shown)], run, config)
    records = [record_of(c, first, number) for number, (c, first) in enumerate(zip(conversations, shown), 1)]
    write_records(OUTPUT.value, records)
    return page


def show(entries: Sequence[Entry], run: Run, config: ConfigDict) -> Path:
    """The page of some answers, with everything that made them."""
    inference = {f"inference.{name}": value for name, value in config.inference.items()}
    made = {"checkpoint": os.path.abspath(CHECKPOINT.value), "step": run.step, "run": config.run.name}
    return write_page(OUTPUT.value, "MiniGPT-5", entries, {**made, **inference})


def single_prompts(meta: Mapping[str, Any]) -> list[Prompt]:
    """Every prompt of the command line with its seed, as the run's stage puts prompts to the model."""
    second_stage = stage_of(meta) == 2
    dialog = TEMPLATE.value == "dialog" or (TEMPLATE.value is None and (second_stage or bool(IMAGE.value)))
    return [
        dataclasses.replace(prompt, seed=SEED.value + sample)
        for prompt in read_prompts(dialog=dialog)
        for sample in range(NUM_SAMPLES.value)
    ]


def generate(mode: str | None = None) -> Path:
    """The command; everything that can be refused is refused before weights are read.

    Args:
      mode: one of :data:`MODES`; None answers single prompts.

    Raises:
      ConfigError, DataError, CheckpointError, FileExistsError: as their messages say.
    """
    if mode not in (None, *MODES):
        raise ConfigError(f"unknown word {mode!r}; known: {', '.join(MODES)}, or none for single prompts")
    if not CHECKPOINT.value:
        raise ConfigError("give a run: --checkpoint DIR")
    changes, weights = cli.pairs(INFERENCE.value, "inference"), cli.pairs(WEIGHTS.value, "weights")
    override(get_config(), changes)
    claim_output(OUTPUT.value)
    given, meta = begun(mode) if mode else [], described()
    if mode:
        check_conversations(meta, changes, given)
    prompts = [] if mode else single_prompts(meta)
    check_settings(meta, changes, weights)
    run = load_run(CHECKPOINT.value, step=STEP.value, weights=weights)
    config = override(run.config, changes)
    cli.set_compile_cache(config)
    if mode:
        return converse(mode, run, config, given)
    session = make_session(run, batch_size=min(BATCH_SIZE.value, len(prompts)))
    entries = [entry(prompt, answer) for prompt, answer in zip(prompts, session.generate(prompts))]
    return show(entries, run, config)


def main(argv: Sequence[str]) -> None:
    """Answer, or say what is wrong in a line."""
    cli.quiet()
    try:
        print(generate(*argv[1:]))
    except USER_ERRORS as error:
        cli.fail(str(error))


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(cli.parse, words=1))
