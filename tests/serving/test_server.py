"""The real server on a free port: asked by OpenAI's client, by plain HTTP, and by a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="no fastapi: pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx", reason="no httpx: pip install -e '.[test]'")

import tiny
from browser import UNLABELLED, open_browser

ROOT = Path(__file__).parents[2]
QUEUE = 6


class Server:
    """A server in a process of its own."""

    def __init__(self, run: Path, log: Path):
        self.log, limits = log, ["--port=0", f"--queue={QUEUE}", "--body_limit=2", "--batch_size=2"]
        command = [sys.executable, "-m", "minigpt5_jax.serve", f"--checkpoint={run}", *limits]
        environment = {name: value for name, value in os.environ.items() if name != "MINIGPT5_API_KEY"}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=file, stdout=file, env=environment)
        until = time.monotonic() + 240
        while not (found := re.search(r"ready: (http://\S+?)/ ", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=240, trust_env=False)

    def ask(self, content="draw a circle", **more) -> httpx.Response:
        given = {"model": "tiny", "messages": [{"role": "user", "content": content}], "seed": 3, **more}
        return self.http.post("/v1/chat/completions", json=given)

    def inside(self) -> int:
        return self.http.get("/health").json()["inside"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of an untrained model that sees: what it writes means nothing, and each answer has an image."""
    config = tiny.shapes_stage1()
    config.model.backbone.update(vit="source", qformer="source", lora_rank=8)
    config.tuning.stage = "stage2"
    config.data.update(format="shapes_dialogs", max_length=128)
    config.inference.update(num_inference_steps=1, max_new_tokens=12, force_image="after_text")
    folder = tmp_path_factory.mktemp("serving")
    served = Server(tiny.save_run(config, folder / "tiny"), folder / "log")
    yield served
    served.process.kill()
    served.process.wait()


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pixels(url: str) -> np.ndarray:
    start = "data:image/png;base64,"
    assert url.startswith(start)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url[len(start) :]))))


def shows(image: Image.Image, text: str) -> list:
    return [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]


# ------------------------------------------------------------------------------------- answers


def test_the_official_client(server):
    openai = pytest.importorskip("openai", reason="no openai: pip install -e '.[test]'")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": shows(Image.new("RGB", (30, 20), "red"), "what is it?")}]
    given = {"model": "tiny", "messages": messages, "seed": 5}
    answer = client.chat.completions.create(**given)
    message, kinds = answer.choices[0].message, [part["type"] for part in answer.choices[0].message.content]
    assert kinds.count("image_url") == 1
    assert [part for part in message.content if part["type"] == "image_url"] == message.images
    assert pixels(message.images[0]["image_url"]["url"]).shape == (64, 64, 3)
    assert answer.usage.prompt_tokens > 8 and answer.usage.completion_tokens > 0 and answer.seed == 5

    chunks = [*client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage == answer.usage
    parts: dict = {}
    for delta in (chunk.choices[0].delta for chunk in chunks if chunk.choices):
        for image in getattr(delta, "images", None) or []:
            parts[delta.part] = image
        if delta.content:
            parts[delta.part] = parts.get(delta.part, "") + delta.content
    whole = [part["text"] if part["type"] == "text" else part for part in message.content]
    assert [parts[number] for number in sorted(parts)] == whole, "told in pieces, it is the same"

    made = client.images.generate(model="tiny", prompt="a circle", n=2, size="32x48", extra_body={"seed": 1})
    first, second = (pixels("data:image/png;base64," + image.b64_json) for image in made.data)
    assert first.shape == (48, 32, 3) and (first != second).any()
    with pytest.raises(openai.BadRequestError, match="fetches no addresses"):
        url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [url]}])


def test_alone_and_in_company(server):
    """Prompts of other lengths beside it change nothing, and neither does their number."""
    alone = server.ask().json()["choices"]
    others = ["a", "a large red circle at the top left " * 3, "hello there"]
    with ThreadPoolExecutor(4) as pool:
        many = [pool.submit(server.ask, text, seed=number) for number, text in enumerate(others)]
        again = pool.submit(server.ask)
        assert all(answer.result().status_code == 200 for answer in many)
        assert again.result().json()["choices"] == alone
    assert server.ask(seed=4).json()["choices"] != alone
    metrics = server.http.get("/metrics").text
    assert re.search(r'minigpt5_requests_total{path="/v1/chat/completions",status="200"} \d+\.0', metrics)


def test_settings_of_an_answer(server):
    def images(**more) -> list[np.ndarray]:
        message = server.ask(**more).json()["choices"][0]["message"]
        return [pixels(image["image_url"]["url"]) for image in message["images"]]

    [image] = images()
    assert np.array_equal(images(image_seed=3)[0], image) and not np.array_equal(
        images(image_seed=4)[0], image
    )
    assert not np.array_equal(images(num_inference_steps=2)[0], image)
    assert images(size="16x16")[0].shape == (16, 16, 3)
    short = server.ask(max_tokens=1).json()
    assert short["usage"]["completion_tokens"] == 1 and short["choices"][0]["finish_reason"] == "length"
    scene = [{"role": "assistant", "content": shows(Image.new("RGB", (64, 64)), "a circle.")}]
    assert server.ask(messages=scene, mode="story").status_code == 200
    told = server.ask(messages=[{"role": "user", "content": "hello"}] * 4).json()["notes"]
    assert told == ["the last 3 of 4 messages were read, as in training"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("draw [IMG0]", r"contains \[IMG0\]"),
        (shows(Image.new("1", (12_000, 12_000)), "a bomb"), "has more than 89,478,485 pixels"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}], "no known image"),
    ],
)
def test_prompts_that_the_model_cannot_read(server, content, message):
    answer = server.ask(content)
    assert answer.status_code == 400 and re.search(message, answer.json()["error"]["message"])


