"""Checkpoints: what training changed and all that is needed to go on bit for bit.

One step is one folder with an Orbax item per part of the state (``trainable``, ``opt_state``, ``step``,
``rng``) and a JSON item with the data position, the description of the run, what it was measured by, and a
checksum of every array.  Frozen weights are not in it: they are read from their source and compared by hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging as python_logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from minigpt5_jax.training.checksum import checksums
from minigpt5_jax.training.owner import Owner
from minigpt5_jax.training.provenance import CheckpointError, Meta, plain

META = "meta"
WEIGHTS = ("trainable", "inherited")
"""Parts of a step that hold parameters."""
Result = TypeVar("Result")


class DamagedStep(Exception):
    """The files of a step are there, but not what was written into them."""


class Checkpoints:
    """Numbered checkpoints in a folder, saved in the background; the newest and the best are kept.

    Args:
      directory: folder of the steps; made at the first save.
      keep_latest: newest steps kept.
      keep_best: steps kept besides for the lowest ``best_metric`` (of those saved with one).
      best_metric: name among the ``metrics`` given to :meth:`save`.
      owner: of the run's folder, released by :meth:`close`.
      read_only: nothing is written or cleaned up, so that a run that is saving there is left alone.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str = "image",
        owner: Owner | None = None,
        read_only: bool = False,
    ):
        self.directory = Path(directory).expanduser().absolute()
        self._best_metric = best_metric
        self._unreadable: dict[int, str] = {}
        self._qualities: dict[int, float | None] = {}
        self._tried: dict[tuple[int, str], dict[str, jax.Array]] = {}
        self._saving: int | None = None
        self._failed = False
        self._owner = owner
        self._options = ocp.CheckpointManagerOptions(
            step_format_fixed_length=8,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
            preservation_policy=_Kept(self, keep_latest, keep_best),
        )
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        # Opened late: looking for a checkpoint must not make a folder.
        if self._opened is None:
            verbosity = logging.get_verbosity()
            if self._options.read_only:  # Orbax warns that what was asked for is so
                logging.set_verbosity(logging.ERROR)
            self._opened = ocp.CheckpointManager(self.directory, options=self._options)
            logging.set_verbosity(verbosity)
            if not self._options.read_only:
                _hush.begin()
        return self._opened

    @property
    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending; a half-written one is not among them."""
        if not self.directory.is_dir():
            return []
        return sorted(set(self._manager.all_steps()) - self._unreadable.keys())

    @property
    def latest_step(self) -> int | None:
        """Newest complete step that is not known to be unreadable, or None."""
        return max(self.steps, default=None)

    def newest_readable(self) -> int:
        """The step that a reader takes who was given none: the newest whose parameters can be read.

        Where there are several, the parameters are read to find out, and kept for the :meth:`restore` that
        asks for them next.  A step that is passed over is logged together with the one that is taken.

        Raises:
          CheckpointError: there is none.
        """
        steps = self.steps
        if len(steps) == 1:
            return steps[0]  # nothing to choose from; what is wrong with it is said by who reads it
        return self._first_readable(None, self._try_weights)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        data_state: int,
        meta: Mapping[str, Any],
        *,
        metrics: Mapping[str, int | float] | None = None,
        losses: Mapping[str, int | float] | None = None,
    ) -> None:
        """Begin to save; returns when the state may be donated, before it is on disk.

        A step that is there already is left as it is.

        Args:
          step: number of updates done.
          state: part name -> pytree of arrays; ``vars(train_state)``.
          data_state: the data iterator's position.
          meta: description of the run (:func:`describe_run`), JSON.
          metrics: validation results; decide which step is the best.
          losses: losses of the step that led to ``state``; a state behind a non-finite one is refused.

        Raises:
          CheckpointError: a loss is not finite, or the folder cannot be written.
        """
        bad = {name: value for name, value in (losses or {}).items() if not math.isfinite(value)}
        if bad:
            raise CheckpointError(f"step {step} is not saved: losses are not finite ({bad})")
        if step in self.steps:  # resuming is bit-exact: what is there is what would be written
            logging.info("step %d is already in %s", step, self.directory)
            return
        measured = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        if metrics is not None and self._best_metric not in metrics:
            logging.warning(
                "step %d: no metric %r to find the best checkpoint by; there are %s",
                step,
                self._best_metric,
                ", ".join(metrics),
            )
        self._qualities[step] = measured.get(self._best_metric)
        named = {name: _named(tree) for name, tree in state.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in named.items()}
        items[META] = ocp.args.JsonSave(
            {
                "data_state": int(data_state),
                "meta": plain(meta),
                "leaves": {name: _leaves(tree) for name, tree in named.items()},
                "checksums": {name: checksums(tree) for name, tree in named.items()},
                "metrics": measured,
            }
        )
        self.wait()  # the step before, so that what went wrong with it is said of it
        self._saving = step
        with self._told():
            if step in self._unreadable:
                self._manager.delete(step)
                del self._unreadable[step]
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def meta(self, step: int | None = None) -> Meta:
        """Description of the run that wrote ``step`` (the newest): cheap, to check before compiling.

        Raises:
          CheckpointError: there is none.
        """
        return self._first_readable(step, lambda number: self._read_meta(number)["meta"])

    def fingerprint(self, step: int) -> str:
        """sha256 of what a step says of itself, the checksums of its arrays among it: no array is read.

        Raises:
          CheckpointError: there is no such step.
        """

        def hashed(number: int) -> str:
            return hashlib.sha256(json.dumps(self._read_meta(number), sort_keys=True).encode()).hexdigest()

        return self._first_readable(step, hashed)

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], int, Meta]:
        """Read ``step``, or the newest one that can be read; an unreadable one is logged and passed over.

        Args:
          like: part name -> pytree of arrays or ``ShapeDtypeStruct``; a leaf's ``sharding`` is where it
            goes, whatever mesh wrote it.  Parts that are not named are not read.
          step: number of a step, or None.

        Returns:
          (parts as ``like``, data state, description of the run).

        Raises:
          CheckpointError: no checkpoint, other leaves, shapes or dtypes, or nothing readable.
        """

        def read(number: int) -> tuple[dict[str, Any], int, Meta]:
            saved = self._read_meta(number)
            named = {name: _named(tree) for name, tree in like.items()}
            self._check_leaves(number, saved["leaves"], named)
            restored = self._read_parts(number, saved, named)
            parts = {name: _unnamed(restored[name], tree) for name, tree in like.items()}
            return parts, saved["data_state"], saved["meta"]

        return self._first_readable(step, read)

    def paths(self, part: str, step: int | None = None) -> tuple[str, ...]:
        """Paths of a part that is a flat dict of parameters; none where the step has no such part.

        Raises:
          CheckpointError: there is no such step, or it cannot be read.
        """
        leaves = self._first_readable(step, lambda number: self._read_meta(number)["leaves"])
        return tuple(name.removeprefix("['").removesuffix("']") for name in leaves.get(part, ()))

    def check(self) -> None:
        """Return at once; call after every step, so that a save that failed is said by the next one.

        Raises:
          CheckpointError: as :meth:`wait`.
        """
        if self._saving is not None and self._opened is not None and not self._opened.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when everything saved so far is on disk.

        Raises:
          CheckpointError: the last save failed, a full disk for example.
        """
        if self._opened is not None:
            with self._told():
                self._opened.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Wait and let go of the folder.

        Raises:
          CheckpointError: as :meth:`wait`.
        """
        opened, self._opened = self._opened, None
        try:
            if opened is not None:
                with self._told():
                    opened.close()
        finally:
            # What is left of a save that failed is said when it is thrown away, at the end of the process.
            if opened is not None and not (self._options.read_only or self._failed):
                _hush.end()
            if self._owner is not None:
                self._owner.release()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What fails inside is said of the step that is being saved."""
        try:
            yield
        except (OSError, ValueError) as error:
            step, self._failed = self._saving, True
            self._qualities.pop(step, None)
            before = [number for number in self._on_disk() if number != step]
            what = "close" if step is None else f"save step {step} in"
            rest = f"from step {before[-1]}, which is whole" if before else "from its start"
            raise CheckpointError(
                f"cannot {what} {self.directory}: {_told(error)}; once this is mended, the same "
                f"command goes on {rest}"
            ) from error

    def _on_disk(self) -> list[int]:
        """Steps that have their final name: Orbax gives it to what is whole."""
        names = (path.name for path in self.directory.glob("[0-9]*")) if self.directory.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def quality(self, step: int) -> float | None:
        """What ranks a step, the lower the better; None where it was not measured, or cannot be read."""
        if step not in self._qualities:
            try:
                saved = self._read_meta(step).get("metrics")
            except Exception:  # whoever wants to read the step says that it is damaged
                saved = {}
            # Before checkpoints kept them, the values were in the lines of the run only.
            self._qualities[step] = (
                self._logged_qualities().get(step) if saved is None else saved.get(self._best_metric)
            )
        return self._qualities[step]

    def _logged_qualities(self) -> dict[int, float]:
        """Step -> the metric in the run's ``metrics.jsonl``."""
        found = {}
        path = self.directory.parent / "metrics.jsonl"
        for line in path.read_text("utf-8").split("\n") if path.is_file() else ():
            try:
                values = json.loads(line)
                found[values["step"]] = float(values[f"validation/{self._best_metric}"])
            except (ValueError, KeyError, TypeError):  # other lines, or a last one that was cut off
                continue
        return found

    def is_unreadable(self, step: int) -> bool:
        """Whether reading ``step`` failed."""
        return step in self._unreadable

    def _first_readable(self, step: int | None, read: Callable[[int], Result]) -> Result:
        """``read(step)``; without a step the newest that works, each damaged one logged."""
        steps = self.steps
        if step in self._unreadable:
            raise CheckpointError(self._cannot_read(step))
        if not steps:
            self._refuse_empty()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {steps}")
        passed = []
        for number in steps[::-1] if step is None else [step]:
            try:
                result = read(number)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                self._unreadable[number] = _reason(error)
                passed.append(number)
                continue
            for damaged in passed:
                logging.warning(
                    "step %d in %s cannot be read (%s); step %d is the newest that can, and is taken instead",
                    damaged,
                    self.directory,
                    self._unreadable[damaged],
                    number,
                )
            return result
        if step is not None:
            raise CheckpointError(self._cannot_read(step)) from None
        self._refuse_empty()

    def _refuse_empty(self) -> NoReturn:
        """Say why there is no step to read."""
        if self._unreadable:
            lines = [f"step {step}: {reason}" for step, reason in sorted(self._unreadable.items())]
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n{first_lines(lines)}\n"
                "take the folder from a copy, or start in another workdir"
            ) from None
        what = "holds no complete checkpoint" if self.directory.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint folder {self.directory} {what}")

    def _cannot_read(self, step: int) -> str:
        """What to say of a damaged step that was asked for by its number, with those to ask for instead."""
        others = []
        for other in self.steps:
            try:
                self._try_weights(other)
                others.append(other)
            except Exception as error:
                self._unreadable[other] = _reason(error)
        message = f"step {step} in {self.directory} cannot be read ({self._unreadable[step]}); "
        if not others:
            return message + "nor can any other: take the folder from a copy, or start in another workdir"
        return message + f"these can: {', '.join(map(str, others))} (--step {others[-1]})"

    def _try_weights(self, step: int) -> int:
        """``step``, if its parameters can be read."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = self._read_meta(step)
        named = {
            part: {name: _shape(text, here) for name, text in saved["leaves"][part].items()}
            for part in WEIGHTS
            if part in saved["leaves"]
        }
        found = self._read_parts(step, saved, named)
        self._tried = {(step, part): arrays for part, arrays in found.items()}
        return step

    def _read_meta(self, step: int) -> Meta:
        # Not by Orbax: processes may look at different moments, and it would wait for all of them.
        path = self.directory / f"{step:08d}" / META / "metadata"
        try:
            saved = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise DamagedStep(f"{META}/metadata: {error.strerror}") from None
        except ValueError:
            raise DamagedStep(f"{META}/metadata is empty or cut off") from None
        if missing := {"leaves", "meta", "data_state"} - (saved.keys() if isinstance(saved, dict) else set()):
            raise DamagedStep(f"{META}/metadata lacks {', '.join(sorted(missing))}")
        return saved

    def _read_parts(self, step: int, saved: Meta, named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Part -> name -> array of a step whose description was read, after comparing their checksums."""
        kept_parts = {part: self._tried.pop((step, part)) for part in named if (step, part) in self._tried}
        placed = {part: _placed(kept_parts[part], named[part]) for part in kept_parts}
        if not (named := {part: tree for part, tree in named.items() if part not in placed}):
            return placed
        args = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in named.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        for part, tree in named.items():
            kept = saved.get("checksums", {}).get(part, {})  # those of earlier versions have none
            read = checksums({name: restored[part][name] for name in tree if name in kept})
            if changed := sorted(name for name, value in read.items() if value != kept[name]):
                raise DamagedStep(
                    f"{part}{changed[0]} is not what was saved: its checksum differs"
                    + (f", and those of {len(changed) - 1} more" if changed[1:] else "")
                )
        return {**restored, **placed}

    def _check_leaves(
        self, step: int, leaves: Mapping[str, Mapping[str, str]], named: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Compare names, shapes and dtypes with what is on disk, before anything is read."""
        problems = []
        for part, tree in named.items():
            if part not in leaves:
                problems.append(f"part {part!r} is not in the checkpoint")
                continue
            saved, wanted = leaves[part], _leaves(tree)
            problems += [f"{part}{name} is in the checkpoint only" for name in saved.keys() - wanted.keys()]
            problems += [f"{part}{name} is not in the checkpoint" for name in wanted.keys() - saved.keys()]
            problems += [
                f"{part}{name} is {saved[name]} in the checkpoint, {wanted[name]} here"
                for name in saved.keys() & wanted.keys()
                if saved[name] != wanted[name]
            ]
        if problems:
            raise CheckpointError(
                f"step {step} in {self.directory} is of another model:\n" + first_lines(sorted(problems))
            )


def _told(error: Exception) -> str:
    """Why a save failed, in a line: of TensorStore's many words the file system's own."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"{first[:300]}{'...' if len(first) > 300 else ''}"


class _Hush:
    """Keeps from stderr what Orbax, asyncio and TensorStore's threads say again of a save that failed.

    They print a traceback for every array; the error itself is raised by :meth:`Checkpoints.check`.  It lasts
    while folders are open for writing, of which there may be several, and
    once a save has failed until the process ends.
    """

    def __init__(self):
        self._open, self._loggers = 0, (logging.get_absl_logger(), python_logging.getLogger("asyncio"))
        self._mine: Callable[[Any], Any] | None = None

    def begin(self) -> None:
        """Note that a folder is open."""
        self._open += 1
        if self._open == 1:
            for logger in self._loggers:
                logger.addFilter(_not_of_orbax)
            self._before = sys.unraisablehook
            self._mine = sys.unraisablehook = functools.partial(_unraisable, self._before)

    def end(self) -> None:
        """Note that a folder is closed; with the last one everything is as it was."""
        self._open -= 1
        if self._open:
            return
        for logger in self._loggers:
            logger.removeFilter(_not_of_orbax)
        if sys.unraisablehook is self._mine:  # else somebody has put another one over it
            sys.unraisablehook = self._before


_hush = _Hush()


def _not_of_orbax(record: python_logging.LogRecord) -> bool:
    if not record.exc_info:
        return True
    frames = traceback.extract_tb(record.exc_info[2]) if record.name == "asyncio" else ()
    return not any(
        f"{os.sep}orbax{os.sep}" in path for path in (record.pathname, *(f.filename for f in frames))
    )


def _unraisable(before: Callable[[Any], Any], unraisable: Any) -> None:
    if not (
        isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    ):
        before(unraisable)


def _reason(error: Exception) -> str:
    """A few words on why a step cannot be read: of TensorStore's many lines, how the first begins."""
    if isinstance(error, DamagedStep | OSError):
        return str(error)
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"its files are damaged: {first[:60]}{'...' if len(first) > 60 else ''}"


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Which steps stay: the newest and the best of those that are not known to be damaged."""

    # Orbax's own policies know the metrics of this process's saves only: after a restart the best would go.
    def __init__(self, checkpoints: Checkpoints, latest: int, best: int):
        self._checkpoints, self._latest, self._best = checkpoints, latest, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(one.step for one in checkpoints if not self._checkpoints.is_unreadable(one.step))
        measured = {step: value for step in steps if (value := self._checkpoints.quality(step)) is not None}
        best = sorted(measured, key=lambda step: (measured[step], -step))[: self._best]
        kept = {*steps[len(steps) - min(self._latest, len(steps)) :], *best}
        return [one.step in kept for one in checkpoints]


def _placed(arrays: Mapping[str, jax.Array], like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Those of the arrays that ``like`` names, where it wants them."""
    return {name: jax.device_put(arrays[name], leaf.sharding) for name, leaf in like.items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    """Raw bits of a typed random key, abstract or not."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raw = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path that they have in the tree."""
    # Orbax stores plain dicts of arrays: a checkpoint does not depend on optimizer classes, and every error
    # can name its leaf.
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path) or "value": _key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in leaves
    }


def _unnamed(named: Mapping[str, Any], like: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    values = [named[jax.tree_util.keystr(path) or "value"] for path, _ in leaves]
    restored = [
        jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value
        for value, (_, leaf) in zip(values, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, restored)


def _key_impl(leaf: Any) -> str:
    """Name of a key's implementation; an abstract key knows it by its dtype only (``key<fry>``)."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return str(jax.random.key_impl(leaf))
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == leaf.dtype:
            return name
    raise CheckpointError(f"unknown kind of random key {leaf.dtype}")


def _abstract(named: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in named.items()
    }


def _leaves(named: Mapping[str, Any]) -> dict[str, str]:
    """Name -> ``float32[8,4]``."""
    return {
        name: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]" for name, leaf in named.items()
    }


def _shape(text: str, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """What ``float32[8,4]`` means."""
    dtype, _, sizes = text.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)


def first_lines(lines: Sequence[str], limit: int = 8) -> str:
    """The first of some lines of a message, indented, and how many more there are."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in [*lines[:limit], *more])
