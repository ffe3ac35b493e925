"""Preparing one split from start to end: what may lie in the output folder, TFDS, what is left over."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.builders.shards import PARTS, Job, write_whole

PLAN, LOCK = "plan.json", f"{PARTS}.lock"
VERSION = "1.0.0"
TEMPORARY = "incomplete."  # how TFDS begins the name of a folder it is writing
SPLITS = ("train", "validation", "test")


def prepare(
    job: Job, *, beam_runner: str | None = None, beam_options: Sequence[str] = (), show_progress: bool = True
) -> Path:
    """Writes the data set of a job; returns its folder.  One that is there already is left as it is.

    Args:
      beam_runner: name of a Beam runner that writes the shards; None writes them here, one by one.
      beam_options: flags of that runner (``--direct_num_workers=2``).
      show_progress: a bar with the time left (not with Beam, whose runners have their own).

    Raises:
      DataError: the output folder holds something else, or too many units are unusable.
    """
    finished = job.folder / VERSION
    claim(job)
    if finished.is_dir():
        _check_same(job, finished)
        return finished
    runner = _beam(beam_runner, beam_options)
    job = job.absolute() if runner else job
    with _alone(job):
        _continue_or_restart(job)
        _build(job, runner, show_progress)
    return finished


def _build(job: Job, runner: dict[str, Any], show_progress: bool) -> None:
    """Runs the TFDS builder and removes the parts."""
    from minigpt5_jax.data.prepare.builders.tfds_builders import make_builder, tfds

    with tqdm(total=job.count, unit="unit", desc=job.raw.dataset, disable=runner or not show_progress) as bar:
        tfds.disable_progress_bar()
        with _quiet(), _errors_of_workers():
            builder = make_builder(job, None if runner else bar.update)
            builder.download_and_prepare(
                download_dir=job.parts / "downloads",  # TFDS makes one though there is nothing to download
                download_config=tfds.download.DownloadConfig(**runner),
            )
    shutil.rmtree(job.parts)


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Holds the lock of a split; it goes with the process that holds it, however that ends.

    Raises:
      DataError: another process prepares this split.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{job.folder} is being prepared by another process; wait for it") from None
        try:
            yield
        finally:
            path.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TFDS says of downloads, of which there are none, and of configurations."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Beam wraps what a worker raises into a traceback of text; a DataError in it is raised as one."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        mark = f"{DataError.__module__}.{DataError.__name__}: "
        if mark not in str(error):
            raise
        raise DataError(str(error).rpartition(mark)[2]) from None


def claim(job: Job) -> None:
    """DataError where the output folder holds anything but splits of this data set."""
    mine = (PARTS, VERSION, TEMPORARY)
    for folder, known in (
        (job.output, (job.raw.dataset,)),
        (job.output / job.raw.dataset, SPLITS),
        (job.folder, mine),
    ):
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; --output must be a folder")
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = [name for name in found if name not in known and not name.startswith((PARTS, TEMPORARY))]
        if others:
            raise DataError(
                f"{folder} holds {', '.join(sorted(others)[:5])}, which is not part of the data set "
                f"{job.raw.dataset!r}; choose an empty --output folder"
            )


def _check_same(job: Job, finished: Path) -> None:
    try:
        stored = json.loads((finished / "metadata.json").read_bytes())["minigpt5"]
    except (OSError, ValueError, KeyError):
        raise DataError(f"{finished} was not made by minigpt5_jax.prepare; choose another --output") from None
    wanted = job.settings()
    other = [name for name in wanted if stored.get(name) != wanted[name]]
    if other:
        found = ", ".join(f"{name} {stored.get(name)} instead of {wanted[name]}" for name in other)
        raise DataError(
            f"{finished} was prepared from other data or settings ({found}); delete it or choose another "
            "--output"
        )


def _continue_or_restart(job: Job) -> None:
    """Removes what cannot be used: TFDS's temporary folders, parts of other data or settings."""
    for stale in job.folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale)
    plan = job.parts / PLAN
    if not plan.is_file() or json.loads(plan.read_bytes()) != job.settings():
        shutil.rmtree(job.parts, ignore_errors=True)
        job.parts.mkdir(parents=True)
        write_whole(plan, json.dumps(job.settings()))
    for temporary in job.parts.glob(".*"):
        temporary.unlink()


def _beam(runner: str | None, options: Sequence[str]) -> dict[str, Any]:
    """Beam's part of TFDS's download configuration; empty without a runner."""
    if runner is None:
        return {}
    try:
        import apache_beam as beam
    except ImportError:
        raise DataError("--beam_runner needs Apache Beam: pip install 'minigpt5_jax[prepare]'") from None
    arguments = beam.options.pipeline_options.PipelineOptions(list(options), runner=runner)
    return {"beam_runner": runner, "beam_options": arguments}
