"""The judges on a real session, and their command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from minigpt5_jax.config import ConfigError
from minigpt5_jax.evaluation.shapes import counts as judge_counts
from minigpt5_jax.evaluation.shapes import judge
from minigpt5_jax.evaluation.shapes.dialogs import judge_dialogs
from minigpt5_jax.evaluation.shapes.stories import judge_stories
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.wiring.session import override

ROOT = Path(__file__).parents[2]


def copy(run):
    """The run with a configuration of its own."""
    return dataclasses.replace(run, config=run.config.copy_and_resolve_references())


def test_a_session_has_room_for_stories_and_no_forced_image(seeing_run):
    run = copy(seeing_run)
    run.config.data.max_length, run.config.inference.force_image = 30, "after_text"
    session = judge_counts.open_session(run, batch_size=2)
    assert session.max_length == 512 - 64 - 7 and session.batch_size == 2
    assert session.sampling.max_new_tokens == 64 and session.sampling.force_image == "off"
    drawer = judge_counts.open_session(run, batch_size=2, force_image="first", max_new_tokens=1)
    assert drawer.sampling.max_new_tokens == 1 and drawer.sampling.force_image == "first"
    assert run.config.data.max_length == 30, "the run's own settings stay"
    with pytest.raises(ConfigError, match="may take 607 positions .* has 512"):
        judge_counts.open_session(run, batch_size=2, max_new_tokens=600)


@pytest.mark.slow
def test_an_untrained_run_is_judged_from_end_to_end(seeing_run, monkeypatch):
    monkeypatch.setattr(judge_counts, "NEW_TOKENS", 4)  # it never ends a text
    settings = {"contexts": ["image+text"], "narrations": ["multimodal"]}
    told = judge_stories(seeing_run, count=2, seed=5, batch_size=2, **settings)
    row = told["contexts"]["image+text"]
    assert row["cut"] == 0 and row["emitted"]["count"] == told["multimodal"]["rouge_l"]["count"] == 2
    assert row["all_attributes"]["background"]["count"] == 2
    talk = judge_dialogs(seeing_run, count=1, batch_size=4)
    assert talk["turns"] == talk["placing"]["accuracy"]["count"] >= 2 and talk["cut"] == 0
    json.dumps([told, talk], allow_nan=False)


@pytest.mark.parametrize("what", judge.WHAT)
def test_each_judge_is_called_with_what_was_asked(what, seeing_run, monkeypatch):
    calls, fake = [], copy(seeing_run)

    def opened(path, **settings):
        calls.append((path, settings))
        override(fake.config, settings["inference"])
        return Mock(load=lambda: fake)

    monkeypatch.setattr(judge, "open_run", opened)
    monkeypatch.setattr(judge, f"judge_{what}", lambda run, **settings: calls.append(settings) or {"n": 1})
    asked = {"count": 7, "seed": 2, "step": 4, "inference": {"guidance_scale": "3"}, "native": False}
    found = judge.measure("runs/a", what, **asked)
    assert calls[0] == ("runs/a", {"step": 4, "weights": None, "inference": {"guidance_scale": "3"}})
    stories = {"contexts": judge.CONTEXTS, "narrations": judge.NARRATIONS}
    more = {"stories": stories, "pairs": {"native": False}}
    assert calls[1] == {"count": 7, "seed": 2, "batch_size": 32, **more.get(what, {})}
    assert (found["what"], found["step"], found["count"], found["result"]) == (what, 3, 7, {"n": 1})
    assert found["inference"]["guidance_scale"] == 3.0 and json.dumps(found)


def test_what_cannot_be_measured_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(ConfigError, match="unknown 'songs'; known: stories, dialogs, pairs"):
        judge.measure(tmp_path, "songs", count=1)
    with pytest.raises(ConfigError, match="unknown key inference.tempo"):
        judge.measure(tmp_path, "stories", count=1, inference={"tempo": "1"})
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        judge.measure(tmp_path / "none", "stories", count=1)


@pytest.mark.slow
def test_the_command_ends_with_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "minigpt5_jax.evaluation.shapes",
        "--run",
        str(tmp_path),
        "--what",
        "dialogs",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: no complete checkpoint in")
