"""Which images the samples of a source have: what a complete store of features holds.

Made once from all samples of an epoch, without decoding, and kept in a file named by what it depends on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64
from tqdm import tqdm

from minigpt5_jax.data.batches.encode import EncodeConfig, feature_keys
from minigpt5_jax.data.batches.lengths import kept_index
from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.sources.base import Source, stories_of
from minigpt5_jax.data.sources.features import FeatureStore


@dataclasses.dataclass(frozen=True, eq=False)
class ImageIndex:
    """Distinct images, mirrored and not apart, by their keys (:func:`feature_keys`), ascending.

    Attributes:
      target: u64[n] images to draw.  target_at: i64[n 2] a sample that has it, and 0.
      image: u64[m] input images.  image_at: i64[m 2] a sample that has it, and which of its images it is.
    """

    target: UInt64[np.ndarray, " n"]
    target_at: Int64[np.ndarray, "n 2"]
    image: UInt64[np.ndarray, " m"]
    image_at: Int64[np.ndarray, "m 2"]

    def keys(self, kind: str) -> UInt64[np.ndarray, " n"]:
        """Keys of ``target`` or ``image``."""
        return getattr(self, kind)

    def samples(self, kind: str) -> Int64[np.ndarray, " n"]:
        """A sample that has each of the images."""
        return getattr(self, f"{kind}_at")[:, 0]

    def missing(self, kind: str, store: FeatureStore) -> Int64[np.ndarray, " k"]:
        """Places in the index of images without features in the files of a store."""
        return np.flatnonzero(~store.has(kind, self.keys(kind)))

    def find(self, source: Source, kind: str, place: int) -> ImageSource:
        """The image at a place of the index; SampleError where its sample cannot be fetched."""
        sample, which = getattr(self, f"{kind}_at")[place].tolist()
        example = source.example(sample)
        return example.target_image if kind == "target" else example.images[which]


def image_index(
    source: Source, config: EncodeConfig, *, seed: int, trees: bool, folder: str | Path
) -> ImageIndex:
    """The index of a source, from its file in ``folder`` or made and left there.

    Args:
      seed: of the mirrors.
      trees: whether rows are whole stories, whose samples share mirrors (``flip_mode`` shared).

    Raises:
      DataError: the file is there and not readable.
    """
    config = dataclasses.replace(config, image_root=source.image_root)
    together = trees and config.flip_mode == "shared"
    depends = [source.fingerprint(), len(source), config.flip_mode, seed, together]
    return kept_index(ImageIndex, "images", depends, folder, lambda: _collect(source, config, seed, together))


def _collect(source: Source, config: EncodeConfig, seed: int, together: bool) -> ImageIndex:
    starts = stories_of(source) if together else None
    found: dict[str, dict[int, tuple[int, int]]] = {"target": {}, "image": {}}
    for sample in tqdm(range(len(source)), desc="listing images", delay=2, unit="sample"):
        shared = None
        if starts is not None:
            shared = (seed, 0, int(starts[np.searchsorted(starts, sample, side="right") - 1]))
        try:
            target, images = feature_keys(source.example(sample), config, (seed, 0, sample), shared)
        except SampleError:
            continue  # found again, named and counted when the sample is read
        if target is not None:
            found["target"].setdefault(target, (sample, 0))
        for which, key in enumerate(images):
            found["image"].setdefault(key, (sample, which))
    arrays = {}
    for kind, places in found.items():
        keys = np.fromiter(places, np.uint64, len(places))
        order = np.argsort(keys)
        arrays[kind] = keys[order]
        arrays[f"{kind}_at"] = np.array(list(places.values()), np.int64).reshape(-1, 2)[order]
    return ImageIndex(**arrays)
