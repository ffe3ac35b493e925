"""Which answers are made together, who is left out, and what a failing batch costs."""

from __future__ import annotations

import functools
import queue
import threading
import time
import types

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="no fastapi: pip install -e '.[serve]'")

from minigpt5_jax.data.text.prompts import VICUNA_V0
from minigpt5_jax.data.text.templates import TokenizedSample
from minigpt5_jax.inference.session import Generation, Prompt, _Row
from minigpt5_jax.inference.streaming import Asked, Finished, StreamingSession, _Progress
from minigpt5_jax.serving.engine import KEPT, Engine, Job, Kept
from minigpt5_jax.serving.metrics import Metrics
from minigpt5_jax.wiring.pipeline import MiniGPT5

IDS = np.int32([1, 2])
USUAL = {"temperature": 1.0, "num_inference_steps": 20}


def ask(text: str = "hello", images: int = 0) -> Asked:
    sample = TokenizedSample(IDS, IDS, (), (), None, 0)
    return Asked(_Row(Prompt(text), sample, [np.zeros((2, 2, 3), np.uint8)] * images), 7.5)


class Session(StreamingSession):
    """Repeats the prompt; the first batch waits until it is told to go on."""

    def __init__(self):
        self.batches, self.go_on = [], threading.Event()

    def stream(self, asked, drawer, wanted=lambda row: True):
        texts = [one.row.prompt.source for one in asked]
        self.batches.append(texts)
        assert self.go_on.wait(10)
        if "fail" in texts:
            raise ValueError("this one")
        for row, text in enumerate(texts):
            if wanted(row):
                yield Finished(row, Generation((text,), text, (), text, 0), "stop")


class OneSession(Engine):
    def _session(self, settings):
        self.session = getattr(self, "session", None) or Session()
        return self.session

    def _drawer(self, steps):
        return lambda *given: None


class Settings(dict):
    __getattr__ = dict.__getitem__


class Model(MiniGPT5):
    """A configuration alone."""

    config = types.SimpleNamespace(inference=Settings(USUAL))

    def __init__(self):
        pass


@pytest.fixture
def engine():
    made = OneSession(Model(), 2, Metrics())
    made._thread.start()
    yield made
    made.session.go_on.set()
    made.close()
    assert not made._thread.is_alive()


@pytest.fixture
def submit(engine):
    """Puts jobs into the queue, the first of which is being answered when the others come."""
    answers: queue.Queue = queue.Queue()

    def submit(text: str, images: int = 0, steps: int | None = None, **settings) -> Job:
        job = Job(ask(text, images), settings, steps, lambda event: answers.put((text, event)))
        engine.submit(job)
        return job

    submit("first")
    while not engine.session.batches:
        time.sleep(0.001)
    submit.answers = answers
    return submit


def told(submit, count: int) -> dict:
    return dict(submit.answers.get(timeout=10) for _ in range(count))


def test_answers_of_one_kind_are_made_together(engine, submit):
    for text, more in (
        ("a", {}),
        ("warm", {"temperature": 0.5}),
        ("steps", {"steps": 3}),
        ("sees", {"images": 1}),
        ("b", {"steps": 20, "temperature": 1.0}),  # as the run has them
        ("sees too", {"images": 1}),
        ("c", {}),
    ):
        submit(text, **more)
    assert engine.patience() == 4
    engine.session.go_on.set()
    told(submit, 8)
    assert engine.session.batches == [["first"], ["a", "b"], ["warm"], ["steps"], ["sees", "sees too"], ["c"]]


def test_who_left_is_not_answered(engine, submit):
    submit("gone").left = True
    submit("here")
    engine.session.go_on.set()
    assert set(told(submit, 2)) == {"first", "here"} and engine.session.batches[1:] == [["here"]]


def test_a_batch_that_fails_is_the_only_one(engine, submit):
    for text in ("fail", "beside", "after"):
        submit(text)
    engine.session.go_on.set()
    found = told(submit, 4)
    assert {text for text, event in found.items() if isinstance(event, ValueError)} == {"fail", "beside"}
    assert found["after"].answer.text == "after"


def test_few_programs_are_kept():
    kept, made = Kept(), []
    for key in [0, *range(KEPT), 0, KEPT, 0, 1]:
        kept.get_or_make(key, functools.partial(made.append, key))
    assert made == [*range(KEPT), KEPT, 1], "0 was used again, 1 was the oldest"


def test_what_further_ids_may_change_is_not_told():
    session = types.SimpleNamespace(style=VICUNA_V0)
    for text, settled in (("a b", "a b"), ("a #", "a"), ("a ##", "a"), ("a \ufffd", "a"), ("#", "")):
        assert StreamingSession._settled(session, text) == settled


def test_a_bound_on_tokens():
    one = _Progress(Asked(ask().row, 7.5, max_tokens=3))
    for ids, reason, kept, ended in (
        ([5, 6], "", [5, 6], ""),
        ([5, 6, 7], "eos", [5, 6, 7], "eos"),
        ([5, 6, 7], "", [5, 6, 7], "length"),
        ([5, 6, 7, 8], "stop", [5, 6, 7], "length"),
    ):
        one.take(ids, reason)
        assert (one.ids, one.finish_reason) == (kept, ended)


def test_how_many_images_share_a_program():
    assert [ask(images=count).image_room for count in range(6)] == [0, 1, 2, 4, 4, 8]
