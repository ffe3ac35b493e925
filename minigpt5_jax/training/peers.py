"""The other processes of a run: whether they have the same settings, are alive, and go on.

All of it goes through the key-value store of JAX's coordination service.  JAX itself ends a run when a
process has died, after 100 seconds, by an abort with the stack of its C++; and it never ends one whose
processes live but wait for each other (docs/training.md).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the store has no public name; Orbax takes it from here

from minigpt5_jax.training.compiling import compiling
from minigpt5_jax.training.meeting import DistributedError
from minigpt5_jax.training.provenance import Meta, differences, plain

CUT_OFF = re.compile(r"(?i:gloo|nccl|connection (closed|reset))|\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")
"""What errors of collectives say, which JAX raises as its own type or as a plain ValueError."""
FAILED, ENDED, COMPILING = "failed", "ended", "compiling"
STOPPED = (None, 0, 128 + signal.SIGTERM)
"""Statuses of a process that ends together with all others; Ctrl-C stops one of them only."""
OWN = ("config.run.compile_cache", "config.data.index_cache")
"""Settings of a machine, which may differ."""


def settings(config: Mapping[str, Any]) -> Meta:
    """What all processes of a run must have alike: configuration, code, and the libraries that compile."""
    return plain({"config": config, "code": _code(), "jax": jax.__version__, "jaxlib": jax.lib.__version__})


@functools.cache
def _code() -> str:
    """Hash of the sources of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def require_alike(mine: Meta, client: Any, number: int, count: int, *, timeout_s: int | float) -> None:
    """Return when every process has said that its settings are those of process 0.

    Raises:
      DistributedError: a process has others; each such setting with both values, in all processes.
    """
    kept = json.dumps(mine, sort_keys=True)
    client.key_value_set(f"minigpt5/settings/{number}", kept)
    client.key_value_set(f"minigpt5/digests/{number}", _comparable(mine))
    try:
        client.wait_at_barrier("minigpt5/settings", int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:  # it names those that did not come
        raise DistributedError(f"the processes of this run did not all begin: {error}") from None
    digests = {
        int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get("minigpt5/digests")
    }
    for other in sorted(digests):
        if digests[other] != digests[0]:
            theirs, first = (
                json.loads(client.blocking_key_value_get(f"minigpt5/settings/{at}", int(timeout_s * 1000)))
                for at in (other, 0)
            )
            lines = [
                f"  {key}: process 0 has {pair[0]!r}, process {other} has {pair[1]!r}"
                for key, pair in differences(first, theirs).items()
                if key not in OWN
            ]
            raise DistributedError(
                "\n".join(
                    [
                        f"processes 0 and {other} of {count} do not have the same settings; start the same "
                        "command, from the same code, in each:",
                        *lines,
                    ]
                )
            )


def _comparable(mine: Meta) -> str:
    rest = {key: pair[0] for key, pair in differences(mine, {}).items() if key not in OWN}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def watched(
    config: Mapping[str, Any], report: Callable[[BaseException], None]
) -> Iterator[Callable[[int], None]]:
    """Around a run, after joining: gives ``reached``, to be called with every step that is sent off.

    Where there are several processes they must have the same ``config``, and watch each other
    (:class:`Peers`).  ``report`` prints an error that ends this process.

    Raises:
      DistributedError: their settings differ.
    """
    if jax.process_count() == 1:
        yield lambda step: None
        return
    run, client = config["run"], jax_distributed.global_state.client
    number, count = jax.process_index(), jax.process_count()
    require_alike(settings(config), client, number, count, timeout_s=run["join_timeout"])
    limits = {"silence_s": run["silence_timeout"], "stall_s": run["stall_timeout"]}
    with Peers(client, number, count, **limits, report=report) as peers:
        yield peers.reached


class Peers:
    """While it is entered, a thread watches the other processes and ends this one when it waits in vain.

    A process that dies or freezes is named after ``silence_s``; one that fails with an error, as soon as it
    says so; one that is behind the others, in reading data for example, after ``stall_s``.  While one of them
    compiles none is behind: JAX keeps programs on the disk of process 0, so that only the others may compile.

    Args:
      client: of JAX's coordination service.  number, count: of this process, and how many there are.
      silence_s, stall_s: seconds; 0 for never.
      report: prints an error that ends this process.
      leave: ends this process at once, with a status.
      compiles: whether this process is compiling.
      poll_s: between two looks at the others.  grace_s: that a process has to end by itself after another one
        has failed.
    """

    def __init__(
        self,
        client: Any,
        number: int,
        count: int,
        *,
        silence_s: int | float,
        stall_s: int | float,
        report: Callable[[BaseException], None],
        leave: Callable[[int], Any] = os._exit,
        compiles: Callable[[], bool] = compiling,
        poll_s: float = 2.0,
        grace_s: float = 10.0,
    ):
        self._client, self._number, self._count = client, number, count
        self._silence_s, self._stall_s = silence_s, stall_s
        self._report, self._leave, self._poll_s, self._grace_s = report, leave, poll_s, grace_s
        self._compiles = compiles
        self._step, self._state, self._tick = 0, "", 0
        self._names: dict[int, str] = {}
        self._seen: dict[int, tuple[str, float]] = {}
        self._apart_since: tuple[float, int] | None = None
        self._failed_since: float | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._said: dict[int, str] = {}
        self._heard = time.monotonic()
        self._threads = [threading.Thread(target=do, daemon=True) for do in (self._ask, self._watch)]

    def __enter__(self) -> Peers:
        me = f"process {self._number} of {self._count} (host {socket.gethostname()}, pid {os.getpid()})"
        self._client.key_value_set(f"minigpt5/names/{self._number}", me)
        for thread in self._threads:
            thread.start()
        return self

    def reached(self, step: int) -> None:
        """Note that this process has sent off ``step``."""
        self._step = step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in STOPPED):
            self._end(ENDED)
            for thread in self._threads:
                thread.join(self._poll_s)  # no longer: the store may be frozen
            return
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, str) else f"ended with status {error.code}"
            error = DistributedError(status)
        if _cut_off(error):
            # The process at the other end of a collective is gone, and will be named.
            print(f"{_first_line(error)}; looking which process is gone", file=sys.stderr, flush=True)
            self._threads[1].join(self._silence_s + self._grace_s + 3 * self._poll_s)
        self._end(f"{FAILED} {_first_line(error)}")
        self._report(error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._go()

    def _end(self, state: str) -> None:
        self._state = state
        self._stop.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._publish()

    def _publish(self) -> None:
        with self._lock:
            self._tick += 1
            state = self._state or (COMPILING if self._compiles() else "")
            value = f"{self._tick} {self._step} {state}"
            self._client.key_value_set(f"minigpt5/alive/{self._number}", value, allow_overwrite=True)

    def _exchange(self) -> dict[int, str]:
        """Say that this process lives, and read the same of the others: number -> what it says."""
        self._publish()
        said = self._client.key_value_dir_get("minigpt5/alive")
        if len(self._names) < self._count:
            names = self._client.key_value_dir_get("minigpt5/names")
            self._names = {int(key.rpartition("/")[2]): value for key, value in names}
        return {int(key.rpartition("/")[2]): value for key, value in said}

    def _ask(self) -> None:
        """Talk to the store, which may be frozen and never answer: hence a thread of its own."""
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX ends a process whose store is gone
                self._said, self._heard = self._exchange(), time.monotonic()
            if self._stop.wait(self._poll_s):
                return

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            now = time.monotonic()
            problem = self._problem(self._said, now)
            if self._silence_s and now - self._heard > self._silence_s:
                problem = f"{self._name(0)} is silent, {self._gone()}"
            if problem:
                self._quit(problem)
                return

    def _problem(self, said: Mapping[int, str], now: float) -> str:
        """Why this process must not wait any longer; '' while all is well."""
        steps, compile_now = {}, False
        for number in range(self._count):
            value = said.get(number, "0 0 ")
            _, step, state = value.split(" ", 2)
            compile_now = compile_now or state == COMPILING
            if number == self._number:
                steps[number] = int(step)
                continue
            if state == ENDED:
                continue
            steps[number] = int(step)
            if state.startswith(FAILED):
                self._failed_since = self._failed_since or now
                if now - self._failed_since >= self._grace_s:
                    return f"{self._name(number)} has stopped: {state.removeprefix(FAILED).strip()}"
                continue
            before, since = self._seen.get(number, (None, now))
            since = since if value == before else now
            self._seen[number] = value, since
            if self._silence_s and now - since > self._silence_s:
                return f"{self._name(number)} is silent, {self._gone()}"
        if compile_now:  # the others wait for it, some of them a step further than others
            self._apart_since = None
            return ""
        return self._stalled(steps, now)

    def _stalled(self, steps: Mapping[int, int], now: float) -> str:
        """Which processes keep the others waiting."""
        last = min(steps.values())
        if last == max(steps.values()):
            self._apart_since = None
            return ""
        since, at = self._apart_since or (now, last)
        self._apart_since = (since, at) if at == last else (now, last)
        if not self._stall_s or now - self._apart_since[0] <= self._stall_s:
            return ""
        late = " and ".join(self._name(number) for number, step in sorted(steps.items()) if step == last)
        return (
            f"{late}: no step since step {last}, {self._stall_s:.0f} s long, while others go on "
            "(run.stall_timeout): see what it waits for, its data for example"
        )

    def _gone(self) -> str:
        return (
            f"nothing heard for {self._silence_s:.0f} s (run.silence_timeout): it has died, or its host or "
            "network does not answer"
        )

    def _name(self, number: int) -> str:
        return self._names.get(number, f"process {number} of {self._count}")

    def _go(self) -> None:
        """Leave, process 0 as the last: with it the store ends, and JAX aborts whoever is still there."""
        until = time.monotonic() + 2 * self._grace_s
        while self._number == 0 and time.monotonic() < until and self._others():
            time.sleep(self._poll_s)
        # Python's own end would wait for JAX's barrier of all processes, which do not come.
        self._leave(1)

    def _others(self) -> list[int]:
        """The other processes that have not ended and are heard."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._said = self._exchange()
        now, left = time.monotonic(), []
        for number in set(range(self._count)) - {self._number}:
            value = self._said.get(number, "")
            before, since = self._seen.get(number, ("", now))
            self._seen[number] = value, (since if value == before else now)
            if not any(state in value for state in (FAILED, ENDED)) and now - since < self._grace_s / 2:
                left.append(number)
        return left

    def _quit(self, problem: str) -> None:
        self._report(
            DistributedError(
                f"{problem}; this process stops as well, the same command goes on from the last checkpoint"
            )
        )
        self._end(f"{FAILED} {problem}")
        self._go()


def _cut_off(error: BaseException) -> bool:
    """Whether JAX says that a collective has lost its other end; a save's error has JAX's behind it."""
    return any(
        (isinstance(one, jax.errors.JaxRuntimeError) or type(one) is ValueError) and CUT_OFF.search(str(one))
        for one in (error, error.__cause__)
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
