"""What is refused before a model is asked, how long is waited, and what a failing model looks like."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import types

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="no fastapi: pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx", reason="no httpx: pip install -e '.[test]'")

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.text.templates import TokenizedSample
from minigpt5_jax.inference.session import Generation, Prompt, _Row
from minigpt5_jax.inference.streaming import Asked, Finished
from minigpt5_jax.serving.answers import ChatAnswer
from minigpt5_jax.serving.app import Service, make_app
from minigpt5_jax.serving.engine import Engine
from minigpt5_jax.serving.metrics import Metrics
from minigpt5_jax.serving.refusal import Refusal
from minigpt5_jax.serving.run import bind
from minigpt5_jax.serving.schema import ChatRequest, Limits, chat_messages, parse, side_of

IDS = np.int32([1, 2])
URL = "data:image/png;base64," + base64.b64encode(b"no image").decode()


def chat(**more) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | more


def shows(url: str, count: int = 1) -> list:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part] * count}]


class FakeEngine(Engine):
    """Answers nothing, or fails."""

    def __init__(self, fails: bool = False):
        self.metrics, self.inside, self.fails, self.jobs = Metrics(), 0, fails, []
        self.model = types.SimpleNamespace(stage=2, prompt=lambda *given, **more: (Prompt("hello"), []))

    def read(self, prompt, **how):
        return Asked(_Row(prompt, TokenizedSample(IDS, IDS, (), (), None, 0), []), 7.5)

    def submit(self, *jobs):
        self.jobs += jobs
        for job in jobs if self.fails else ():
            job.tell(RuntimeError("secret /path of the model"))

    def patience(self) -> int:
        return 7


def post(body, engine=None, path="/v1/chat/completions", headers=(), at_once=1, **service):
    """Responses to requests that are made at once."""
    service = {"limits": Limits(seconds=0.2)} | service
    app = make_app(Service(engine or FakeEngine(), "m", **service))

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            given = {"content-type": "application/json"} | dict(headers)
            one = {"content": content, "headers": given}
            return await asyncio.gather(*(client.post(path, **one) for _ in range(at_once)))

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b'{"model": ', 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b'{"model": NaN}', 400, "NaN is no JSON number"),
        ([1], 400, "the body: "),
        (chat(model="gpt-4o"), 404, "there is no model 'gpt-4o'; this server has 'm'"),
        (chat(messages=[]), 400, "messages: "),
        (chat(messages=[{"role": "robot", "content": "hi"}]), 400, "messages.0.role: "),
        (chat(tools=[]), 400, "tools: is not understood by this server"),
        (chat(n=2), 400, "n: "),
        (chat(seed=-1), 400, "seed: "),
        (chat(seed="1"), 400, "seed: "),
        (chat(num_inference_steps=1000), 400, "num_inference_steps: .*100"),
        (chat(guidance_scale=1e9), 400, "guidance_scale: "),
        (chat(size="9999x9999"), 400, "sides are 1 to 1024 pixels"),
        (chat(messages=[{"role": "user", "content": "x" * 30_000}]), 400, "messages.0.content"),
        (chat(messages=shows("http://example.org/a.png")), 400, "fetches no addresses"),
        (chat(messages=shows("file:///etc/passwd")), 400, "opens no files"),
        (chat(messages=shows("/etc/passwd")), 400, "opens no files"),
        (chat(messages=shows("data:text/html;base64,aGk=")), 400, "is given as a data URL"),
        (chat(messages=shows("data:image/png;base64,?!")), 400, "is no base64"),
        (chat(messages=shows(URL, 17)), 400, "more than 16 images"),
        (chat(messages=[shows(URL)[0] | {"role": "system"}]), 400, "system prompt is text"),
    ],
)  # fmt: skip
def test_what_is_refused_before_the_model(body, status, message):
    engine = FakeEngine()
    [answer] = post(body, engine)
    assert answer.status_code == status and not engine.jobs and engine.inside == 0
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


def test_other_types_and_large_bodies():
    [answer] = post(chat(), headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.text
    limits = Limits(body_bytes=1000)
    [answer] = post(b" " * 1001, limits=limits)
    assert answer.status_code == 413 and "more than 1,000 bytes" in answer.text
    [answer] = post(b" " * 1001, limits=limits, headers={"content-length": "10"})
    assert answer.status_code == 413, "what is there counts, not what was said"


def test_a_key():
    for given, status in (({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "x"}, 401)):
        [answer] = post(chat(), key="right", headers=given)
        assert answer.status_code == status and answer.json()["error"]["code"] == "invalid_api_key"
    [answer] = post(chat(model="x"), key="right", headers={"authorization": "Bearer right"})
    assert answer.status_code == 404
    [answer] = post(chat(model="x"), key="right", headers={"authorization": "Bearer right", "host": "any"})
    assert answer.status_code == 404, "a key makes every name good"


def test_a_name_that_is_not_ours():
    """A page elsewhere whose name leads to this machine (DNS rebinding)."""
    [answer] = post(chat(), headers={"host": "evil.example:8000"})
    assert answer.status_code == 403 and "evil.example" in answer.text
    for name in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert post(chat(model="x"), headers={"host": name})[0].status_code == 404


def test_waiting_ends():
    engine = FakeEngine()
    [answer] = post(chat(), engine)
    assert answer.status_code == 504 and "no answer within 0.2 seconds" in answer.text
    assert engine.jobs[0].left and engine.inside == 0
    [answer] = post(chat(stream=True), engine)
    told = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    assert told[-1]["error"]["code"] == "timeout" and engine.inside == 0


def test_too_many_at_once():
    engine = FakeEngine()
    answers = post(chat(), engine, at_once=5, limits=Limits(waiting=3, seconds=0.2))
    assert sorted(answer.status_code for answer in answers) == [429, 429, 504, 504, 504]
    [busy, _] = [answer for answer in answers if answer.status_code == 429]
    assert busy.headers["retry-after"] == "7" and busy.json()["error"]["code"] == "rate_limit_exceeded"
    assert engine.inside == 0, "there is room again"


def test_a_failure_says_nothing_of_the_machine():
    [answer] = post(chat(), FakeEngine(fails=True))
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    broken = FakeEngine()
    broken.submit = None  # any other error of ours
    [other] = post(chat(), broken)
    assert other.status_code == 500
    for text in (answer.text, other.text):
        assert "Traceback" not in text and "secret" not in text and "NoneType" not in text
    assert broken.inside == 0


def test_pages_that_are_not_there():
    [answer] = post(chat(), path="/v1/embeddings")
    assert answer.status_code == 404 and answer.json()["error"]["message"] == "Not Found"


def test_messages_become_texts_and_bytes():
    system = {"role": "developer", "content": [{"type": "text", "text": "S"}]}
    request = parse(ChatRequest, json.dumps(chat(messages=[system, *shows(URL)])).encode())
    assert chat_messages(request, Limits()) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image", "image": b"no image"}]},
    ]
    assert side_of("12x34") == (12, 34) and side_of("auto") is None
    with pytest.raises(Refusal):
        side_of("0x5")


def test_a_text_alone_is_a_string():
    asked = FakeEngine().read(Prompt("hello"))
    image, told = np.zeros((2, 2, 3), np.uint8), []
    for parts in ((), ("a", "b"), ("a", image)):
        text = " ".join(part for part in parts if isinstance(part, str))
        done = Finished(0, Generation(parts, text, (5, 6), "", 0), "length")
        choice = ChatAnswer("m", asked, 0, None, []).whole(done)["choices"][0]
        told.append(choice["message"]["content"])
        assert choice["finish_reason"] == "length"
    assert told[:2] == ["", "a b"] and [part["type"] for part in told[2]] == ["text", "image_url"]


def test_where_a_server_listens():
    with pytest.raises(ConfigError, match="can be reached by other machines: .*MINIGPT5_API_KEY"):
        bind("0.0.0.0", 0, None)
    bind("0.0.0.0", 0, "key").close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="Address already in use; choose another --port"):
            bind("127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(ConfigError, match="cannot listen at 192.0.2.1 port 0: "):
        bind("192.0.2.1", 0, "key")  # an address that no machine has
