"""A run that is told to stop ends after a whole step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

Value = TypeVar("Value")


class _WaitEnded(BaseException):
    """A signal came while something was waited for."""


class Interruption:
    """While it is entered, SIGTERM and Ctrl-C are noted; a second one acts as it would without this.

    Of several processes JAX's coordination service takes note of SIGTERM, and all of them stop after the
    same step; Ctrl-C is left as it is there.  Only Python's main thread can take signals; in others nothing
    is noted.

    Attributes:
      noted: the signal that came.
    """

    def __init__(self):
        self.noted: signal.Signals | None = None
        self._waiting = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def wait(self, get: Callable[[], Value]) -> Value | None:
        """``get()``, which may take long; None where a signal came first, and what it did is unfinished."""
        try:
            try:
                self._waiting = True
                return None if self.noted else get()
            finally:
                self._waiting = False
        except _WaitEnded:
            return None

    def after(self, step: int) -> signal.Signals | None:
        """The signal that asks to stop after ``step``; call it after every one."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self.noted

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted = signal.Signals(number)
        for known, before in self._before.items():
            signal.signal(known, before)
        self._before = {}
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.noted.name}: stopping; the last whole step is saved first\n".encode())
        if self._waiting:
            raise _WaitEnded
