"""Processes that watch each other: one store, and threads in the place of processes."""

from __future__ import annotations

import threading
import time

import jax
import pytest

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.training.meeting import DistributedError
from minigpt5_jax.training.peers import Peers, _cut_off, require_alike, settings, watched


class Store:
    """What JAX's client of the coordination service does, in one process."""

    def __init__(self, count: int):
        self.kept: dict[str, str] = {}
        self.barrier = threading.Barrier(count)

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in list(self.kept.items()) if name.startswith(key + "/")]

    def blocking_key_value_get(self, key, timeout_in_ms):
        return self.kept[key]

    def wait_at_barrier(self, key, timeout_in_ms):
        try:
            self.barrier.wait(timeout_in_ms / 1000)
        except threading.BrokenBarrierError:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: missing tasks: 1\nmore") from None


class Process(Peers):
    """One of three, which notes how it would have ended."""

    def __init__(self, store, number, silence_s=0.8, stall_s=0.8):
        self.said, self.left, self.compiling = [], [], False
        super().__init__(
            store,
            number,
            3,
            silence_s=silence_s,
            stall_s=stall_s,
            report=lambda error: self.said.append(str(error)),
            leave=self.left.append,
            compiles=lambda: self.compiling,
            poll_s=0.02,
            grace_s=0.1,
        )

    def freeze(self):
        """As SIGSTOP and SIGKILL do: nothing is said any more."""
        self._stop.set()


@pytest.fixture
def three():
    store = Store(3)
    made = [Process(store, number) for number in range(3)]
    for process in made:
        process.__enter__()
    yield made
    for process in made:
        process.freeze()


def wait_for_end(*processes):
    until = time.monotonic() + 10
    while not all(process.left for process in processes):
        assert time.monotonic() < until, [process.said for process in processes]
        time.sleep(0.01)


def test_a_process_that_is_silent_is_named(three):
    time.sleep(0.1)
    three[1].freeze()
    wait_for_end(three[0], three[2])
    for other in (three[0], three[2]):
        assert other.left == [1]
        [said] = other.said
        assert "process 1 of 3 (host " in said and "is silent, nothing heard for 1 s" in said
        assert "goes on from the last checkpoint" in said
    assert not three[1].left


def test_a_process_that_fails_is_named_with_its_error(three):
    three[2].__exit__(OSError, OSError("shard 7 is gone\nmore"), None)
    wait_for_end(*three)
    assert three[2].said == ["shard 7 is gone\nmore"]
    assert all(
        "process 2 of 3 (host" in p.said[0] and "has stopped: shard 7 is gone;" in p.said[0]
        for p in three[:2]
    )


def test_a_process_that_is_behind_is_named(three):
    for step in (1, 2):
        for process in three:
            process.reached(step)
    three[0].reached(3)
    three[2].reached(3)
    wait_for_end(*three)
    assert all("process 1 of 3 (host" in p.said[0] and "no step since step 2" in p.said[0] for p in three)


def test_processes_that_go_on_or_have_ended_are_left_alone(three):
    for step in range(30):
        for process in three:
            process.reached(step)
            time.sleep(0.01)
    three[1].__exit__(None, None, None)
    three[2].__exit__(SystemExit, SystemExit(143), None)
    assert not any(thread.is_alive() for process in three[1:] for thread in process._threads)
    time.sleep(0.5)
    assert not any(process.left or process.said for process in three)


def test_while_a_process_compiles_none_is_behind(three):
    three[1].compiling = True
    time.sleep(0.1)
    three[0].reached(2)
    three[2].reached(1)  # it waits for process 1, as process 0 does
    time.sleep(1.5)
    assert not any(process.left or process.said for process in three)
    three[1].compiling = False
    wait_for_end(*three)
    assert all("process 1 of 3 (host" in p.said[0] and "no step since step 0" in p.said[0] for p in three)


def test_a_process_that_exits_with_an_error_has_failed(three):
    three[2].__exit__(SystemExit, SystemExit(1), None)
    wait_for_end(*three)
    assert three[2].said == ["ended with status 1"]
    assert all("has stopped: ended with status 1;" in p.said[0] for p in three[:2])


def test_a_store_that_is_frozen_is_process_0():
    store = Store(3)
    process = Process(store, 1)
    with process:
        time.sleep(0.1)
        frozen = threading.Event()
        store.key_value_dir_get = lambda key: [] if frozen.wait(20) else None
        wait_for_end(process)
        frozen.set()
    assert "process 0 of 3" in process.said[0] and "is silent" in process.said[0]


def test_a_collective_that_failed_leaves_it_to_the_watch_to_say_who_is_gone(three, capsys):
    time.sleep(0.1)
    three[1].freeze()
    three[0].__exit__(ValueError, ValueError("Gloo: connection closed"), None)
    assert "process 1 of 3 (host" in three[0].said[0]
    assert "Gloo: connection closed; looking which process is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: peer"), True),
        (ValueError("INTERNAL: Gloo all-reduce: Connection reset by peer"), True),
        (OSError(11, "Resource temporarily unavailable"), False),
        (DataError("tower.tar: ABORTED"), False),
        (ValueError("a shard is unavailable"), False),
    ],
)
def test_errors_of_data_are_not_taken_for_those_of_collectives(error, waits):
    assert _cut_off(error) is waits


def alike(others: list[dict]) -> list[str]:
    """What processes with these settings are told."""
    store, told = Store(len(others)), {}

    def one(number):
        try:
            require_alike(others[number], store, number, len(others), timeout_s=5)
        except DistributedError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told.get(number, "") for number in range(len(others))]


def test_settings_that_differ_are_named_in_all_processes():
    mine = settings({"data": {"global_batch": 4}, "run": {"compile_cache": "a"}})
    assert alike([mine, mine, mine]) == ["", "", ""]
    elsewhere = settings({"data": {"global_batch": 4}, "run": {"compile_cache": "b"}})
    assert alike([mine, elsewhere]) == ["", ""], "a folder of the machine"
    other = {**settings({"data": {"global_batch": 8}, "run": {"compile_cache": "a"}}), "code": "older"}
    told = alike([mine, mine, other])
    assert len(set(told)) == 1
    title, *lines = told[0].splitlines()
    assert title.startswith("processes 0 and 2 of 3 do not have the same settings; start the same command")
    assert lines == [
        f"  code: process 0 has {mine['code']!r}, process 2 has 'older'",
        "  config.data.global_batch: process 0 has 4, process 2 has 8",
    ]


def test_a_process_that_never_begins():
    store = Store(2)
    with pytest.raises(DistributedError, match="did not all begin: DEADLINE_EXCEEDED: missing tasks: 1"):
        require_alike(settings({}), store, 0, 2, timeout_s=0.05)


def test_a_process_alone_watches_nobody():
    with watched({}, print) as reached:
        reached(3)
