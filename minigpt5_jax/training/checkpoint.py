"""Checkpoints: what training changed and all that is needed to go on bit for bit.

One step is one folder with an Orbax item per part of the state (``trainable``, ``opt_state``, ``step``,
``rng``) and a JSON item with the data position and the description of the run.  Frozen weights are
not in it: they are read from their source and compared by hash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from minigpt5_jax.training.provenance import CheckpointError, Meta, plain

META = "meta"
Result = TypeVar("Result")


class Checkpoints:
    """Numbered checkpoints in a folder, saved in the background; the newest and the best are kept.

    Args:
      directory: folder of the steps; made at the first save.
      keep_latest: newest steps kept.
      keep_best: steps kept besides for the lowest ``best_metric`` (of those saved with one).
      best_metric: name among the ``metrics`` given to :meth:`save`.
      read_only: nothing is written or cleaned up, so that a run that is saving there is left alone.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str = "image",
        read_only: bool = False,
    ):
        self.directory = Path(directory).expanduser().absolute()
        self._best_metric = best_metric
        self._unreadable: set[int] = set()
        policies = ocp.checkpoint_managers
        self._options = ocp.CheckpointManagerOptions(
            step_format_fixed_length=8,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_latest),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[best_metric],
                        reverse=True,  # ascending quality is descending loss
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
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
        return self._opened

    @property
    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending; a half-written one is not among them."""
        if not self.directory.is_dir():
            return []
        return sorted(set(self._manager.all_steps()) - self._unreadable)

    @property
    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return max(self.steps, default=None)

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
        kept = self._quality(step, metrics)
        named = {name: _named(tree) for name, tree in state.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in named.items()}
        items[META] = ocp.args.JsonSave(
            {
                "data_state": int(data_state),
                "meta": plain(meta),
                "leaves": {name: _leaves(tree) for name, tree in named.items()},
            }
        )
        try:
            if step in self._unreadable:
                self._manager.delete(step)
                self._unreadable.discard(step)
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=kept, force=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {error}") from error

    def meta(self, step: int | None = None) -> Meta:
        """Description of the run that wrote ``step`` (the newest): cheap, to check before compiling.

        Raises:
          CheckpointError: there is none.
        """
        return self._first_readable(step, lambda number: self._read_meta(number)["meta"])

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
            self._check_leaves(number, saved["leaves"], like)
            args = {name: ocp.args.StandardRestore(_abstract(_named(tree))) for name, tree in like.items()}
            restored = self._manager.restore(number, args=ocp.args.Composite(**args))
            parts = {name: _unnamed(restored[name], tree) for name, tree in like.items()}
            return parts, saved["data_state"], saved["meta"]

        return self._first_readable(step, read)

    def paths(self, part: str, step: int) -> tuple[str, ...]:
        """Paths of a part that is a flat dict of parameters; none where the step has no such part.

        Raises:
          CheckpointError: there is no such step, or it cannot be read.
        """
        leaves = self._first_readable(step, lambda number: self._read_meta(number)["leaves"])
        return tuple(name.removeprefix("['").removesuffix("']") for name in leaves.get(part, ()))

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        if self._opened is not None:
            self._opened.wait_until_finished()

    def close(self) -> None:
        """Wait and let go of the folder."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _quality(self, step: int, metrics: Mapping[str, int | float] | None) -> dict[str, float] | None:
        """What ranks a step, None where it was not measured."""
        if metrics is None:
            return None
        if self._best_metric not in metrics:
            logging.warning(
                "step %d: no metric %r to find the best checkpoint by; there are %s",
                step,
                self._best_metric,
                ", ".join(metrics),
            )
            return None
        value = float(metrics[self._best_metric])
        return {self._best_metric: value} if math.isfinite(value) else None

    def _first_readable(self, step: int | None, read: Callable[[int], Result]) -> Result:
        """``read(step)``; without a step the newest that works, each damaged one logged."""
        steps = self.steps
        if not steps:
            what = "holds no complete checkpoint" if self.directory.is_dir() else "does not exist"
            raise CheckpointError(f"checkpoint folder {self.directory} {what}")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {steps}")
        failure: Exception | None = None
        for number in steps[::-1] if step is None else [step]:
            try:
                return read(number)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                failure = error
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                logging.warning("step %d in %s cannot be read: %s", number, self.directory, reason)
                self._unreadable.add(number)
        raise CheckpointError(f"nothing readable is left in {self.directory}: {failure}") from failure

    def _read_meta(self, step: int) -> Meta:
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored[META]

    def _check_leaves(
        self, step: int, leaves: Mapping[str, Mapping[str, str]], like: Mapping[str, Any]
    ) -> None:
        """Compare names, shapes and dtypes with what is on disk, before anything is read."""
        problems = []
        for part, tree in like.items():
            if part not in leaves:
                problems.append(f"part {part!r} is not in the checkpoint")
                continue
            saved, wanted = leaves[part], _leaves(_named(tree))
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


def first_lines(lines: Sequence[str], limit: int = 8) -> str:
    """The first of some lines of a message, indented, and how many more there are."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in [*lines[:limit], *more])
