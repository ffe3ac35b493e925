"""Joining processes: what the environment asks for, and clear messages where it is incomplete."""

from __future__ import annotations

import signal

import jax
import pytest

from minigpt5_jax.training import distributed
from minigpt5_jax.training.distributed import DistributedError, initialize, main_process


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: made.append(kwargs))
    monkeypatch.setattr(distributed, "meet", lambda *args, **kwargs: made.append((args, kwargs)))
    before = signal.getsignal(signal.SIGABRT)
    yield made
    signal.signal(signal.SIGABRT, before)


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}, {"TPU_WORKER_HOSTNAMES": "t0"}],
)
def test_a_single_process_joins_nothing(calls, environ):
    assert not initialize(environ)
    assert not calls and main_process()


@pytest.mark.parametrize(
    "environ",
    [{"SLURM_STEP_NUM_TASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "t0,t1"}],
)
def test_schedulers_are_left_to_jax(calls, environ):
    assert initialize(environ, timeout_s=9)
    assert calls == [{"initialization_timeout": 9}]


def test_three_variables(calls):
    assert initialize({"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"})
    expected = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
    met, joined = calls
    assert met == (("host:1234", 4, 3), {"timeout_s": 300}), "who is missing is said before JAX waits"
    assert joined == {**expected, "initialization_timeout": 60}


def test_auto_leaves_everything_to_jax(calls):
    assert initialize({"COORDINATOR_ADDRESS": "auto"})
    assert calls == [{"initialization_timeout": 300}]


def test_auto_on_a_machine_without_neighbours():
    with pytest.raises(DistributedError, match=r"COORDINATOR_ADDRESS=auto is for .* or none of them for one"):
        initialize({"COORDINATOR_ADDRESS": "auto"})
    assert not initialize({}), "the remedy"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"COORDINATOR_ADDRESS": "host:1"}, "NUM_PROCESSES, PROCESS_ID not set"),
        ({"COORDINATOR_ADDRESS": "auto", "NUM_PROCESSES": "2"}, "PROCESS_ID not set"),
        ({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "PROCESS_ID='2' must be"),
        ({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "NUM_PROCESSES='two'"),
    ],
)
def test_incomplete_environment(calls, environ, message):
    with pytest.raises(DistributedError, match=message):
        initialize(environ)
    assert not calls


def test_a_coordinator_that_jax_cannot_join(calls, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(DistributedError, match=r"deadline exceeded.*reachable"):
        distributed.initialize({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"})
