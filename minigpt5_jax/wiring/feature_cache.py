"""Features that the first epoch of training writes and the later ones read (``data.cache=on``).

The step always takes features, so that it is one program from the first update to the last.  Images that have
none yet come as pixels beside their batch: the process that read them encodes them in one batch on its own
devices, puts their features in, and appends them to its own files.  Where the store is complete, at the end
of an epoch or when a run is resumed, the towers that made it are let go of, or not loaded at all.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.batches.image_index import ImageIndex
from minigpt5_jax.data.batches.pipeline import Loader, UncachedImages
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.feature_writer import (
    Encoder,
    FeatureWriter,
    any_readable,
    check_shape,
    claim,
    room_for,
    write_missing,
)
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.sources.features import MANIFEST, FeatureStore, check_folder, read_spec
from minigpt5_jax.models.common import Params
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.wiring.features import (
    KINDS,
    check_fixed,
    feature_kinds,
    feature_spec,
    images_of,
    load_towers,
    make_encoder,
    why_no_cache,
)
from minigpt5_jax.wiring.model import ModelSpec

FIELDS = {"target_moments": "target", "image_states": "image"}
"""Field of a batch -> kind of its features."""
REST = 0.01
"""Share of images that are encoded in one go at the end of an epoch: those that were cut from its samples."""
LARGEST = 16
"""Images that a tower encodes at a time, at most; fewer where a micro-batch holds fewer."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A store that fits a run.

    Attributes:
      store: what the loader reads.
      index: which images the samples have.
      towers: kind -> parameters that make the features that are missing; empty where none are.
      reserve: bytes of the disk that are left for the run's checkpoints.
    """

    store: FeatureStore
    index: ImageIndex
    towers: Mapping[str, Params]
    reserve: int = 0

    def extra_bytes(self, spec: ModelSpec, shardings: Mapping[str, Sharding]) -> int:
        """Bytes of the towers on each device, without what the step holds there whole."""
        return sum(
            value.nbytes
            for tower in self.towers.values()
            for path, value in tower.items()
            if path in spec.template.absent or not shardings[path].is_fully_replicated
        )


def open_features(config: ConfigDict, spec: ModelSpec, source: Source) -> tuple[Opened | None, str]:
    """(the store of a run, a line about it); None where the run encodes its images in each step.

    A tower that the run does not use (``spec.unused``), for the features stand in its place, need not be
    there for a complete store: a warning then says that nothing was compared.

    Raises:
      DataError: the store is of other images or towers, with what differs; it is not finished and nothing
        shall be written (``data.cache=off``).
      ConfigError, WeightFileError, WeightTableError: a tower that is needed cannot be read.
    """
    data, kinds = config.data, feature_kinds(config, spec)
    if not kinds or not (data.features or data.cache == "on"):
        return None, ""
    if data.features:
        check_fixed(config)
    elif reason := why_no_cache(config):
        return None, f"images are encoded in each step, as {reason} each epoch"
    folder = Path(data.features or Path(config.run.workdir) / "features")
    towers, hashes, failure = _towers(config, spec, folder, kinds)
    wanted = feature_spec(config, spec, source, hashes)
    if not check_folder(folder, wanted) and data.cache == "off":
        read_spec(folder)  # says that it is missing
    index, store = images_of(config, spec, source), FeatureStore(folder, wanted)
    if not _agreed(any_readable(source, index, store)):
        if failure is not None:
            _warn_not_compared(kinds, spec, failure)
        store.complete = True
        return Opened(store, index, {}), f"images are not encoded: their features are in {folder}"
    if failure is not None:
        raise failure
    reserve = checkpoint_bytes(config, spec)
    fits, words = room_for(index, store, reserve)
    if data.cache == "off":
        raise DataError(
            f"feature store {folder} is not finished: {words.split(':')[0]} are missing; give the command "
            "that makes it once more, and it continues, or let training add them: data.cache=on"
        )
    if not _agreed(fits):
        return None, (
            f"images are encoded in each step, as the disk is too small for {words}; to keep them, free "
            "some, or name a folder on another disk: data.features"
        )
    return Opened(store, index, towers, reserve), f"{words}; the first epoch writes them"


def checkpoint_bytes(config: ConfigDict, spec: ModelSpec) -> int:
    """Bytes that a run's checkpoints take: trainables and AdamW's moments of those it keeps, and of one more.

    Features may lie on the disk of the checkpoints, and one is written before the oldest is deleted.
    """
    shapes = spec.template.shapes.items()
    state = sum(
        3 * math.prod(x.shape) * x.dtype.itemsize for path, x in shapes if spec.labels[path] != FROZEN
    )
    return (config.run.keep_latest + config.run.keep_best + 1) * state


def _towers(
    config: ConfigDict, spec: ModelSpec, folder: Path, kinds: list[str]
) -> tuple[dict[str, Params], dict[str, str], Exception | None]:
    """(kind -> parameters, tower -> hash, why an unused tower could not be read and is taken as stored)."""
    towers, hashes, failure = {}, {}, None
    for kind in kinds:
        names = spec.parts[KINDS[kind]].features.keys()
        try:
            towers[kind], digests = load_towers(config, spec, kind)
        except (ConfigError, WeightFileError) as error:
            if not (spec.unused.issuperset(names) and (folder / MANIFEST).is_file()):
                raise
            failure, stored = error, read_spec(folder).towers
            digests = {name: stored.get(name, "") for name in names}
        hashes |= digests
    return towers, hashes, failure


def _warn_not_compared(kinds: list[str], spec: ModelSpec, failure: Exception) -> None:
    names = [f"weights.{name}" for kind in kinds for name in spec.parts[KINDS[kind]].features]
    logging.warning(
        "features are taken to be those of this run's %s, which cannot all be compared (%s)",
        " and ".join(names),
        str(failure).splitlines()[0],
    )


def _agreed(value: bool) -> bool:
    """What the main process found, in all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class FeatureCache:
    """Puts the features in that a batch lacks, and keeps them (:attr:`Loader.complete`).

    Args:
      opened: the store and what makes its features.
      source: the training samples.
      spec: the model.  frozen: parameters that the run holds anyway, in the place of ``opened.towers``.
      loader: for which it is; its batches say how many images are encoded at a time.
      epoch_steps: steps of an epoch.
      tell: gets a line when all features are there.
      load: reads the towers of a kind again, where an image can be read after they were let go of.
    """

    def __init__(
        self,
        opened: Opened,
        source: Source,
        spec: ModelSpec,
        frozen: Params,
        loader: Loader,
        *,
        epoch_steps: int,
        tell: Callable[[str], None],
        load: Callable[[str], Params],
    ):
        # Source and store are its own: the loader's are read by a thread or by other processes.
        self._index, self._source, self._tell, self._load = opened.index, copy.copy(source), tell, load
        self._store = FeatureStore(opened.store.folder, opened.store.spec, warn=False)
        self._template = spec.template
        self._shared = {path: value for path, value in frozen.items() if value.is_fully_replicated}
        self._encoders = {kind: self._encoder(kind, tower) for kind, tower in opened.towers.items()}
        self._complete = not self._encoders
        sizes = {"target": loader.largest.items, "image": loader.largest.images}
        self._batch = {kind: max(1, min(LARGEST, size)) for kind, size in sizes.items()}
        self._epoch_steps = self._next_epoch = epoch_steps
        self._writer: FeatureWriter | None = None
        if self._encoders:
            claim(self._store.folder, self._store.spec)
            self._writer = FeatureWriter(self._store, reserve=opened.reserve)

    def _encoder(self, kind: str, tower: Params) -> Encoder:
        params = {path: self._shared.get(path, value) for path, value in tower.items()}
        return make_encoder(self._template, kind, params)

    def __call__(
        self, step: int, fields: dict[str, np.ndarray], uncached: Mapping[str, UncachedImages]
    ) -> None:
        """Fills the features of a step's images that came as pixels."""
        if step >= self._next_epoch:
            self._next_epoch = step - step % self._epoch_steps + self._epoch_steps
            if not self._complete:
                self._end_epoch()
        self._wait()
        for field, images in uncached.items():
            values = self._features(FIELDS[field], images["keys"], images["pixels"])
            fields[field].reshape(-1, *values.shape[1:])[images["slots"]] = values

    def _features(self, kind: str, keys: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Features of images, each encoded once; those that are kept already are read."""
        unique, first, which = np.unique(keys, return_index=True, return_inverse=True)
        found = [self._store.find(kind, int(key)) for key in unique]
        lacking = [place for place, values in enumerate(found) if values is None]
        if lacking and self._complete:
            self._store.refresh()
            found = [self._store.find(kind, int(key)) for key in unique]
            lacking = [place for place, values in enumerate(found) if values is None]
        if lacking:
            made = self._encode(kind, pixels[first[lacking]])
            self._append(kind, unique[lacking], made)
            for place, values in zip(lacking, made, strict=True):
                found[place] = values
        return np.stack(found)[which]

    def _encode(self, kind: str, pixels: np.ndarray) -> np.ndarray:
        """Features as they are stored, in batches of one size."""
        if kind not in self._encoders:
            logging.warning(
                "%d images can be read now that could not when the features in %s were made: they are "
                "encoded in each step; start the run again, and theirs are added",
                *(len(pixels), self._store.folder),
            )
            self._encoders[kind] = self._encoder(kind, self._load(kind))
        size, made = self._batch[kind], []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            made.append(self._encoders[kind](padded)[: len(part)])
        return check_shape(kind, np.concatenate(made), self._store.spec).astype(self._store.spec.dtype(kind))

    def _append(self, kind: str, keys: np.ndarray, values: np.ndarray) -> None:
        if self._writer is not None:
            try:
                self._writer.append(kind, keys, values)
            except OSError as error:
                self._stop_writing(error)

    def _wait(self) -> None:
        """Returns when what was written can be read."""
        if self._writer is not None:
            try:
                self._writer.wait()
            except OSError as error:
                self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        logging.warning(
            "features are no longer written: %s; images without any are encoded in each step", error
        )
        self._writer = None
        self._store.refresh()

    def _end_epoch(self) -> None:
        """Encodes the few images that no sample had room for, then lets the towers go.

        All processes are here before the same step.
        """
        self._wait()
        _sync("features of an epoch")
        self._store.refresh()
        left = sum(len(self._index.missing(kind, self._store)) for kind in self._encoders)
        known = sum(len(self._index.keys(kind)) for kind in self._encoders)
        if not _agreed(left <= max(REST * known, LARGEST * jax.process_count())):
            return
        done = self._writer is not None
        if done:
            try:
                write_missing(
                    self._source,
                    self._index,
                    self._store,
                    self._writer,
                    self._encoders_of_any_size(),
                    batch_size=max(self._batch[kind] for kind in self._encoders),
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
            except OSError as error:
                self._stop_writing(error)
                done = False
        if jax.process_count() > 1:
            done = bool(multihost_utils.process_allgather(np.int32(done)).all())
        self._store.refresh()
        if done:
            self.close()
            self._encoders, self._complete = {}, True
            self._tell(f"the features of all images are in {self._store.folder}: they are encoded no more")

    def _encoders_of_any_size(self) -> dict[str, Encoder]:
        """The encoders in their one compiled size."""
        return {kind: lambda images, kind=kind: self._encode(kind, images) for kind in self._encoders}

    def close(self) -> None:
        """Ends the writing thread; what was appended gets to the disk."""
        if self._writer is not None:
            self._wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
