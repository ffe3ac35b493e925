"""The requests of OpenAI's API that are understood, and their limits."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minigpt5_jax.serving.refusal import Refusal

MAX_STEPS, MAX_SIDE, MAX_MESSAGES, MAX_PARTS, MAX_TEXT = 100, 1024, 200, 64, 20_000
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Guidance = Annotated[float, Field(ge=0, le=30)]
Size = Annotated[str, Field(pattern=r"^(auto|\d{1,4}x\d{1,4})$")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      waiting: requests that are answered or wait for it, together; beyond them 429.
      seconds: time of a request, its waiting included; beyond it 504.
      body_bytes: of a request; beyond them 413.
      images: input images of a request.
    """

    waiting: int = 64
    seconds: float = 300.0
    body_bytes: int = 16 * 2**20
    images: int = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    """An image as a data URL; ``detail`` changes nothing."""

    url: str
    detail: str | None = None


class ImagePart(_Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    """A message; ``images`` of an answer repeat its parts and are not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Text
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)
        ]
    )
    images: list[Any] | None = None
    name: str | None = None
    refusal: str | None = None


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(_Strict):
    model: str
    user: str | None = None  # said by clients, of no consequence here
    metadata: dict[str, Any] | None = None
    seed: Seed | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    size: Size | None = None


class ChatRequest(_Request):
    """``POST /v1/chat/completions``; the last six fields are ours."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    store: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    image_seed: Seed | None = None
    mode: Literal["chat", "story"] = "chat"


class ImagesRequest(_Request):
    """``POST /v1/images/generations``."""

    prompt: Text
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    response_format: Literal["b64_json"] | None = None


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: bytes) -> R:
    """A request of its JSON; Refusal 400 that names the first field that is wrong."""

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        given = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        what = "is not understood by this server; leave it out" if unknown else first["msg"]
        raise Refusal(400, f"{where or 'the body'}: {what}", code="invalid_value", param=where) from None


def chat_messages(request: ChatRequest, limits: Limits) -> list[dict[str, Any]]:
    """Messages as :meth:`MiniGPT5.prompt` reads them, images as the bytes of their files.

    Raises:
      Refusal: too many images, or one that is no data URL: nothing is fetched and no file is opened.
    """
    messages, count = [], 0
    for number, message in enumerate(request.messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            messages.append({"role": role, "content": message.content})
            continue
        content: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            count += 1
            where = f"messages.{number}.content"
            if count > limits.images:
                raise Refusal(400, f"more than {limits.images} images; leave older ones out", param=where)
            content.append({"type": "image", "image": _image_bytes(part.image_url.url, where)})
        if role == "system":
            if any(part["type"] == "image" for part in content):
                raise Refusal(400, "the system prompt is text, without images", param=f"messages.{number}")
            messages.append({"role": role, "content": " ".join(part["text"] for part in content)})
        else:
            messages.append({"role": role, "content": content})
    return messages


def _image_bytes(url: str, where: str) -> bytes:
    """What a data URL holds."""
    start = DATA_URL.match(url)
    if start is None:
        raise Refusal(
            400,
            "an image is given as a data URL (data:image/png;base64,...): this server fetches no addresses "
            "and opens no files for its clients",
            code="invalid_image_url",
            param=where,
        )
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            400, "the data URL of an image is no base64", code="invalid_image", param=where
        ) from None


def side_of(size: str | None) -> tuple[int, int] | None:
    """(width, height) that was asked for; None for what the model draws."""
    if size is None or size == "auto":
        return None
    width, height = map(int, size.split("x"))
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise Refusal(
            400, f"size {size}: sides are 1 to {MAX_SIDE} pixels", code="invalid_value", param="size"
        )
    return width, height
