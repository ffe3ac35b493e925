"""Answer prompts from a checkpoint and write a page of text and images.

    python -m minigpt5_jax.generate --checkpoint runs/mine --prompt "a red fox in the snow" --output page
    python -m minigpt5_jax.generate --checkpoint runs/mine --prompt "What came next?" --image photos/1.jpg
    python -m minigpt5_jax.generate --checkpoint runs/mine --jsonl prompts.jsonl --num_samples 3
    python -m minigpt5_jax.generate story --checkpoint runs/stage2 --jsonl openings.jsonl --scenes 4
    python -m minigpt5_jax.generate chat --checkpoint runs/stage2 --jsonl script.jsonl
    python -m minigpt5_jax.generate chat --checkpoint shapes --prompt "please draw: a large red circle." \\
        --prompt "make it striped."

``--image`` belongs to the one ``--prompt``; its place in the text is ``<ImageHere>``, or before it.  A
record of ``--jsonl`` (:mod:`minigpt5_jax.data.samples.records`) ends in a user turn, or is a pair, whose
caption is the prompt; its image paths stay in the file's folder.  A prompt longer than ``data.max_length``
loses its oldest turns, with a warning.

``story`` continues the story that a record tells (its texts and images, in order) scene by scene, ``chat``
answers each user turn of a record; every answer is read again before the next.  Each ``--prompt`` of ``chat``
is a turn of the user; those of ``story``, and its ``--image``, are how it begins.  Both write, beside the
page, ``conversations.jsonl`` in the schema they read.  A conversation's seed follows from ``--seed`` and its
``id``, so it goes the same way alone and among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.wiring.generation import MODES, Request, generate_page
from minigpt5_jax.wiring.restore import open_run

CHECKPOINT = cli.define_path(
    "checkpoint", None, "A run's --workdir, a saved model, a Hugging Face id in the cache, or shapes."
)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to answer; may be given several times.")
IMAGE = cli.define_path("image", None, "Input image of the one --prompt; several in order.", multi=True)
JSONL = cli.define_path("jsonl", None, "File of records, each a prompt.")
ALLOW_OUTSIDE_IMAGES = flags.DEFINE_boolean(
    "allow_outside_images", False, "Image paths in --jsonl may lead out of its folder."
)
OUTPUT = cli.define_path("output", "page", "Folder of the page.")
SEED = flags.DEFINE_integer("seed", 0, "Of the first sample; the others count up from it.", lower_bound=0)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers to each prompt.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Answers made together at most.", lower_bound=1)
TEMPLATE = flags.DEFINE_enum(
    "template",
    None,
    ["bare", "dialog"],
    "How --prompt is put to the model: as a caption (stage 1), or as a dialogue's user turn (stage 2).  "
    "Default: dialog for runs that started from another one and for prompts with images.",
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


def generate(mode: str | None = None) -> Path:
    """The command: the page of what the flags ask for.

    Args:
      mode: one of :data:`MODES`; None answers single prompts.

    Raises:
      ConfigError, DataError, CheckpointError, FileExistsError: as their messages say.
    """
    if mode not in (None, *MODES):
        raise ConfigError(f"unknown word {mode!r}; known: {', '.join(MODES)}, or none for single prompts")
    if not CHECKPOINT.value:
        raise ConfigError("give a run: --checkpoint DIR")
    cli.check_writable(OUTPUT.value)
    cli.tell(f"opening {CHECKPOINT.value}")
    run = open_run(
        CHECKPOINT.value,
        step=STEP.value,
        weights=cli.sources(WEIGHTS.value),
        inference=cli.pairs(INFERENCE.value, "inference"),
    )
    cli.set_compile_cache(run.config)
    request = Request(
        mode=mode,
        texts=PROMPT.value,
        images=IMAGE.value,
        jsonl=JSONL.value,
        allow_outside_images=ALLOW_OUTSIDE_IMAGES.value,
        seed=SEED.value,
        num_samples=NUM_SAMPLES.value,
        batch_size=BATCH_SIZE.value,
        template=TEMPLATE.value,
        scenes=SCENES.value,
        window=WINDOW.value,
    )
    return generate_page(run, request, OUTPUT.value, cli.tell)


def main(argv: Sequence[str]) -> None:
    """Answer, or say what is wrong in a line."""
    cli.guarded(lambda: print(generate(*argv[1:])))


if __name__ == "__main__":
    cli.start(main, words=1)
