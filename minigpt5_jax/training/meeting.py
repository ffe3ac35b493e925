"""The processes of a run find each other before JAX joins them, so that who is missing is said by name.

JAX waits for all of them as well, but silently, and then aborts with the stack of its C++ and no name.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from typing import Any

COORDINATOR, COUNT, NUMBER = "COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"
TELL_SECONDS = 15.0  # between two lines of a process that waits
_RETRY_SECONDS = 0.5
_LONGEST = 4096  # bytes of a line that a process sends
_CARD = {"number": int, "count": int, "host": str, "pid": int}


class DistributedError(RuntimeError):
    """The processes of a run cannot be joined, or one of them is gone; the message says which."""


def meet(address: str, count: int, number: int, *, timeout_s: int | float) -> None:
    """Return when all processes of the run are there; the port at ``address`` is free again then.

    Process 0 listens at the coordinator's port, the others call there.  While they wait they say so.

    Args:
      address: host:port of process 0.  count: processes.  number: of this one.
      timeout_s: seconds to wait.

    Raises:
      DistributedError: some do not come, two have one number, they do not agree on their count, or process 0
        does not answer or cannot listen; in all processes that can be reached.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise DistributedError(f"{COORDINATOR}={address!r} is not HOST:PORT, such as 10.0.0.1:1234")
    waiting = _Waiting(timeout_s, number, count)
    problem = _lead(int(port), waiting) if number == 0 else _call(host.strip("[]"), int(port), waiting)
    if problem:
        raise DistributedError(problem)


class _Waiting:
    """What a process says of itself, and for how long it has waited."""

    def __init__(self, timeout_s: float, number: int, count: int):
        self.timeout_s, self.number, self.count = timeout_s, number, count
        self.card = {"number": number, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
        self._start = time.monotonic()
        self._told = self._start

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self.seconds > self.timeout_s

    def tell(self, what: str) -> None:
        """One line now and then."""
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            line = f"process {self.number} of {self.count} waits for {what} ({self.seconds:.0f} s"
            print(f"{line} of {self.timeout_s:.0f})", file=sys.stderr, flush=True)


def _lead(port: int, waiting: _Waiting) -> str:
    """Process 0: what is wrong, as it was told to the others too; '' when all are there."""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        return (
            f"process 0 cannot listen at port {port}: {error.strerror}; if another process was started with "
            f"{NUMBER}=0 here, give each its own number, else another port in {COORDINATOR}"
        )
    here: dict[int, tuple[dict[str, Any], socket.socket | None]] = {0: (waiting.card, None)}
    problem = ""
    with server, contextlib.ExitStack() as callers:
        server.settimeout(_RETRY_SECONDS)
        while len(here) < waiting.count and not problem:
            missing = [str(number) for number in range(waiting.count) if number not in here]
            waiting.tell(f"process {', '.join(missing)}")
            if waiting.over:
                problem = (
                    f"process {', '.join(missing)} of {waiting.count} did not come within "
                    f"{waiting.timeout_s:.0f} s: see what it says on its host, and whether {COORDINATOR} can "
                    f"be reached from there; here are {', '.join(_name(card) for card, _ in here.values())}"
                )
            elif caller := _accepted(server, waiting.timeout_s):
                callers.callback(caller[1].close)
                problem = _welcome(*caller, here, waiting.count)
        for _, caller in here.values():
            if caller is not None:
                _send(caller, {"problem": problem})
    return problem


def _accepted(server: socket.socket, timeout_s: float) -> tuple[dict[str, Any], socket.socket] | None:
    """(what a caller says of itself, its connection); None for nobody, or something else."""
    try:
        caller, _ = server.accept()
    except OSError:
        return None
    try:
        caller.settimeout(min(5.0, timeout_s))
        with caller.makefile() as lines:
            card = json.loads(lines.readline(_LONGEST))
        if isinstance(card, dict) and all(type(card.get(name)) is kind for name, kind in _CARD.items()):
            return card, caller
    except (OSError, ValueError, RecursionError):
        pass
    caller.close()
    return None


def _welcome(
    card: dict[str, Any],
    caller: socket.socket,
    here: dict[int, tuple[dict[str, Any], socket.socket | None]],
    count: int,
) -> str:
    """Note a process that has come; what is wrong with it."""
    before, connection = here.get(card["number"], ({}, None))
    if before and (connection is None or not _hung_up(connection)):
        problem = (
            f"two processes have {NUMBER}={card['number']}: {_name(before)} and {_name(card)}; give each of "
            f"{COUNT}={count} processes a number of its own, from 0 on"
        )
        _send(caller, {"problem": problem})
        return problem
    here[card["number"]] = card, caller
    if card["count"] != count:
        return (
            f"the processes do not agree on their number: {COUNT}={count} for {_name(here[0][0])}, "
            f"{COUNT}={card['count']} for {_name(card)}"
        )
    return ""


def _call(host: str, port: int, waiting: _Waiting) -> str:
    """Another process: what process 0 says is wrong; '' when all are there."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                _send(connection, waiting.card)
                if (answer := _answer(connection, waiting)) is not None:
                    return answer
                reason = "it hung up"
        except OSError as error:
            reason = error.strerror or str(error)
        if waiting.over:
            return (
                f"process 0 does not answer at {host}:{port} ({reason}), {waiting.timeout_s:.0f} s long: see "
                f"that it was started there with {NUMBER}=0, and that {COORDINATOR} can be reached from "
                f"{waiting.card['host']}"
            )
        waiting.tell(f"process 0 at {host}:{port}: {reason}")
        time.sleep(_RETRY_SECONDS)


def _answer(connection: socket.socket, waiting: _Waiting) -> str | None:
    """What process 0 says in the end; None if it is gone, or not such a process."""
    text = b""
    connection.settimeout(_RETRY_SECONDS)
    while not text.endswith(b"\n"):
        waiting.tell("others to come to process 0")
        try:
            text += (got := connection.recv(_LONGEST))
        except TimeoutError:
            if waiting.seconds > waiting.timeout_s + 10:  # it has said so before, if it can
                return None
            continue
        if not got:
            return None
    try:
        return json.loads(text)["problem"]
    except (ValueError, TypeError, KeyError):
        return None


def _send(connection: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who is gone needs no answer
        connection.sendall(json.dumps(what).encode() + b"\n")


def _hung_up(connection: socket.socket) -> bool:
    """Whether the process at the other end is gone."""
    connection.setblocking(False)  # it needs no other from here on but to be told the end, in a line
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _name(card: dict[str, Any]) -> str:
    return f"process {card['number']} ({card['host']}, pid {card['pid']})"
