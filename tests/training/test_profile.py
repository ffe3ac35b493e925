"""Traces of steps: what is asked for, and files that TensorBoard and Perfetto read."""

from __future__ import annotations

import gzip
import json

import jax
import pytest

from minigpt5_jax.training.profile import ProfileError, check_steps, parse_steps, traced
from tests.training.test_interruption import make_loop, one_step


@jax.jit
def train_step(state, frozen, batch):
    return one_step(state), {"loss": state.trainable["a"].sum()}


def test_steps_are_traced(tmp_path, capfd):
    with traced(make_loop(tmp_path, train_step), 3, 4) as loop:
        loop.run()
    [folder] = (tmp_path / "profile/plugins/profile").iterdir()
    assert [*folder.glob("*.xplane.pb")], "for TensorBoard"
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"3", "4"}
    assert f"steps 3 to 4 are traced: tensorboard --logdir {tmp_path}/profile" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "3", "0:4", "5:4", "a:b", "1:2:3", "-1:2"])
def test_steps_that_are_none(text):
    assert parse_steps("5:8") == (5, 8)
    with pytest.raises(ProfileError, match=r"is not FIRST:LAST, counted from 1, such as 5:8"):
        parse_steps(text)


@pytest.mark.parametrize(("first", "last"), [(4, 5), (8, 10)])
def test_steps_that_the_run_does_not_do(tmp_path, first, last):
    loop, closed = make_loop(tmp_path, train_step, first_step=4), []
    loop.data.close = lambda: closed.append(True)
    with pytest.raises(ProfileError, match="but this run does the steps 5 to 9"), traced(loop, first, last):
        raise AssertionError
    assert closed, "weights, readers and the workdir are let go of"
    (tmp_path / "checkpoints/00000004").mkdir(parents=True)
    with pytest.raises(ProfileError, match="but this run does the steps 5 to 9"):
        check_steps(tmp_path, first, last, 9)
    check_steps(tmp_path, 5, 9, 9)


def test_a_run_that_ends_early_leaves_the_trace_until_there(tmp_path, capfd):
    def fails(state, frozen, batch):
        if state.step == 4:
            raise OSError("no more data")
        return train_step(state, frozen, batch)

    with pytest.raises(OSError, match="no more data"), traced(make_loop(tmp_path, fails), 4, 8) as loop:
        loop.run()
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]
    assert "steps 4 to 5 are traced" in capfd.readouterr().err
    jax.profiler.start_trace(tmp_path / "again")  # refused while another trace is taken
    jax.profiler.stop_trace()
