"""Writes features (:mod:`minigpt5_jax.data.sources.features`): as they come, or all that are missing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt64
from tqdm import tqdm

from minigpt5_jax.data.batches.image_index import ImageIndex
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource, prepare_image
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.data.sources.features import (
    FORMAT,
    KEY,
    MANIFEST,
    FeatureSpec,
    FeatureStore,
    check_folder,
    describe_size,
    readable_bytes,
)

Encoder = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[Any, "n ..."]]


def free_bytes(folder: Path) -> int:
    """Bytes that can be written in ``folder``, or in the nearest folder above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def claim(folder: Path, spec: FeatureSpec) -> None:
    """Writes the manifest, or checks that the one there says the same.

    Raises:
      DataError: the folder holds features of other images or towers, or features without a manifest.
    """
    if check_folder(folder, spec):
        return
    file = folder / MANIFEST
    folder.mkdir(parents=True, exist_ok=True)
    # Every process of a run writes it, and those of two machines may have equal ids.
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    part.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(spec)}, indent=1))
    os.replace(part, file)


class FeatureWriter:
    """Appends features to files of its own, in a thread; their keys only when they are on the disk.

    Args:
      store: where they belong; it knows of them at once, and can read them after :meth:`wait`.
      reserve: bytes of the disk that are left for others.
    """

    def __init__(self, store: FeatureStore, *, reserve: int = 0):
        self._store, self._reserve, self._files = store, reserve, {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def append(self, kind: str, keys: UInt64[np.ndarray, " n"], values: Float[np.ndarray, "n ..."]) -> None:
        """Writes features in the order of their keys.

        Raises:
          OSError: what was appended before could not be written, or these would leave less than the reserve;
            nothing more can be written.
        """
        self.wait()
        self._store.forget_recent()
        free = free_bytes(self._store.folder)
        size = len(keys) * (self._store.spec.bytes_of(kind) + KEY.itemsize)
        if self._reserve and free < self._reserve + size:
            raise OSError(
                errno.ENOSPC,
                f"{readable_bytes(free)} are free, and {readable_bytes(self._reserve)} are for checkpoints",
                str(self._store.folder),
            )
        if kind not in self._files:
            self._files[kind] = [*self._open(kind), 0]
        number, files, first = self._files[kind]
        self._files[kind][2] += len(keys)
        data = np.ascontiguousarray(values, self._store.spec.dtype(kind))
        self._pending = self._pool.submit(_write, files, keys.astype(KEY).tobytes(), data)
        self._store.add(kind, number, first, keys)

    def _open(self, kind: str) -> tuple[int, tuple[Any, Any]]:
        """(number, files of values and of keys) of a file that nobody else writes."""
        number = sum(1 for _ in self._store.folder.glob(f"*.{kind}.values"))
        while True:
            try:
                values = open(self._store.file(number, kind, "values"), "xb", buffering=0)
                return number, (values, open(self._store.file(number, kind, "keys"), "xb", buffering=0))
            except FileExistsError:
                number += 1

    def wait(self) -> None:
        """Returns when everything is written; OSError as :meth:`append`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread; what is being written gets there, or is made again."""
        self._pool.shutdown()
        for _, files, _ in self._files.values():
            for file in files:
                file.close()
        self._files = {}


def _write(files: tuple[Any, Any], keys: bytes, values: np.ndarray) -> None:
    for file, data in zip(files, (memoryview(values.view(np.uint8)).cast("B"), memoryview(keys))):
        while data:
            data = data[file.write(data) :]
        os.fdatasync(file.fileno())


def write_missing(
    source: Source,
    index: ImageIndex,
    store: FeatureStore,
    writer: FeatureWriter,
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int,
    threads: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> int:
    """Makes the features that are not there yet, each process its share; how many images cannot be read.

    Args:
      index: which images the samples have.
      encoders: kind -> ``u8[n H W 3] -> features``, always called with ``batch_size`` images.
      threads: that decode images while the device computes.
    """
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for kind, encoder in encoders.items():
            places = index.missing(kind, store)
            places = places[index.keys(kind)[places] // 2 % process_count == process_index]
            places = places[np.argsort(index.samples(kind)[places], kind="stable")]  # as the files have them
            bar = tqdm(
                total=len(places), desc=f"features ({kind})", unit="image", disable=not len(places), delay=1
            )
            with bar:
                for keys, pixels, unreadable in _read(
                    source, index, kind, places, store.spec, batch_size, pool
                ):
                    bad += unreadable
                    if len(keys):
                        values = check_shape(kind, np.asarray(encoder(pixels)), store.spec)[: len(keys)]
                        writer.append(kind, keys, values)
                    bar.update(len(keys) + unreadable)
        writer.wait()
    return bad


def check_shape(kind: str, values: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """``values``; DataError where a tower gives features of another shape than the store's."""
    if values.shape[1:] != (shape := spec.shapes()[kind]):
        raise DataError(f"the {kind} encoder gives features of {values.shape[1:]}, the store holds {shape}")
    return values


def _read(
    source: Source,
    index: ImageIndex,
    kind: str,
    places: np.ndarray,
    spec: FeatureSpec,
    batch_size: int,
    pool: concurrent.futures.Executor,
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(keys, pixels u8[batch_size H W 3], images that cannot be read), a batch ahead in the pool."""
    size = spec.target_size if kind == "target" else spec.image_size

    def submit(start: int) -> list[concurrent.futures.Future | None]:
        # Samples are fetched here, for sources are not made for several threads; images are decoded there.
        futures = []
        for place in places[start : start + batch_size]:
            try:
                image = index.find(source, kind, int(place))
            except SampleError:
                futures.append(None)
            else:
                futures.append(pool.submit(decode, image, kind, int(index.keys(kind)[place]), spec))
        return futures

    ahead = submit(0)
    for start in range(0, len(places), batch_size):
        now, ahead = ahead, submit(start + batch_size)
        batch, keys = np.zeros((batch_size, size, size, 3), np.uint8), []
        for place, future in zip(places[start:], now):
            with contextlib.suppress(SampleError):  # named and counted when its sample is read
                if future is not None:
                    batch[len(keys)] = future.result()
                    keys.append(index.keys(kind)[place])
        yield np.asarray(keys, KEY), batch, len(now) - len(keys)


def decode(image: ImageSource, kind: str, key: int, spec: FeatureSpec) -> UInt8[np.ndarray, "H W 3"]:
    """An image as its tower wants it; SampleError where it cannot be read."""
    return prepare_image(
        image,
        spec.target_size if kind == "target" else spec.image_size,
        square=kind == "target" or spec.pad_input_square,
        flip=bool(key & 1),
        as_shown=spec.images_as_shown,
    )


def any_readable(source: Source, index: ImageIndex, store: FeatureStore) -> bool:
    """Whether some image without features can be read: if not, nothing is left to be made."""
    for kind in store.spec.shapes():
        for place in index.missing(kind, store):
            with contextlib.suppress(SampleError):
                image = index.find(source, kind, int(place))
                decode(image, kind, int(index.keys(kind)[place]), store.spec)
                return True
    return False


def room_for(index: ImageIndex, store: FeatureStore, reserve: int = 0) -> tuple[bool, str]:
    """(whether the disk holds what is missing and leaves ``reserve`` bytes, words with the sizes)."""
    counts = {kind: len(index.missing(kind, store)) for kind in store.spec.shapes()}
    size, words = describe_size(counts, store.spec)
    free = free_bytes(store.folder)
    kept = f" and {readable_bytes(reserve)} are for checkpoints" if reserve else ""
    return (
        size + reserve < free,
        f"features of {words} in {store.folder}, where {readable_bytes(free)} are free{kept}",
    )