def test_a_body_over_the_limit(server):
    answer = server.http.post(
        "/v1/chat/completions", content=b" " * 3_000_000, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_more_at_once_than_there_is_room_for(server):
    with ThreadPoolExecutor(4 * QUEUE) as pool:
        answers = [*pool.map(lambda seed: server.ask(seed=seed % 2), range(4 * QUEUE))]
    good = [answer.json()["choices"] for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(good) + len(refused) == len(answers) and len(good) >= QUEUE and refused
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len({json.dumps(choices) for choices in good}) == 2, "one answer for each seed"
    assert server.inside() == 0


def test_a_client_that_leaves_makes_room(server):
    """Its turn would be 100 steps long; two that read nothing of theirs leave at once."""
    slow = {"model": "tiny", "num_inference_steps": 100, "stream": True}
    slow["messages"] = [{"role": "user", "content": "a circle"}]
    for _ in range(2):
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=slow, trust_env=False) as told:
            assert told.status_code == 200 and next(told.iter_lines()).startswith("data: ")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions", json=slow | {"stream": False}, timeout=0.3, trust_env=False
        )
    until = time.monotonic() + 20
    while server.inside():
        assert time.monotonic() < until
        time.sleep(0.05)
    given_up = re.search(r"minigpt5_given_up_total (\d+)", server.http.get("/metrics").text)
    assert int(given_up[1]) >= 1 and server.ask().status_code == 200


# ------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(folder):
    with open_browser(folder) as driver:
        yield driver


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def click(browser, selector: str) -> None:
    find(browser, selector)[0].click()


def wait(browser, script: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not browser.execute_script(f"return {script}"):
        assert time.monotonic() < until, (script, find(browser, "#said")[0].text)
        time.sleep(0.05)


IDLE = "document.body.dataset.ready && !running && document.querySelectorAll('article.assistant').length"


def saved(folder: Path, name: str) -> str:
    path, until = folder / "saved" / name, time.monotonic() + 20
    while not path.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    return path.read_text()


def test_a_chat_in_a_browser(server, browser, folder):
    Image.new("RGB", (900, 600), "red").save(folder / "red.png")
    browser.get(server.url)
    wait(browser, "document.body.dataset.ready")
    assert len(find(browser, "#examples button")) == 4
    find(browser, "#file")[0].send_keys(str(folder / "red.png"))
    wait(browser, "document.querySelector('#pictures img')?.naturalWidth === 512")
    hostile = "<b>bold</b><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    find(browser, "#text")[0].send_keys(hostile, "\ue007")
    wait(browser, f"{IDLE} === 1")
    assert find(browser, "article.user p")[0].text == hostile and not find(browser, "article b")
    assert len(find(browser, "article.assistant img")) == 1 and len(find(browser, "article.user img")) == 1
    unnamed = browser.execute_script(UNLABELLED)
    assert not unnamed, unnamed
    assert browser.execute_script("return window.hacked") is None
    source = "return document.querySelector('article.assistant img').src"
    drawn = browser.execute_script(source)

    browser.refresh()
    wait(browser, f"{IDLE} === 1")
    assert browser.execute_script(source) == drawn and len(find(browser, "article.user img")) == 1
    click(browser, "article.assistant button")
    wait(browser, "document.querySelector('#said').textContent.startsWith('Drawn with seed')")
    assert browser.execute_script(source) != drawn

    click(browser, "summary")
    click(browser, "#story")
    assert find(browser, "#send")[0].text == "Continue the story"
    click(browser, "#send")
    wait(browser, f"{IDLE} === 2")
    assert len(find(browser, "article.user")) == 1

    click(browser, "#jsonl")
    record = json.loads(saved(folder, "chat.jsonl"))
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "assistant"]
    assert record["messages"][0]["content"][1] == {"type": "text", "text": hostile}
    click(browser, "#html")
    page = saved(folder, "chat.html")
    assert "&lt;script&gt;window.hacked" in page and "<script" not in page and page.count("<img") == 3
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_was_kept_by_someone_else(server, browser):
    """A storage that holds nonsense, or none at all."""
    browser.execute_script("localStorage.setItem('minigpt5.chat', '{\"turns\": [{\"role\": 1}, null]}')")
    browser.refresh()
    wait(browser, "document.body.dataset.ready")
    assert not find(browser, "article")
    none = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": none})
    browser.refresh()
    wait(browser, "document.body.dataset.ready")
    click(browser, "#examples button")
    wait(browser, f"{IDLE} === 1")
    assert "keeps no more of the chat" in find(browser, "#said")[0].text
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_screen(server, browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(server.url)
    wait(browser, "document.body.dataset.ready")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert all(button.size["height"] >= 44 for button in find(browser, "button") if button.is_displayed())


# ------------------------------------------------------------------------------------- the end


def test_the_end_waits_for_what_is_inside(server):
    """The last test of this file: SIGTERM in the middle of an answer."""
    answers = []
    asking = threading.Thread(target=lambda: answers.append(server.ask(num_inference_steps=100)))
    asking.start()
    until = time.monotonic() + 20
    while not server.inside():
        assert time.monotonic() < until
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0, server.log.read_text()
    asking.join()
    assert answers[0].status_code == 200 and answers[0].json()["choices"][0]["message"]["images"]
    assert "ended: every request that was inside is answered" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    with pytest.raises(httpx.TransportError):
        server.http.get("/health")
