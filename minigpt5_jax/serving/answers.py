"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from minigpt5_jax.inference.streaming import Asked, Finished, Piece

Side = tuple[int, int] | None


def png(image: UInt8[np.ndarray, "H W 3"], side: Side) -> str:
    """An image as base64 of a PNG, resized where a size was asked for."""
    picture, file = Image.fromarray(image), io.BytesIO()
    if side is not None and side != picture.size:
        picture = picture.resize(side, Image.Resampling.BICUBIC)
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def image_part(image: UInt8[np.ndarray, "H W 3"], side: Side) -> dict[str, Any]:
    """An image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image, side)}"}}


class ChatAnswer:
    """One answer of ``/v1/chat/completions``, whole or as events.

    Args:
      name: of the model.  asked: the prompt.  seed: of the answer.  side: of its images.
      notes: what a reader should know.
    """

    def __init__(self, name: str, asked: Asked, seed: int, side: Side, notes: Sequence[str]):
        self.asked, self.side = asked, side
        self._head = {
            "id": f"chatcmpl-{time.time_ns():x}",
            "created": int(time.time()),
            "model": name,
            "seed": seed,
            "notes": list(notes),
        }

    def usage(self, done: Finished) -> dict[str, int]:
        """Ids read and written."""
        read, written = self.asked.prompt_tokens, len(done.answer.token_ids)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self, done: Finished) -> dict[str, Any]:
        """The answer; a text alone is a string, as clients expect."""
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else image_part(part, self.side)
            for part in done.answer.parts
        ]
        images = [part for part in parts if part["type"] == "image_url"]
        content = parts if images else done.answer.text
        message = {"role": "assistant", "content": content, "refusal": None, "images": images}
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": self._reason(done)
        }  # fmt: skip
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self.usage(done)}

    def piece(self, piece: Piece) -> str:
        """An event with more of the answer.

        ``delta.part`` says which part it belongs to; an image that is begun is an empty list.
        """
        if piece.text is not None:
            return self._chunk({"part": piece.part, "content": piece.text})
        images = [] if piece.image is None else [image_part(piece.image, self.side)]
        return self._chunk({"part": piece.part, "images": images})

    def first(self) -> str:
        """The event that opens the answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def last(self, done: Finished, usage: bool) -> str:
        """The events that end it."""
        end = self._chunk({}, self._reason(done))
        if usage:
            end += event({**self._chunk_head(), "choices": [], "usage": self.usage(done)})
        return end + "data: [DONE]\n\n"

    def _reason(self, done: Finished) -> str:
        return "length" if done.reason == "length" else "stop"

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk"}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return event({**self._chunk_head(), "choices": [choice]})


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
