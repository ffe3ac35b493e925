"""The server's addresses: OpenAI's API in front of one model, and the page to talk to it."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import dataclasses
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from absl import logging
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.inference.session import mixed_seed
from minigpt5_jax.inference.streaming import Asked, Finished
from minigpt5_jax.serving.answers import ChatAnswer, event, png
from minigpt5_jax.serving.engine import Engine
from minigpt5_jax.serving.metrics import Metrics
from minigpt5_jax.serving.refusal import Refusal
from minigpt5_jax.serving.schema import (
    ChatRequest,
    ImagesRequest,
    Limits,
    chat_messages,
    parse,
    side_of,
)
from minigpt5_jax.serving.visits import ClientLeft, Visit

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
LEFT = 499  # as other servers log a client that went away; nobody reads it
EXAMPLES = {
    1: ("a large red circle", "a small blue square"),
    2: (
        "please draw: a large red circle.",
        "make it striped.",
        "what colour is the circle?",
        "i want to see a small blue square.",
    ),
}
"""What models of the small world understand, by the stage of their training."""


@dataclasses.dataclass(eq=False)
class Service:
    """What a server offers.

    Attributes:
      engine: answers.  name: of its model, in requests.
      limits: of requests.
      key: that requests must bring; None for none.
      hosts: names under which a server without a key may be spoken to, so that no other site can make a
        browser do it (DNS rebinding); None for any.
      reading: a thread for prompts.  One is enough, and decodes one image at a time: the largest take
        hundreds of megabytes.
    """

    engine: Engine
    name: str
    limits: Limits = dataclasses.field(default_factory=Limits)
    key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK
    reading: concurrent.futures.Executor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, "reading")
    )

    async def read(
        self, prompt: list[dict[str, Any]], seed: int, story: bool, **how: Any
    ) -> tuple[Asked, list[str]]:
        """A prompt that may be submitted, and notes on it; Refusal 400 where the model cannot read it."""

        def read() -> tuple[Asked, list[str]]:
            model, put = self.engine.model, prompt
            if model.stage == 1 and len(prompt) == 1 and isinstance(prompt[0]["content"], str):
                put = prompt[0]["content"]  # it was trained on captions alone
            made, notes = model.prompt(put, seed, story=story)
            asked = self.engine.read(made, **how)
            dropped = asked.row.expanded.dropped
            more = [f"the oldest turns did not fit: {dropped} positions of the prompt were left out"]
            row = dataclasses.replace(asked.row, prompt=dataclasses.replace(made, images=()))  # done with
            return dataclasses.replace(asked, row=row), [*notes, *more[: bool(dropped)]]

        try:
            return await asyncio.get_running_loop().run_in_executor(self.reading, read)
        except DataError as error:
            raise Refusal(400, str(error), code="invalid_prompt") from None

    def about(self) -> dict[str, Any]:
        """The entry of ``/v1/models``; ``minigpt5`` is for the page."""
        model = self.engine.model
        inference = model.config.inference
        of_shapes = model.config.data.format.startswith("shapes")
        about = {
            "stage": model.stage,
            "step": model.model.step,
            "sees": bool(model.model.spec.backbone.image_tokens),
            "image_size": model.model.spec.generator.image_size,
            "num_inference_steps": inference.num_inference_steps,
            "guidance_scale": inference.guidance_scale,
            "examples": EXAMPLES[model.stage] if of_shapes else (),
        }
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "minigpt5_jax",
            "minigpt5": about,
        }

    def check(self, request: Request) -> None:
        """Refusal for a wrong key, or a name that is not this server's."""
        if self.key is None:
            host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
            if self.hosts is not None and host not in self.hosts:
                raise Refusal(403, f"this server is not called {host!r}", code="invalid_host")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_model(self, name: str) -> None:
        """Refusal 404 for another model."""
        if name != self.name:
            raise Refusal(
                404,
                f"there is no model {name!r}; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )


def make_app(service: Service) -> FastAPI:
    """The application of a service."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics, page, policy = service.engine.metrics, *_page()

    app.add_middleware(_Counted, metrics=metrics)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        return await refuse(request, Refusal(error.status_code, str(error.detail)))

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logging.error("%s failed", request.url.path, exc_info=error)
        return await refuse(
            request, Refusal(500, "the server failed; its log says why", code="internal_error")
        )

    @app.get("/")
    async def talk() -> Response:
        return HTMLResponse(
            page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        )

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "model": service.name, "inside": service.engine.inside})

    @app.get("/metrics")
    async def numbers(request: Request) -> Response:
        service.check(request)
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check(request)
        return JSONResponse({"object": "list", "data": [service.about()]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        service.check(request)
        service.check_model(name)
        return JSONResponse(service.about())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _chat(service, request)

    @app.post("/v1/images/generations")
    async def images(request: Request) -> Response:
        return await _images(service, request)

    return app


async def _chat(service: Service, request: Request) -> Response:
    service.check(request)
    visit = Visit(request, service.engine, service.limits)
    try:
        asked_for = parse(ChatRequest, await visit.body())
        service.check_model(asked_for.model)
        side, seed = side_of(asked_for.size), _seed(asked_for.seed)
        asked, notes = await service.read(
            chat_messages(asked_for, service.limits),
            seed,
            asked_for.mode == "story",
            guidance_scale=asked_for.guidance_scale,
            image_seed=asked_for.image_seed,
            max_tokens=asked_for.max_completion_tokens or asked_for.max_tokens,
        )
        answer = ChatAnswer(service.name, asked, seed, side, notes)
        events = visit.answers([asked], _settings(asked_for), asked_for.num_inference_steps)
        if asked_for.stream:
            usage = bool(asked_for.stream_options and asked_for.stream_options.include_usage)
            told, stream, visit = _stream(events, answer, usage), visit, None
            return _Stream(
                stream, told, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        async for _, piece in events:
            if isinstance(piece, Finished):
                return JSONResponse(await asyncio.to_thread(answer.whole, piece))
        raise AssertionError("answers end in Finished")
    finally:
        if visit is not None:
            visit.close()


class _Stream(StreamingResponse):
    """A response that closes its visit, also where the client left before the first event."""

    def __init__(self, visit: Visit, *given: Any, **more: Any):
        super().__init__(*given, **more)
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.close()


class _Counted:
    """What counts requests, and says that no type is to be guessed."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)


async def _stream(events: AsyncIterator, answer: ChatAnswer, usage: bool) -> AsyncIterator[str]:
    """Server-sent events of an answer; what goes wrong on the way is the last of them."""
    try:
        yield answer.first()
        async for _, piece in events:
            done = isinstance(piece, Finished)
            yield answer.last(piece, usage) if done else await asyncio.to_thread(answer.piece, piece)
    except Refusal as error:
        yield event(error.body())
    except ClientLeft:
        return


async def _images(service: Service, request: Request) -> Response:
    service.check(request)
    visit = Visit(request, service.engine, service.limits)
    try:
        asked_for = parse(ImagesRequest, await visit.body())
        service.check_model(asked_for.model)
        side, first = side_of(asked_for.size), _seed(asked_for.seed)
        seeds = [first if not number else mixed_seed(first, number) for number in range(asked_for.n or 1)]
        prompt = [{"role": "user", "content": asked_for.prompt}]
        asked = [
            (await service.read(prompt, seed, False, guidance_scale=asked_for.guidance_scale))[0]
            for seed in seeds
        ]
        made: dict[int, str] = {}
        settings = {"force_image": "after_text", "max_images": 1}
        async for number, piece in visit.answers(asked, settings, asked_for.num_inference_steps):
            if isinstance(piece, Finished):
                made[number] = await asyncio.to_thread(png, piece.answer.images[0], side)
        data = [{"b64_json": made[number], "seed": seed} for number, seed in enumerate(seeds)]
        return JSONResponse({"created": int(time.time()), "data": data})
    finally:
        visit.close()


def _seed(given: int | None) -> int:
    """The seed of a request, drawn where it has none; answers say which."""
    return secrets.randbelow(2**32) if given is None else given


def _settings(request: ChatRequest) -> dict[str, Any]:
    """How a text is drawn; rounded, as each setting is a program of its own."""
    settings: dict[str, Any] = {}
    if request.temperature is not None:
        warm = round(request.temperature, 2) >= 0.01
        settings |= {"do_sample": warm} | ({"temperature": round(request.temperature, 2)} if warm else {})
    if request.top_p is not None:
        settings["top_p"] = max(0.01, round(request.top_p, 2))
    return settings


def _page() -> tuple[str, str]:
    """(the page, the policy by which a browser runs its script and loads nothing from elsewhere)."""
    page = PAGE.read_text("utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
