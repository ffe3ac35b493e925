"""Words of the original's prompts, as pure functions: data set by data set (reference 5.2 to 5.4, 6.4)."""

from __future__ import annotations

from collections.abc import Sequence

CC3M_SYSTEM = "You will be able to generate image according to command."
DIALOG_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once "
    "I provide it to you. Please generate conversations with appropriate images."
)
_CC3M_HEAD = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)
# Two generations of the original's code; released weights were trained with "a image" (quirk Q26).
CC3M_PROMPTS: dict[str, tuple[str, ...]] = {
    "head": _CC3M_HEAD,
    "release": tuple(p.replace("an image", "a image") for p in _CC3M_HEAD),
}


def cc3m_instruction(caption: str, prompt: str) -> str:
    """Source of an instruction sample (no space before ``###``, as the original)."""
    return f"{CC3M_SYSTEM}###Human: {prompt} {caption} ###Assistant:"


def dialog_source(system: str, history: Sequence[tuple[str, str]]) -> str:
    """System prompt, the turns before, and the opening of the assistant's turn.

    Args:
      system: system prompt.
      history: (speaker, content) of earlier turns, speaker ``Human`` or ``Assistant``; pictures in
        content are spelt ``<Img><ImageHere></Img>``.
    """
    pieces = [system, *(f"###{speaker}: {content}" for speaker, content in history), "###Assistant:"]
    return " ".join(piece for piece in pieces if piece)
