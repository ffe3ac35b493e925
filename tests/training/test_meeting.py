"""Processes find each other, or say who is missing, double or of another mind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket

import pytest

from minigpt5_jax.training import meeting
from minigpt5_jax.training.meeting import DistributedError, meet


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet_all(port: int, numbers: list[int], counts: list[int], timeout_s: float = 20.0) -> list[str]:
    """What each of some processes is told, '' for all is well."""

    def one(number: int, count: int) -> str:
        try:
            meet(f"127.0.0.1:{port}", count, number, timeout_s=timeout_s)
        except DistributedError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers, counts))


def test_all_come_and_the_port_is_free_again(port):
    assert meet_all(port, [2, 0, 1], [3, 3, 3]) == ["", "", ""]
    with socket.create_server(("", port)):
        pass


def test_who_is_missing_is_named_to_all(port):
    told = meet_all(port, [0, 2], [4, 4], timeout_s=0.8)
    assert told[0] == told[1]
    assert "process 1, 3 of 4 did not come within 1 s" in told[0]
    assert f"here are process 0 ({socket.gethostname()}, pid" in told[0]


def test_two_of_one_number(port):
    told = meet_all(port, [0, 1, 1], [3, 3, 3])
    assert len(set(told)) == 1 and "two processes have PROCESS_ID=1: process 1 (" in told[0]


def test_two_with_number_0_on_one_host(port):
    with socket.create_server(("", port)):
        [told] = meet_all(port, [0], [2])
    assert f"process 0 cannot listen at port {port}: Address already in use" in told
    assert "PROCESS_ID=0 here" in told


def test_other_counts(port):
    told = meet_all(port, [0, 1], [3, 2])
    assert len(set(told)) == 1 and "do not agree on their number: NUM_PROCESSES=3" in told[0]


def test_a_coordinator_that_never_answers(port, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "TELL_SECONDS", 0.0)
    [told] = meet_all(port, [1], [2], timeout_s=0.3)
    assert f"process 0 does not answer at 127.0.0.1:{port} (Connection refused)" in told
    said = capsys.readouterr().err
    assert f"process 1 of 2 waits for process 0 at 127.0.0.1:{port}: Connection refused (0 s of 0)" in said


def test_something_else_at_the_coordinators_port(port):
    with (
        socket.create_server(("127.0.0.1", port)) as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        told = pool.submit(meet_all, port, [1], [2], 0.3)
        server.accept()[0].close()
        server.close()
        assert "process 0 does not answer" in told.result()[0]


def test_a_process_that_was_started_again_while_the_others_wait(port):
    """Its first connection is gone; strangers at the port are left alone."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        told = pool.submit(meet_all, port, [0], [2])
        card = {"number": 1, "count": 3, "host": "a", "pid": 1}
        strange = json.dumps(card | {"number": [1]}).encode() + b"\n"
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 4000 + b"\n", strange, None):
            while True:
                try:
                    caller = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    continue
            with caller:
                caller.sendall(sent or json.dumps(card | {"count": 2}).encode() + b"\n")
                if sent is None:
                    assert json.loads(caller.makefile().readline()) == {"problem": ""}
                else:
                    with contextlib.suppress(ConnectionResetError):
                        assert caller.recv(1) == b"", "its connection is closed"
        assert told.result() == [""]


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:port", "host:70000"])
def test_an_address_that_is_none(address):
    with pytest.raises(DistributedError, match="is not HOST:PORT, such as"):
        meet(address, 2, 1, timeout_s=1)
