"""Requests from the door to the answer: how many are inside, how long they may stay, whether they left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from minigpt5_jax.inference.streaming import Asked, Finished, Piece
from minigpt5_jax.serving.engine import Engine, Event, Job
from minigpt5_jax.serving.refusal import Refusal
from minigpt5_jax.serving.schema import Limits


class ClientLeft(Exception):
    """Nobody waits for the answer."""


class Visit:
    """One request that was let in; it must be closed.

    Args:
      request: of the client.  engine: who answers.  limits: of the server.

    Raises:
      Refusal: 429 where too many are inside.
    """

    def __init__(self, request: Request, engine: Engine, limits: Limits):
        inside = engine.metrics.inside
        if engine.inside >= limits.waiting:
            raise Refusal(
                429,
                f"{limits.waiting} requests are being answered or wait; try again later",
                code="rate_limit_exceeded",
                retry_after=engine.patience(),
            )
        engine.inside += 1
        inside.set(engine.inside)
        self.request, self.engine, self.limits = request, engine, limits
        self.until = time.monotonic() + limits.seconds
        self.jobs: list[Job] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._gone: asyncio.Task | None = None
        self._open = True
        self.missing = 0  # answers that were asked for and are not there

    def close(self) -> None:
        """Give up what is not answered, and make room for another request."""
        if not self._open:
            return
        self._open = False
        for job in self.jobs:
            job.left = True
        if self.missing:
            self.engine.metrics.given_up.inc()
        if self._gone is not None:
            self._gone.cancel()
        self.engine.inside -= 1
        self.engine.metrics.inside.set(self.engine.inside)

    async def body(self) -> bytes:
        """The request's body.

        Raises:
          Refusal: no JSON by its type, more bytes than the limit, or too slow.
          ClientLeft: the client went away.
        """
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also keeps other sites' forms out: a browser asks before JSON
            raise Refusal(415, "send JSON, with Content-Type: application/json", code="invalid_content_type")
        most = self.limits.body_bytes
        too_large = Refusal(413, f"the body has more than {most:,} bytes", code="request_too_large")
        length = self.request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(min(30.0, self.limits.seconds)):
                async for chunk in self.request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except ClientDisconnect:
            raise ClientLeft from None
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time", code="timeout") from None
        return bytes(data)

    async def answers(
        self, asked: list[Asked], settings: Mapping[str, Any], steps: int | None
    ) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """(number of the prompt, event) until every prompt is answered.

        Raises:
          ClientLeft: the client went away.
          Refusal: 504 where the time is over, 500 where the model failed.
        """
        loop = asyncio.get_running_loop()

        def teller(number: int) -> Any:
            def tell(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

            return tell

        self.jobs = [Job(one, settings, steps, teller(number)) for number, one in enumerate(asked)]
        self._gone = asyncio.create_task(self._leaving())
        self.engine.submit(*self.jobs)
        self.missing = len(asked)
        while self.missing:
            number, event = await self._next_event()
            if isinstance(event, Exception):
                raise Refusal(500, "the model failed; the server's log says why", code="internal_error")
            if isinstance(event, Finished):
                self.missing -= 1
                self.engine.metrics.tokens.inc(len(event.answer.token_ids))
                self.engine.metrics.images.inc(len(event.answer.images))
            yield number, event

    async def _next_event(self) -> tuple[int, Event]:
        coming = asyncio.create_task(self._events.get())
        try:
            await asyncio.wait(
                {coming, self._gone},
                timeout=max(0.0, self.until - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
        if self._gone.done():
            raise ClientLeft
        raise Refusal(
            504,
            f"no answer within {self.limits.seconds:g} seconds; ask for fewer steps or try again later",
            code="timeout",
        )

    async def _leaving(self) -> None:
        """Returns when the client has gone; the body was read before."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
