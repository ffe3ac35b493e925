"""A run that is told to stop ends behind a whole step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.interruption import Interruption
from minigpt5_jax.training.loop import Loop
from minigpt5_jax.training.metrics import Metrics, TrainingDiverged
from minigpt5_jax.training.prefetch import DevicePrefetch
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.training.state import TrainState
from tests.training.test_checkpoint import mesh


class Data(DevicePrefetch):
    """Batches of nothing."""

    state = 0

    def __init__(self):
        self.loader = SimpleNamespace(skipped=(), truncated=0)

    def __next__(self):
        self.state += 1
        return {}

    def close(self):
        pass


def make_loop(folder, train_step, first_step=0):
    state = TrainState(
        jnp.asarray(first_step), {"a": jnp.zeros(2)}, {"m": jnp.zeros(1)}, jnp.zeros(2, jnp.uint32)
    )
    checkpoints, metrics = Checkpoints(folder / "checkpoints"), Metrics(folder, 9, first_step=first_step)
    return Loop(state, {}, train_step, mesh(2, 4), Data(), metrics, checkpoints, {}, first_step, 9, 0, 100, 0)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_its_step(tmp_path, capfd, sent, status):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def train_step(state, frozen, batch):
        if state.step == 3:
            os.kill(os.getpid(), sent)
        return state.__class__(state.step + 1, state.trainable, state.opt_state, state.rng), {"loss": 1.0}

    with pytest.raises(SystemExit) as stopped:
        make_loop(tmp_path, train_step).run()
    assert stopped.value.code == status
    said = capfd.readouterr().err
    assert f"stopped by {sent.name}: step 4 of 9 is saved; the same command goes on from it" in said
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps == [4]
    restored, data_state, _ = checkpoints.restore({"step": jnp.asarray(0)})
    assert restored["step"] == 4 and data_state == 4
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def one_step(state):
    return state.__class__(state.step + 1, state.trainable, state.opt_state, state.rng)


def test_a_state_behind_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    def train_step(state, frozen, batch):
        return one_step(state), {"loss": float("nan") if state.step == 3 else 1.0}

    loop = make_loop(tmp_path, train_step)
    loop.save_every = 2
    with pytest.raises(TrainingDiverged, match="step 4: loss not finite"):
        loop.run()
    assert Checkpoints(tmp_path / "checkpoints").steps == [2]


def test_a_save_that_fails_ends_the_run_with_the_next_step(tmp_path, monkeypatch):
    steps = []

    def train_step(state, frozen, batch):
        steps.append(int(state.step) + 1)
        return one_step(state), {"loss": 1.0}

    loop = make_loop(tmp_path, train_step)
    loop.save_every = 4

    def check():
        if steps[-1] == 5:
            raise CheckpointError("cannot save step 4")

    monkeypatch.setattr(loop.checkpoints, "check", check)
    with pytest.raises(CheckpointError, match="cannot save step 4"):
        loop.run()
    assert steps == [1, 2, 3, 4, 5]


@pytest.fixture
def ctrl_c():
    """What Python does at Ctrl-C; the processes of pytest-xdist do nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_at_once(ctrl_c):
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        assert interruption.after(1) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.after(1) is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def waiting(tmp_path):
    """A run that waits for its fourth batch, in a session of its own."""
    command = [sys.executable, str(Path(__file__).with_name("waiting_worker.py")), str(tmp_path)]
    run = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True)
    try:
        assert run.stdout.readline() == "waiting\n", run.communicate()[1][-3000:]
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_run_that_waits_for_data_saves_what_was_done(tmp_path, waiting, sent, status):
    """The signal reaches the worker processes too, as Ctrl-C in a terminal and SIGTERM to a job do."""
    run = waiting
    time.sleep(0.5)  # until the third batch is used, and the fourth waited for
    os.killpg(run.pid, sent)
    _, said = run.communicate(timeout=300)
    assert run.returncode == status, said[-3000:]
    assert "Traceback" not in said and f"{sent.name}: stopping; the last whole step is saved first" in said
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps == [3]
    assert checkpoints.restore({"step": jnp.asarray(0)})[1] == 3, "the fourth batch is read again"


def test_workers_end_with_a_killed_trainer(waiting):
    """Its output, which they hold too, ends with the last of them; those that sleep in a reader as well."""
    waiting.kill()
    waiting.communicate(timeout=10)
