"""Talk with a trained model: it answers with texts and images.

    python -m minigpt5_jax.chat --checkpoint shapes
    python -m minigpt5_jax.chat --checkpoint shapes --message "please draw: a large red circle." \\
        --message "make it striped."
    python -m minigpt5_jax.chat --checkpoint runs/stage2 --image photo.jpg --message "what do you see?"

Without ``--message`` the lines of the standard input are the messages, one by one, until it ends.  Texts are
printed, and the paths of images, which are written into ``--output`` with the page of the whole conversation.
``--json`` prints one JSON object for each answer.

``shapes`` is the small model that ships with the package.  It knows coloured shapes and is asked in its own
words: "please draw: a large red circle.", "make it striped.", "what colour is the circle?"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.inference.page import Entry, write_page
from minigpt5_jax.wiring.generation import claim_output
from minigpt5_jax.wiring.pipeline import Answer, MiniGPT5, Picture

CHECKPOINT = cli.define_path(
    "checkpoint", None, "A run's --workdir, a saved model, a Hugging Face id in the cache, or shapes."
)
MESSAGE = flags.DEFINE_multi_string("message", [], "What to say; may be given several times.")
IMAGE = cli.define_path("image", None, "Image of the first message; several in order.", multi=True)
OUTPUT = cli.define_path("output", "conversation", "Folder of images and page.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the conversation.", lower_bound=0)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint to open; the newest by default.")
INFERENCE = flags.DEFINE_multi_string(
    "inference", [], "KEY=VALUE in place of the run's inference.KEY, for example num_inference_steps=10."
)
WEIGHTS = flags.DEFINE_multi_string("weights", [], "NAME=PATH where a source of frozen weights moved.")
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object for each answer.")


def messages() -> Iterator[str]:
    """What the user says: the flags, else the lines of the standard input."""
    if MESSAGE.value:
        yield from MESSAGE.value
        return
    if sys.stdin.isatty():
        cli.tell("say something; an empty line or Ctrl-D ends")
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip()


def show(answer: Answer, folder: Path, number: int) -> list[dict[str, str]]:
    """Writes the images of an answer; its parts in order, images by their paths."""
    shown: list[dict[str, str]] = []
    images = 0
    for part in answer.parts:
        if isinstance(part, str):
            shown.append({"type": "text", "text": part})
            continue
        images += 1
        path = folder / f"answer_{number}_{images}.png"
        part.save(path)
        shown.append({"type": "image", "path": str(path)})
    return shown


def converse() -> Path | None:
    """Every message and its answer; the page of all, or None where nothing was said."""
    if not CHECKPOINT.value:
        raise ConfigError("give a model: --checkpoint shapes, or a run's folder")
    folder = Path(cli.check_writable(OUTPUT.value))
    claim_output(folder)
    cli.tell(f"opening {CHECKPOINT.value}")
    model = MiniGPT5.from_pretrained(
        CHECKPOINT.value,
        step=STEP.value,
        weights=cli.sources(WEIGHTS.value),
        **cli.pairs(INFERENCE.value, "inference"),
    )
    cli.tell("the first answer takes longer, as programs are compiled")
    chat, entries = model.chat(seed=SEED.value), []
    images: list[Picture] = [Path(path) for path in IMAGE.value]  # of the first message that is answered
    for number, message in enumerate(messages(), 1):
        try:
            answer = chat.send([*images, message])
        except DataError as error:
            if MESSAGE.value:
                raise
            cli.tell(f"error: {error}")  # who types may try again
            continue
        said = [*(np.asarray(load_image(path)) for path in images), message]
        images = []
        made = [part if isinstance(part, str) else np.asarray(part) for part in answer.parts]
        entries.append(Entry(said, made or ["(nothing)"], seed=answer.seed, notes=" · ".join(answer.notes)))
        write_page(folder, "MiniGPT-5", entries, {"checkpoint": CHECKPOINT.value, "step": model.model.step})
        parts = show(answer, folder, number)
        line = json.dumps({"message": message, "parts": parts, "notes": answer.notes, "seed": answer.seed})
        told = [part.get("text") or part["path"] for part in parts] or ["(nothing)"]
        print(line if JSON.value else "\n".join(told), flush=True)
        for note in answer.notes:
            cli.tell(f"note: {note}")
    return folder / "index.html" if entries else None


def main(argv: list[str]) -> None:
    """The command."""

    def run() -> None:
        if page := converse():
            cli.tell(f"the conversation: {page}")

    cli.guarded(run)


if __name__ == "__main__":
    cli.start(main)
