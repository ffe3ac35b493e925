"""Words of the original's prompts, as pure functions: data set by data set (fidelity 5.2 to 5.4, 6.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.templates import END, IMAGE

PROMPT_SETS = ("head", "release")  # the original's two code generations (quirk Q26)
CC3M_SYSTEM = "You will be able to generate image according to command."
DIALOG_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once "
    "I provide it to you. Please generate conversations with appropriate images."
)
STORY_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once "
    "I provide it to you. Please understanding images and generate story."
)
DIALOG_SYSTEMS: dict[str, str] = {
    "head": DIALOG_SYSTEM,
    "release": DIALOG_SYSTEM.replace(
        "conversations with appropriate images.", "conversation with appropriate image."
    ),
}
_CC3M_HEAD = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)
# Released weights were trained with "a image".
CC3M_PROMPTS: dict[str, tuple[str, ...]] = {
    "head": _CC3M_HEAD,
    "release": tuple(p.replace("an image", "a image") for p in _CC3M_HEAD),
}
# Requests of a story's step, task by task; {text} stands for what the step says.
_STORY_HEAD = {
    "gen": ("Generate an image with the scene description: {text}", "the scene description: {text}"),
    "multimodal": (
        "Tell me the next scene with image.",
        "Generate the next scene with image.",
        "What should happen then?",
    ),
    "understanding": (
        f"Tell me the next scene description by this image: {IMAGE}",
        f"What happen in the next scene image: {IMAGE}",
    ),
}
STORY_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "head": _STORY_HEAD,
    "release": _STORY_HEAD | {"gen": tuple(p.replace("an image", "a image") for p in _STORY_HEAD["gen"])},
}


def check_prompt_set(prompt_set: str) -> None:
    """DataError for a prompt set that is not one of :data:`PROMPT_SETS`."""
    if prompt_set not in PROMPT_SETS:
        raise DataError(f"unknown prompt_set {prompt_set!r}; known: {', '.join(PROMPT_SETS)}")


def cc3m_instruction(caption: str, prompt: str) -> str:
    """Source of an instruction sample (no space before ``###``, as the original)."""
    return f"{CC3M_SYSTEM}###Human: {prompt} {caption} ###Assistant:"


def story_source(parts: Sequence[str], request: str) -> str:
    """Source of a story's step (fidelity 5.3).

    Args:
      parts: texts and images of the steps before, in order; a newline ends them.  An image is written
        :data:`~minigpt5_jax.data.text.templates.IMAGE`; in the original's samples one follows each text.
      request: one of :data:`STORY_PROMPTS`, ``{text}`` filled in.
    """
    before = "".join(parts) + "\n" if parts else ""
    return f"{STORY_SYSTEM}###Human:{before} {request} ###Assistant:"


def dialog_source(system: str, history: Sequence[tuple[str, str]], speaker: str = "Assistant") -> str:
    """System prompt, the turns before, and the opening of the next turn, single spaces between.

    Args:
      system: system prompt.
      history: (speaker, content) of earlier turns, speaker ``Human`` or ``Assistant``; images in
        content are written ``<Img><ImageHere></Img>``.
      speaker: whose turn is next.
    """
    pieces = [system, *(f"###{who}: {content}" for who, content in history), f"###{speaker}:"]
    return " ".join(piece for piece in pieces if piece)


def dialog_source_release(system: str, history: Sequence[tuple[str, str]], speaker: str = "Assistant") -> str:
    """:func:`dialog_source` before March 2024: no space after the system prompt, a newline after a turn."""
    return system + "".join(f"###{who}: {content}\n" for who, content in history) + f"###{speaker}:"


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a language model is spoken to: what a backbone's part says of its prompts.

    Attributes:
      end: what ends every turn.  image: how an input image is spelled, the placeholder inside.
      speakers: role (``user``, ``assistant``) -> its name in a dialogue.
      dialog: ``(system, [(speaker, content)])`` -> source that ends in the opening of the assistant's turn.
      story: ``(parts, request)`` -> source of a story's next step.
      dialog_system: system prompt of a dialogue.  next_scene: request for a story's next step.
    """

    end: str
    image: str
    speakers: dict[str, str]
    dialog: Callable[[str, Sequence[tuple[str, str]]], str]
    story: Callable[[Sequence[str], str], str]
    dialog_system: str
    next_scene: str


VICUNA_V0 = PromptStyle(
    end=END,
    image=IMAGE,
    speakers={"user": "Human", "assistant": "Assistant"},
    dialog=dialog_source,
    story=story_source,
    dialog_system=DIALOG_SYSTEM,
    next_scene=STORY_PROMPTS["head"]["multimodal"][0],
)
"""``###Human: ... ###Assistant:``, as MiniGPT-4 and MiniGPT-5 speak to Vicuna v0."""
