"""Held-out dialogues: an image exactly when one is called for, the right one, and right answers.

Every turn of the assistant is written after the true turns before it, as many as MMDialog's reader shows
(fidelity 5.4), under the run's own rules for text: nothing is forced.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.sources import MMDialogSource
from minigpt5_jax.evaluation.shapes import counts
from minigpt5_jax.inference.session import Generation, Prompt, mixed_seed
from minigpt5_jax.shapes.dataset import read_truth, write_dialogs
from minigpt5_jax.shapes.wording import COUNTS, WORDS
from minigpt5_jax.shapes.world import BACKGROUNDS, NAMES, Scene
from minigpt5_jax.wiring.session import LoadedModel

ANSWERED: dict[str, tuple[str, ...]] = {**NAMES, "background": BACKGROUNDS, "count": COUNTS}
"""What questions ask for, and the values an answer may name."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A turn of the assistant: what the truth wants, and what the model gave.

    Attributes:
      kind: of the exchange (``show``, ``edit``, ``look``, ``ask``, ``thank``).
      wanted: scene of the image that is called for, or None.
      asked: (what, value) of a question's turn, or None.
      answer: the model's.  drawn: what the oracle reads in its image, or None.
    """

    kind: str
    wanted: Scene | None
    asked: tuple[str, str] | None
    answer: Generation
    drawn: Scene | None

    @property
    def drew(self) -> bool:
        """Whether there is an image."""
        return bool(self.answer.images)

    @property
    def called_for(self) -> bool:
        """Whether one is wanted."""
        return self.wanted is not None


def judge_dialogs(
    run: LoadedModel,
    *,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Everything above, of ``count`` held-out dialogues.

    Returns:
      ``{"count", "seed", "turns", "cut", "placing", "images", "answers"}``, see the functions of these
      names; ``cut`` counts prompts that did not fit.

    Raises:
      ConfigError: a run of another world, or one that cannot see.
    """
    counts.check_run(run, reads_images=True)
    session = counts.open_session(run, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as directory:
        asked = read_turns(run, Path(directory), count, seed)
        given = session.generate([prompt for turns in asked for prompt, _ in turns])
    scenes, dialogs = iter(zip(given, counts.scenes_drawn(given), strict=True)), []
    for turns in asked:
        dialogs.append([_reply(truth, *next(scenes)) for _, truth in turns])
    return {
        "count": count,
        "seed": seed,
        "turns": len(given),
        "cut": sum(one.dropped > 0 for one in given),
        "placing": placing(dialogs),
        "images": image_shares(dialogs),
        "answers": answers(dialogs),
    }


def read_turns(
    run: LoadedModel, directory: Path, count: int, seed: int
) -> list[list[tuple[Prompt, dict[str, Any]]]]:
    """(prompt, truth) of every turn of the assistant, dialogue by dialogue, as MMDialog's reader has it."""
    data, vokens = run.config.data, run.spec.backbone.num_vokens
    path = write_dialogs(directory, "held_out", count, seed)
    rules = DialogRules(data.dialog_loader, training=False, num_vokens=vokens)
    source = MMDialogSource(path, rules=rules)
    dialogs = []
    for row, truth in enumerate(read_truth(directory, "held_out", "dialogs")):
        dialog, turns = source.dialog(row), []
        for number in range(1, len(dialog.turns), 2):
            example = rules.example(dialog, number)
            prompt = Prompt(example.source, example.images, mixed_seed(seed, row, number))
            turns.append((prompt, truth["turns"][number]))
        dialogs.append(turns)
    return dialogs


def _reply(truth: dict[str, Any], answer: Generation, drawn: Scene | None) -> Reply:
    wanted = Scene.from_json(truth["scene"]) if truth["wants_image"] else None
    asked = truth["answer"] and (truth["answer"]["asked"], truth["answer"]["value"])
    return Reply(truth["kind"], wanted, asked, answer, drawn)


def placing(dialogs: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Whether there is an image exactly where one is called for.

    ``accuracy`` over all turns, ``precision`` (of the turns with an image, those that call for one),
    ``recall`` (of the turns that call for one, those with an image), and ``by_kind``: accuracy of each kind.
    """
    right: Callable[[Reply], bool] = lambda reply: reply.drew == reply.called_for  # noqa: E731
    kinds = sorted({reply.kind for replies in dialogs for reply in replies})
    return {
        "accuracy": _share(dialogs, right),
        "precision": _share(dialogs, right, lambda reply: reply.drew),
        "recall": _share(dialogs, right, lambda reply: reply.called_for),
        "by_kind": {
            kind: _share(dialogs, right, lambda reply, kind=kind: reply.kind == kind) for kind in kinds
        },
    }


def image_shares(dialogs: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """``counts.attribute_shares`` of images that were called for and drawn: ``all``, and by kind."""
    wanted = [reply for replies in dialogs for reply in replies if reply.called_for]
    there = [reply for reply in wanted if reply.drew]
    kinds = {"all": there}
    for kind in sorted({reply.kind for reply in wanted}):
        kinds[kind] = [reply for reply in there if reply.kind == kind]
    return {
        kind: counts.attribute_shares([(reply.drawn, reply.wanted) for reply in replies])
        for kind, replies in kinds.items()
    }


def answers(dialogs: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Shares of questions whose answer states the right value and no other, ``all`` and by what is asked."""
    right: Callable[[Reply], bool] = lambda reply: states(reply.answer.text, *reply.asked)  # noqa: E731
    questions = [[reply for reply in replies if reply.asked] for replies in dialogs]
    about = sorted({reply.asked[0] for replies in questions for reply in replies})
    return {"all": _share(questions, right)} | {
        name: _share(questions, right, lambda reply, name=name: reply.asked[0] == name) for name in about
    }


def states(text: str, asked: str, value: str) -> bool:
    """Whether a text names ``value``, in any of its wordings, and no other value of what was ``asked``."""
    spoken = {word: name for name in ANSWERED[asked] for word in WORDS.get(name, (name,))}
    pattern = r"\b(" + "|".join(spoken) + r")\b"
    return {spoken[word] for word in re.findall(pattern, text.lower())} == {value}


def _share(
    dialogs: Sequence[Sequence[Reply]],
    right: Callable[[Reply], bool],
    among: Callable[[Reply], bool] = lambda reply: True,
) -> counts.Numbers:
    return counts.share([[right(reply) for reply in replies if among(reply)] for replies in dialogs])
