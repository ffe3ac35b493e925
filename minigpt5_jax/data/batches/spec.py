"""Static shapes of a batch, and a batch of padding in them."""

from __future__ import annotations

import dataclasses

import numpy as np

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.templates import IGNORE


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Static shapes of a row that holds its samples as a tree.

    Attributes:
      length: positions of a sample, BOS included; longer ones are cut by the template's rule.
      images: input images of a sample, which keeps its last ones.
      image_places: places of a row where images are read; several may read the same.
      labels: label slots of a row.
    """

    length: int
    images: int
    image_places: int
    labels: int


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Static shapes of a micro-batch, all processes together.

    Attributes:
      rows: rows b.
      length: positions t of a row, BOS included; longer samples are cut by the template's rule.
      items: slots m of target images, one for each sample, or 0 for text only.  Of trees a multiple of the
        rows: only samples that draw have one.
      images: input images i, a multiple of the samples; each keeps its last ``images / samples``.  Of trees a
        multiple of the rows.
      targets: label slots l of a sample, at most ``length``; 3 for captions (``[IMG0]``, ``[IMG7]``,
        ``###``).
      image_size, target_size: sides in pixels of input and target images.
      caption_length: CLIP ids c of a caption.
      num_vokens: vokens of a target image.
      image_tokens: positions of an input image.
      pack: samples of a row, each a segment of its own; ``rows * pack`` samples in all.
      split: rows hold prompts and every sample ends in vokens, which stand apart (``Batch.prompt_end``).
      tree: each row holds its ``pack`` samples as a tree (``Batch.subtree_end``); None: one after another.
      target_moments: (h, w, 2c) where targets come as precomputed moments, None where they are images.
      image_states: (q, c) where input images come as ready states, None where they are images.
      moments_dtype, states_dtype: of precomputed features, ``float32`` or ``bfloat16``.
    """

    rows: int
    length: int
    items: int
    images: int
    targets: int
    image_size: int
    target_size: int
    caption_length: int = 77
    num_vokens: int = 8
    image_tokens: int = 32
    pack: int = 1
    split: bool = False
    tree: TreeSpec | None = None
    target_moments: tuple[int, ...] | None = None
    image_states: tuple[int, ...] | None = None
    moments_dtype: str = "float32"
    states_dtype: str = "float32"

    def __post_init__(self):
        if self.rows < 1 or self.length < 2:
            raise DataError(f"a batch has at least 1 row of 2 positions; got {self.rows} of {self.length}")
        if self.pack < 1:
            raise DataError(f"a row has at least 1 sample, got pack = {self.pack}")
        if not 1 <= self.targets <= self.length:
            raise DataError(f"targets must be 1 ... length = {self.length}, got {self.targets}")
        if self.tree is not None:
            if self.items % self.rows or self.images % self.rows or self.split:
                raise DataError(
                    f"a tree has its own items and images in each row: {self.items} and {self.images} do not "
                    f"divide over {self.rows} rows, or vokens stand apart"
                )
            return
        if self.items not in (0, self.samples):
            raise DataError(f"items = {self.items} is neither 0 nor one for each of {self.samples} samples")
        if self.split and not self.items:
            raise DataError("a batch without images to draw cannot be split into prompts and vokens")
        if self.images < 0 or self.images % self.samples:
            raise DataError(f"images = {self.images} is no multiple of the {self.samples} samples")

    @property
    def samples(self) -> int:
        """Samples of a micro-batch."""
        return self.rows * self.pack

    @property
    def apart(self) -> int:
        """Positions of a sample that stand outside of its row: vokens and the token after them."""
        return self.num_vokens + 1 if self.split else 0

    @property
    def sample_images(self) -> int:
        """Input images that a sample may read."""
        return self.images // self.samples if self.tree is None else self.tree.images

    @property
    def image_places(self) -> int:
        """Places p of a micro-batch where input images are read."""
        return self.images if self.tree is None else self.rows * self.tree.image_places

    def bucket(self, length: int, images: int) -> BatchSpec:
        """Shapes for samples of at most ``length`` positions and ``images`` input images each."""
        images = min(images, self.images // self.samples) * self.samples
        return dataclasses.replace(self, length=length, images=images, targets=min(self.targets, length))

    def part(self, count: int) -> BatchSpec:
        """Shapes of one of ``count`` equal parts (a process's share); DataError where rows do not divide."""
        if self.rows % count:
            raise DataError(f"{self.rows} rows of a micro-batch cannot be shared among {count} processes")
        sizes = {name: getattr(self, name) // count for name in ("rows", "items", "images")}
        return dataclasses.replace(self, **sizes)


def empty_arrays(spec: BatchSpec) -> dict[str, np.ndarray]:
    """Fields of a batch without samples: padding everywhere, every mask False."""
    b, t, m, i, c = spec.rows, spec.length, spec.items, spec.images, spec.caption_length
    ints = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    lines, targets = (m, spec.targets) if spec.split else (b, spec.pack * spec.targets)
    places, trees = spec.image_places, {}
    if spec.tree is not None:
        targets = spec.tree.labels
        trees = {"subtree_end": ints(b, t), "before": ints(b, t), "image_index": ints(places)}
    ready, pixels = {}, {"target": spec.target_size, "images": spec.image_size}
    for name, field, count, shape, dtype in (
        ("target", "target_moments", m, spec.target_moments, spec.moments_dtype),
        ("images", "image_states", i, spec.image_states, spec.states_dtype),
    ):
        if shape is not None:
            ready[field], pixels[name] = np.zeros((count, *shape), dtype), 0
    return {
        "tokens": ints(b, t),
        "labels": np.full((lines, spec.apart + 1 if spec.split else t), IGNORE, np.int32),
        "label_positions": ints(lines, targets),
        "positions": ints(b, t),
        "segment_ids": ints(b, t),
        "row_id": ints(b),
        "images": np.zeros((i, pixels["images"], pixels["images"], 3), np.uint8),
        "image_row": ints(places),
        "image_start": ints(places),
        "image_mask": np.zeros(places, bool),
        "target": np.zeros((m, pixels["target"], pixels["target"], 3), np.uint8),
        "voken_row": ints(m),
        "voken_start": np.ones(m, np.int32),  # the mapper reads one position before
        "item_id": ints(m),
        "item_mask": np.zeros(m, bool),
        "caption_ids": ints(m, c),
        "caption_mask": ints(m, c),
        "has_caption": np.zeros(m, bool),
        **({"prompt_end": np.ones(m, np.int32)} if spec.split else {}),
        **trees,
        **ready,
    }
