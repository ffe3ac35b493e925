"""Makes a store of precomputed features (:mod:`minigpt5_jax.data.sources.features`), shard by shard."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource, prepare_image
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.data.sources.features import (
    DTYPES,
    FORMAT,
    MANIFEST,
    FeatureSpec,
    array_file,
    index_file,
    read_reasons,
    read_spec,
)

Encoder = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[Any, "n ..."]]


def write_features(
    folder: str | Path,
    source: Source,
    spec: FeatureSpec,
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int = 16,
    threads: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> int:
    """Makes the shards that are not there yet; an interrupted run continues with the same call.

    Args:
      folder: of the store.
      source: its images, all samples in epoch 0.
      spec: what to store.
      encoders: ``target`` and ``image``: u8[n H W 3] -> features, always called with ``batch_size``
        images.
      threads: that decode images while the device computes.
      process_index, process_count: this process makes every ``process_count``-th shard.

    Returns:
      Samples without features in the whole store so far; training counts them against its budget.

    Raises:
      DataError: the folder holds another store, with what differs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, spec)
    missing = [
        n for n in range(process_index, spec.shards, process_count) if not index_file(folder, n).is_file()
    ]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number in tqdm(missing, desc="making features", unit="shard", disable=not missing):
            _write_shard(folder, number, source, spec, encoders, batch_size, pool)
    made = [index_file(folder, number) for number in range(spec.shards)]
    return sum(len(read_reasons(file)) for file in made if file.is_file())


def _claim(folder: Path, spec: FeatureSpec) -> None:
    """Writes the manifest, or checks that the one there says the same."""
    file = folder / MANIFEST
    if file.is_file():
        if differ := spec.differences(read_spec(folder)):
            lines = "\n  ".join(differ)
            raise DataError(f"{folder} holds other features; choose another folder or delete it:\n  {lines}")
        return
    content = json.dumps({"format": FORMAT, **dataclasses.asdict(spec)}, indent=1)
    _replace(file, lambda out: out.write(content.encode()))


def _replace(file: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            write(out)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _write_shard(
    folder: Path,
    number: int,
    source: Source,
    spec: FeatureSpec,
    encoders: Mapping[str, Encoder],
    batch_size: int,
    pool: concurrent.futures.Executor,
) -> None:
    first = number * spec.shard_samples
    samples = range(first, min(first + spec.shard_samples, spec.samples))
    examples: dict[int, Example] = {}
    reasons: dict[int, tuple[str, str]] = {}
    for sample in samples:
        try:
            examples[sample] = source.example(sample)
        except SampleError as error:
            reasons[sample] = (error.where, error.reason)
    wanted = {
        "target": lambda e: () if e.target_image is None else (e.target_image,),
        "image": lambda e: e.images,
    }
    rows: dict[str, dict[ImageSource, int]] = {}
    bad: dict[ImageSource, SampleError] = {}
    for kind in spec.shapes():
        images = dict.fromkeys(p for e in examples.values() for p in wanted[kind](e))
        rows[kind], values = _encode_all(list(images), kind, spec, encoders[kind], batch_size, pool, bad)
        _replace(array_file(folder, number, kind), lambda out, v=values: np.save(out, v))
    for sample, example in examples.items():
        error = next((bad[p] for kind in rows for p in wanted[kind](example) if p in bad), None)
        if error is not None:
            reasons[sample] = (example.where, f"{example.item_id}: {error}")
    good = {s: e for s, e in examples.items() if s not in reasons}
    found = {
        kind: [[rows[kind][p] for p in wanted[kind](good[s])] if s in good else [] for s in samples]
        for kind in rows
    }
    arrays: dict[str, np.ndarray] = {"reasons": np.array(json.dumps([[s, *r] for s, r in reasons.items()]))}
    if "target" in found:
        arrays["target"] = np.array([r[0] if r else -1 for r in found["target"]], np.int32)
    if "image" in found:
        arrays["image"] = np.array([row for r in found["image"] for row in r], np.int32)
        arrays["counts"] = np.array([len(r) for r in found["image"]], np.int32)
    _replace(index_file(folder, number), lambda out: np.savez(out, **arrays))


def _encode_all(
    images: Sequence[ImageSource],
    kind: str,
    spec: FeatureSpec,
    encoder: Encoder,
    batch_size: int,
    pool: concurrent.futures.Executor,
    bad: dict[ImageSource, SampleError],
) -> tuple[dict[ImageSource, int], np.ndarray]:
    """(image -> row, features by row, bf16 as u16); images that cannot be read go to ``bad``."""
    size = spec.target_size if kind == "target" else spec.image_size
    square = kind == "target" or spec.pad_input_square

    def read(image: ImageSource) -> np.ndarray | SampleError:
        try:
            return prepare_image(image, size, square=square, flip=False, as_shown=spec.images_as_shown)
        except SampleError as error:
            return error

    def submit(start: int) -> list[concurrent.futures.Future]:
        return [pool.submit(read, image) for image in images[start : start + batch_size]]

    rows: dict[ImageSource, int] = {}
    made: list[np.ndarray] = []
    ahead = submit(0)
    for start in range(0, len(images), batch_size):
        now, ahead = ahead, submit(start + batch_size)
        batch, filled = np.zeros((batch_size, size, size, 3), np.uint8), 0
        for image, future in zip(images[start:], now):
            pixels = future.result()
            if isinstance(pixels, SampleError):
                bad[image] = pixels
            else:
                batch[filled] = pixels
                rows[image] = len(rows)
                filled += 1
        if filled:
            made.append(np.asarray(encoder(batch))[:filled].astype(DTYPES[spec.dtype]))
    shape = spec.shapes()[kind]
    values = np.concatenate(made) if made else np.zeros((0, *shape), DTYPES[spec.dtype])
    if values.shape[1:] != shape:
        raise DataError(f"the {kind} encoder gives features of {values.shape[1:]}, the store holds {shape}")
    return rows, values.view(np.uint16) if spec.dtype == "bfloat16" else values
