"""Requests to a judge as JSON lines of the OpenAI chat form, and its replies, kept by the request's hash.

The file can be run anywhere that speaks this form: a batch of a provider, or a local server.  A request that
was answered once is not written again.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image

SIDE = 512
"""Longer side of images that are sent."""
URL = "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a judge is asked: texts and images of the user's message; the system's message, '' for none."""

    parts: tuple[str | Path, ...]
    system: str = ""


def messages(request: Request) -> list[dict[str, Any]]:
    """The messages of a request, images as data URLs (JPEG, at most 512 a side).

    Raises:
      SampleError: an image cannot be read.
    """
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _data_url(part)}}
        for part in request.parts
    ]
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": content}]


def _data_url(path: Path) -> str:
    image, buffer = load_image(path), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Judge:
    """Replies by request.

    Args:
      model: who judges; another model's replies are others.
      cache: file of replies, which :meth:`learn` adds to.
      instructions: the benchmark's own, for its requests.

    Raises:
      DataError: the cache is damaged.
    """

    def __init__(self, model: str, cache: Path, instructions: Any = ""):
        self.model, self.instructions, self._cache = model, instructions, cache
        self._replies: dict[str, str] = dict(_replies(cache)) if cache.is_file() else {}

    def body(self, request: Request) -> dict[str, Any]:
        """The body of a call."""
        return {"model": self.model, "temperature": 0, "messages": messages(request)}

    def name(self, request: Request) -> str:
        """The hash of a request, which it is sent and kept under."""
        return _hash(self.body(request))

    def reply(self, request: Request) -> str | None:
        """What the judge said, or None."""
        return self._replies.get(self.name(request))

    def learn(self, paths: Sequence[Path]) -> int:
        """Takes replies from files into the cache, and returns how many are new.

        Raises:
          DataError: a file is cut off, has a call that failed, or a line that is no reply.
        """
        before = len(self._replies)
        for path in paths:
            self._replies.update(_replies(path))
        if paths:
            partial = self._cache.with_suffix(f".{os.getpid()}.partial")
            lines = (
                json.dumps({"custom_id": n, "content": c}, ensure_ascii=False)
                for n, c in self._replies.items()
            )
            partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            partial.replace(self._cache)
        return len(self._replies) - before

    def write(self, requests: Iterable[Request], path: Path) -> tuple[int, int]:
        """Writes the requests without a reply, each once; how many, and how many have one."""
        written, known = set(), set()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as file:
            for request in requests:
                body = self.body(request)
                name = _hash(body)
                if name in self._replies:
                    known.add(name)
                elif name not in written:
                    written.add(name)
                    line = {"custom_id": name, "method": "POST", "url": URL, "body": body}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        partial.replace(path)
        return len(written), len(known)

    def replies(self, requests: Mapping[tuple[str, ...], Request]) -> dict[tuple[str, ...], str]:
        """The reply to every request.

        Raises:
          DataError: some have none; with their number, and what to do.
        """
        found = {key: self.reply(request) for key, request in requests.items()}
        if missing := [key for key, reply in found.items() if reply is None]:
            raise DataError(
                f"{len(missing)} of {len(found)} requests have no reply of {self.model}, "
                f"{' '.join(missing[0])} for "
                "one; write those that are left (`benchmark requests`), run them, and give the replies "
                "(--answers)"
            )
        return {key: reply for key, reply in found.items() if reply is not None}


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:40]


def _replies(path: Path) -> Iterable[tuple[str, str]]:
    """(hash, text) of each line: a batch's output, or the plain form of the cache.

    A reply without a text (``"content": null``, as of a call that was refused) is a call that failed; in the
    plain form it is passed over, so that it is asked again.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes: texts may hold U+2028
        try:
            value = json.loads(line)
            name, plain = str(value["custom_id"]), "content" in value
            failed = not plain and (value.get("error") or value["response"].get("status_code", 200) != 200)
            said = None
            if not failed:
                body = value if plain else value["response"]["body"]["choices"][0]["message"]
                said = body["content"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{path}:{number} is no reply of a judge ({type(error).__name__} {error}); give lines with "
                "custom_id and response, as a batch of the OpenAI form returns them"
            ) from None
        if isinstance(said, str):
            yield name, said
        elif not plain:
            why = "failed" if failed else "has no text as its reply"
            raise DataError(
                f"{path}:{number}: the call {name[:12]}... {why}; run it again, or delete the line"
            )
