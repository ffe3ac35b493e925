"""Whole stories and dialogues: what the model wrote and drew is read again before the next answer.

Every conversation goes its own way: its answers depend on its own turns and seed, not on the others that
are made in the same batch.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.text.prompts import VICUNA_V0, PromptStyle
from minigpt5_jax.inference.session import Generation, Prompt, Session, mixed_seed


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """One turn: text and images (paths or encoded bytes) in order; role ``user`` or ``assistant``."""

    role: str
    parts: tuple["str | ImagePart", ...]

    def texts(self, style: PromptStyle) -> list[str]:
        """Its texts, and a placeholder for each image."""
        return [part if isinstance(part, str) else style.image for part in self.parts]


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePart:
    """An image of a turn; wrapped, since a path is a string as texts are."""

    image: ImageSource


@dataclasses.dataclass(eq=False)
class Conversation:
    """What was said so far.

    Attributes:
      id: its name in files.
      seed: of all its answers.
      messages: turns; the model's are appended.
      answers: what the model wrote, in order.
      system: system prompt of a dialogue.
    """

    id: str
    seed: int
    messages: list[Message]
    answers: list[Generation] = dataclasses.field(default_factory=list)
    system: str = ""

    def next_seed(self) -> int:
        """Seed of the next answer, a function of ``seed`` and the number of answers."""
        return mixed_seed(self.seed, len(self.answers))


def encode_png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """An image as the model reads it again: nothing is lost."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def answer_turn(answer: Generation) -> Message:
    """An answer as a turn of the conversation."""
    parts = tuple(part if isinstance(part, str) else ImagePart(encode_png(part)) for part in answer.parts)
    return Message("assistant", parts)


def story_prompt(conversation: Conversation, request: str = "", style: PromptStyle = VICUNA_V0) -> Prompt:
    """Everything so far and the request for the next scene, as stage 2 trains it (fidelity 5.3)."""
    messages = conversation.messages
    before = [text for turn in messages for text in turn.texts(style)]
    source = style.story(before, request or style.next_scene)
    return Prompt(source, _images(messages), conversation.next_seed())


def dialog_prompt(
    conversation: Conversation, window: int | None = None, style: PromptStyle = VICUNA_V0
) -> Prompt:
    """The last ``window`` turns (None for all) and the opening of the assistant's (fidelity 5.4)."""
    messages = conversation.messages if window is None else conversation.messages[-window:]
    spoken = [(style.speakers[turn.role], " ".join(turn.texts(style))) for turn in messages]
    return Prompt(style.dialog(conversation.system, spoken), _images(messages), conversation.next_seed())


def _images(messages: Sequence[Message]) -> tuple[ImageSource, ...]:
    return tuple(part.image for turn in messages for part in turn.parts if isinstance(part, ImagePart))


def advance(
    session: Session, conversations: Sequence[Conversation], prompt: Callable[[Conversation], Prompt]
) -> None:
    """One answer to each conversation, appended to it.

    Raises:
      DataError: a conversation cannot be put to this model; none of them is changed.
    """
    for conversation, answer in zip(conversations, session.generate([prompt(c) for c in conversations])):
        conversation.answers.append(answer)
        if answer.parts:
            conversation.messages.append(answer_turn(answer))


def continue_story(session: Session, stories: Sequence[Conversation], scenes: int, request: str = "") -> None:
    """Continues every story by ``scenes`` answers, each of which reads all before it."""
    for _ in range(scenes):
        advance(session, stories, lambda story: story_prompt(story, request, session.style))


def chat(
    session: Session,
    dialogs: Sequence[Conversation],
    script: Sequence[Sequence[Message]],
    window: int | None = None,
) -> None:
    """Plays every dialogue: after each user's turn of its script that no answer follows, the model's.

    Args:
      dialogs: with nothing said yet.
      script: turns of each; an assistant's turn is taken as said, not answered.
      window: turns the model reads; None for all.
    """
    todo = [list(turns) for turns in script]
    while waiting := [number for number, turns in enumerate(todo) if turns]:
        asked = []
        for number in waiting:
            turns, dialog = todo[number], dialogs[number]
            while turns:
                dialog.messages.append(turns.pop(0))
                if dialog.messages[-1].role == "user" and not (turns and turns[0].role == "assistant"):
                    asked.append(dialog)
                    break
        if asked:
            advance(session, asked, lambda dialog: dialog_prompt(dialog, window, session.style))
