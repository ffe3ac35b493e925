"""Trackers: where a run's numbers and images go besides ``metrics.jsonl`` and TensorBoard, if anywhere.

``run.tracker`` names one: ``wandb``, or a module of yours, whose function ``open_tracker(name, workdir,
config)`` returns a :class:`Tracker`.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

NONE = "none"


class TrackerError(RuntimeError):
    """A tracker cannot be opened; the message says why and what to do."""


@runtime_checkable
class Tracker(Protocol):
    """What takes a run's metrics."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values of a step."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """u8[H W 3]."""

    def close(self) -> None:
        """The run has ended."""


class Wandb:
    """Weights & Biases, logged in or offline (``WANDB_MODE=offline``) as its own settings say.

    Args:
      name: of the run.  workdir: folder of its files.  config: all settings.
    """

    def __init__(self, name: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        file = workdir / "wandb_id.txt"  # a resumed run goes on in the tracker, too
        number = file.read_text("utf-8").strip() if file.is_file() else uuid.uuid4().hex
        self._run = wandb.init(
            project="minigpt5_jax",
            name=name,
            dir=str(workdir),
            config=dict(config),
            id=number,
            resume="allow",
        )
        file.write_text(number, "utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


KNOWN = {"wandb": Wandb}


def check_tracker(tracker: str) -> None:
    """Refuse a tracker whose package is not installed, before any work.

    Raises:
      TrackerError: naming the package and the remedy.
    """
    if tracker == NONE:
        return
    if not tracker:
        raise TrackerError(f"run.tracker is empty; known: {', '.join((NONE, *KNOWN))}, or a module of yours")
    try:
        module = importlib.import_module(tracker)
    except ImportError as error:
        known = ", ".join((NONE, *KNOWN))
        raise TrackerError(
            f"run.tracker={tracker!r} needs the package {tracker.partition('.')[0]} ({error}): `pip install "
            f"{tracker.partition('.')[0]}`, or run.tracker={NONE} (known: {known}, or a module of yours)"
        ) from None
    if tracker not in KNOWN and not callable(getattr(module, "open_tracker", None)):
        raise TrackerError(
            f"run.tracker={tracker!r}: the module has no function open_tracker(name, workdir, config)"
        )


def open_tracker(tracker: str, name: str, workdir: Path, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run, None for ``none``.

    Args:
      tracker: as ``run.tracker``.  name, workdir, config: of the run.
    """
    if tracker == NONE:
        return None
    make = KNOWN.get(tracker) or importlib.import_module(tracker).open_tracker
    return make(name, workdir, config)
