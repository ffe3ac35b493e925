"""Examples to one numpy Batch of static shapes, every index worked out on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from minigpt5_jax.data.batches.tree import image_keys, plant
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import FLIP_MODES, ImageSource, draw_flip, draw_flips, image_name, prepare_image
from minigpt5_jax.data.samples.example import Example, Ready
from minigpt5_jax.data.sources.features import FeatureStore, image_id
from minigpt5_jax.data.text.templates import IGNORE, TokenizedSample, expand
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN, CaptionTokenizer, LanguageTokenizer


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


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How an :class:`Example` becomes numbers.

    Attributes:
      tokenizer: of the language model.
      caption_tokenizer: of the image generator's text encoder.
      flip_mode: mirrors of training images: ``independent``, ``shared`` or ``off`` (quirk Q17).
      pad_input_square: white square around input images too (quirk Q30; the demo did).
      truncation: ``left_history`` or ``right`` (quirk Q23).
      mask_all_inner_vokens: see :func:`~minigpt5_jax.data.text.templates.label_ids` (quirk Q1).
      strict_image_count: a sample with more images than placeholders is unusable; else the surplus is
        ignored, as the original did (quirk Q31).  Fewer images than placeholders never pass.
      images_as_shown: images are turned by EXIF and on white where transparent; the original drops both.
      flip_each_epoch: mirrors are drawn again in each epoch, as the original's; else once for each image, or
        for each sample where the mode is ``shared``.
      image_root: what the names of images begin with (``Source.image_root``).
      features: where the features of images are, if any are kept.
    """

    tokenizer: LanguageTokenizer
    caption_tokenizer: CaptionTokenizer
    flip_mode: str = "off"
    pad_input_square: bool = False
    truncation: str = "left_history"
    mask_all_inner_vokens: bool = False
    strict_image_count: bool = True
    images_as_shown: bool = True
    flip_each_epoch: bool = False
    image_root: str = ""
    features: FeatureStore | None = None

    def __post_init__(self):
        if self.flip_mode not in FLIP_MODES:
            raise DataError(f"flip_mode must be one of {', '.join(FLIP_MODES)}; got {self.flip_mode!r}")

    def check(self, spec: BatchSpec) -> None:
        """DataError where tokenizers and shapes do not go together."""
        if self.tokenizer.num_vokens != spec.num_vokens:
            raise DataError(f"tokenizer has {self.tokenizer.num_vokens} vokens, the batch {spec.num_vokens}")
        if self.caption_tokenizer.max_length != spec.caption_length:
            raise DataError(
                f"caption tokenizer pads to {self.caption_tokenizer.max_length} ids, the batch has "
                f"caption_length = {spec.caption_length}"
            )
        if self.features is not None and self.flip_each_epoch and self.flip_mode != "off":
            raise DataError(
                "features are kept of images that are mirrored once; set data.flip_each_epoch=False"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Uncached:
    """Pixels of an image whose features are still to be made, and the key to keep them by."""

    key: int
    pixels: UInt8[np.ndarray, "H H 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """An encoded example: i images read, at most one drawn, as pixels, features or pixels to make them of."""

    text: TokenizedSample
    images: tuple[UInt8[np.ndarray, "h h 3"] | Float[np.ndarray, "q s"] | Uncached, ...]
    target: UInt8[np.ndarray, "H H 3"] | Float[np.ndarray, "y x c2"] | Uncached | None
    caption_ids: Int32[np.ndarray, " c"]
    caption_mask: Int32[np.ndarray, " c"]
    has_caption: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What the samples of a tree have in common.

    Attributes:
      key: names the draw of their input images' mirrors, as ``key`` of :func:`encode`.
      values: everything an image depends on -> its values, so that one is decoded once and known again.
    """

    key: tuple[int, ...]
    values: dict[Any, np.ndarray | Uncached] = dataclasses.field(default_factory=dict)


def feature_keys(
    example: Example, config: EncodeConfig, key: tuple[int, ...], shared_key: tuple[int, ...] | None = None
) -> tuple[int | None, tuple[int, ...]]:
    """Keys of the image to draw and of the input images: which it is, in the lowest bit whether mirrored.

    Args:
      key, shared_key: as of :func:`encode` and :class:`Shared`.
    """
    target = example.target_image
    ids = [
        0 if image is None or isinstance(image, Ready) else image_id(image, config.image_root)
        for image in (target, *example.images)
    ]
    if config.flip_mode == "independent" and not config.flip_each_epoch:
        flips = [draw_flip(key[0], "image" if place else "target", one) for place, one in enumerate(ids)]
    else:
        if not config.flip_each_epoch:
            key, shared_key = (one and (one[0], *one[2:]) for one in (key, shared_key))
        drawn = draw_flips(config.flip_mode, key, len(example.images), shared_key)
        flips = [drawn.target, *drawn.images]
    first, *others = (one | flip for one, flip in zip(ids, flips, strict=True))
    return None if target is None else first, tuple(others)


def encode(
    example: Example,
    config: EncodeConfig,
    spec: BatchSpec,
    key: tuple[int, ...],
    limit: int | None = None,
    shared: Shared | None = None,
) -> Sample:
    """Tokenises an example and decodes its images.

    Args:
      key: names the draw of its mirrors, (seed, epoch, place in the source).
      limit: positions it may take; all of a row by default.
      shared: of the samples of its row, where it is a tree.

    Raises:
      SampleError: an image cannot be read, or placeholders and images differ in number (quirk Q31).
      DataError: the example has input images and the batch no room for any.
    """
    placeholders, images = example.source.count(IMAGE_TOKEN), len(example.images)
    if images and not spec.images:
        raise DataError(
            f"{example.where}: {example.item_id} reads {images} images, but a row has room for none; set "
            "data.max_images (and give a backbone that sees)"
        )
    if placeholders > images or (config.strict_image_count and placeholders < images):
        counts = f"{placeholders} image placeholders and {images} images"
        raise SampleError(example.where, f"{example.item_id} has {counts}")
    text = expand(
        config.tokenizer,
        example.source,
        example.target,
        image_tokens=spec.image_tokens,
        max_length=spec.length if limit is None else limit,
        max_images=spec.sample_images,
        max_targets=spec.targets,
        truncation=config.truncation,
        mask_all_inner_vokens=config.mask_all_inner_vokens,
    )
    if (text.voken_start is None) != (example.target_image is None):
        raise SampleError(example.where, f"{example.item_id} must have vokens exactly where it has a target")
    if example.target_image is not None and not spec.items:
        raise SampleError(example.where, f"{example.item_id} draws an image, the batch holds text only")
    target_key, image_keys = feature_keys(example, config, key, shared and shared.key)
    seen = None if shared is None else shared.values
    target = None
    try:
        images = tuple(
            _values(example.images[i], "image", image_keys[i], config, spec, seen) for i in text.images
        )
        if example.target_image is not None:
            target = _values(example.target_image, "target", target_key, config, spec, seen)
    except SampleError as error:
        raise SampleError(example.where, f"{example.item_id}: {error}") from None
    ids, mask = config.caption_tokenizer.encode([example.caption or ""])
    return Sample(text, images, target, ids[0], mask[0], example.caption is not None and target is not None)


def _values(
    image: ImageSource | Ready,
    kind: str,
    key: int,
    config: EncodeConfig,
    spec: BatchSpec,
    seen: dict[Any, np.ndarray | Uncached] | None,
) -> np.ndarray | Uncached:
    """Pixels of an image, or its features where the batch wants these; DataError where it cannot have them.

    ``seen`` has those that were made before, so that equal images are one object.
    """
    ready = spec.target_moments if kind == "target" else spec.image_states
    if isinstance(image, Ready):
        if image.values.shape != ready:
            wants = f"features of shape {ready}" if ready else "images"
            raise DataError(f"the batch holds {wants}, the data gives features of shape {image.values.shape}")
        return image.values if seen is None else seen.setdefault(image.values.tobytes(), image.values)
    if ready is not None and config.features is None:
        raise DataError(f"the batch holds precomputed features of shape {ready}, the data gives images")
    name = (kind, image, key)
    if seen is None:
        return _read(image, kind, key, config, spec, ready)
    if name not in seen:
        seen[name] = _read(image, kind, key, config, spec, ready)
    return seen[name]


def _read(
    image: ImageSource,
    kind: str,
    key: int,
    config: EncodeConfig,
    spec: BatchSpec,
    ready: tuple[int, ...] | None,
) -> np.ndarray | Uncached:
    """Features that are kept, else pixels."""
    if ready is not None:
        if (features := config.features.find(kind, key)) is not None:
            return features
        if config.features.complete:
            reason = (
                f"has no features in {config.features.folder}, as it could not be read when they were made"
            )
            raise SampleError(image_name(image), reason)
    pixels = prepare_image(
        image,
        spec.target_size if kind == "target" else spec.image_size,
        square=kind == "target" or config.pad_input_square,
        flip=bool(key & 1),
        as_shown=config.images_as_shown,
    )
    return pixels if ready is None else Uncached(key, pixels)


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


def collate(
    samples: Sequence[Sequence[Sample | None]],
    spec: BatchSpec,
    numbers: Int[np.ndarray, "r p"],
    config: EncodeConfig,
    first_row: int = 0,
    uncached: list[tuple[str, int, Uncached]] | None = None,
) -> dict[str, np.ndarray]:
    """Fields of a :class:`~minigpt5_jax.batch.Batch`: ``spec.rows`` rows of ``spec.pack`` samples.

    A place without a sample (None: it could not be read) is padding, its items and images masked out.
    Slots of items and images belong to places, so that what a row holds does not depend on its
    neighbours nor on how rows are shared among processes.

    Args:
      samples: by row and place.
      spec: shapes of this part of the batch.
      numbers: i64[r p] global number of each sample; it is the item's number too, and the first one of
        a row is the row's.
      first_row: row of the whole micro-batch where this part begins; ``image_row`` and ``voken_row``
        count from the whole's first row.
      uncached: takes (field, slot, image) of those whose features are still to be made; theirs are zeros.
    """
    if len(samples) != spec.rows or numbers.shape != (spec.rows, spec.pack):
        raise DataError(f"{len(samples)} rows and {numbers.shape} numbers for {spec.rows} x {spec.pack}")
    arrays, uncached = empty_arrays(spec), [] if uncached is None else uncached
    arrays["tokens"][:] = config.tokenizer.pad_id
    empty_ids, empty_mask = config.caption_tokenizer.encode([""])
    arrays["caption_ids"][:], arrays["caption_mask"][:] = empty_ids, empty_mask
    numbers = numbers % 2**31  # int32 on the device; distinct within any step
    arrays["row_id"][:] = numbers[:, 0]
    rows = first_row + np.arange(spec.rows)
    arrays["image_row"][:] = np.repeat(rows, spec.image_places // spec.rows)
    arrays["voken_row"][:] = np.repeat(rows, spec.items // spec.rows)
    if spec.tree is not None:
        for row, places in enumerate(samples):
            there = [(int(n), sample) for n, sample in zip(numbers[row], places) if sample is not None]
            _fill_tree(arrays, row, first_row, there, spec, uncached)
        return arrays
    if spec.items:
        arrays["item_id"][:] = numbers.ravel()
    if spec.split:
        arrays["voken_row"][:] = first_row * spec.pack + np.arange(spec.items)
    for row, places in enumerate(samples):
        start = 0  # of the next sample in its row
        for place, sample in enumerate(places):
            if sample is not None:
                slot = row * spec.pack + place
                length = len(sample.text.tokens) - spec.apart
                _fill_row(arrays, row, place, slice(start, start + length), sample)
                if spec.split:
                    _fill_continuation(arrays, slot, start + length, spec.apart, sample)
                else:
                    _fill_labels(arrays, row, place * spec.targets, start, sample.text.labels)
                _fill_images(arrays, slot * (spec.images // spec.samples), start, sample, uncached)
                if sample.target is not None:
                    _fill_item(arrays, slot, sample, uncached)
                    if not spec.split:
                        arrays["voken_start"][slot] = start + sample.text.voken_start
                start += length
    return arrays


def _fill_row(arrays: dict[str, np.ndarray], row: int, place: int, here: slice, sample: Sample) -> None:
    length = here.stop - here.start
    arrays["tokens"][row, here] = sample.text.tokens[:length]
    arrays["positions"][row, here] = np.arange(length)
    arrays["segment_ids"][row, here] = 1 + place


def _fill_labels(
    arrays: dict[str, np.ndarray], line: int, slot: int, start: int, labels: Int32[np.ndarray, " t"]
) -> None:
    """Labels of a sample from position ``start`` of a line on, their positions from ``slot`` on."""
    arrays["labels"][line, start : start + len(labels)] = labels
    found = np.flatnonzero(labels != IGNORE)
    arrays["label_positions"][line, slot : slot + len(found)] = start + found


def _fill_continuation(
    arrays: dict[str, np.ndarray], slot: int, end: int, apart: int, sample: Sample
) -> None:
    labels, start = sample.text.labels, sample.text.voken_start
    if start is None or len(labels) - start != apart or (labels[:start] != IGNORE).any():
        raise DataError(
            "a sample does not end in its vokens and one token after them; set data.split_vokens=False"
        )
    _fill_labels(arrays, slot, 0, 1, labels[start:])
    arrays["prompt_end"][slot] = end


def _fill_images(
    arrays: dict[str, np.ndarray], first: int, start: int, sample: Sample, uncached: list
) -> None:
    slots = slice(first, first + len(sample.images))
    for slot, values in enumerate(sample.images, first):
        _fill_values(arrays, "image_states", "images", slot, values, uncached)
    arrays["image_start"][slots] = start + np.asarray(sample.text.image_start, np.int32)
    arrays["image_mask"][slots] = True


def _fill_values(
    arrays: dict[str, np.ndarray],
    ready: str,
    pixels: str,
    slot: int,
    values: np.ndarray | Uncached,
    uncached: list,
) -> None:
    if isinstance(values, Uncached):
        uncached.append((ready, slot, values))
    else:
        arrays[ready if ready in arrays else pixels][slot] = values


def _fill_item(arrays: dict[str, np.ndarray], slot: int, sample: Sample, uncached: list) -> None:
    _fill_values(arrays, "target_moments", "target", slot, sample.target, uncached)
    arrays["item_mask"][slot] = True
    arrays["caption_ids"][slot] = sample.caption_ids
    arrays["caption_mask"][slot] = sample.caption_mask
    arrays["has_caption"][slot] = sample.has_caption


def _fill_tree(
    arrays: dict[str, np.ndarray],
    row: int,
    first_row: int,
    samples: list[tuple[int, Sample]],
    spec: BatchSpec,
    uncached: list,
) -> None:
    """A row whose samples (number, sample) are a tree; an item has its sample's number, as elsewhere."""
    images: dict[
        int, tuple[int, np.ndarray | Uncached]
    ] = {}  # id of an image's values -> its slot in the row, and they
    for _, sample in samples:
        for values in sample.images:
            images.setdefault(id(values), (len(images), values))
    slots = [[images[id(values)][0] for values in sample.images] for _, sample in samples]
    keys = [
        image_keys(sample.text.tokens, sample.text.image_start, own, spec.image_tokens)
        for (_, sample), own in zip(samples, slots, strict=True)
    ]
    tree, due, places = plant(keys), [], {}
    paths = [(sample.text, path) for (_, sample), path in zip(samples, tree.paths, strict=True)]
    for (text, path), own in zip(paths, slots, strict=True):
        due.extend(path[text.labels != IGNORE].tolist())  # a target of several samples counts for each
        places.update(zip(path[list(text.image_start)].tolist(), own, strict=True))
    items = [
        (path, number, sample)
        for (number, sample), path in zip(samples, tree.paths, strict=True)
        if sample.target is not None
    ]
    _check_room(spec, len(tree.before), len(due), len(items), len(images), len(places))

    for text, path in paths:
        arrays["tokens"][row, path], arrays["positions"][row, path] = text.tokens, np.arange(len(path))
        targets = text.labels != IGNORE
        arrays["labels"][row, path[targets]] = text.labels[targets]
    here = slice(0, len(tree.before))
    arrays["segment_ids"][row, here] = 1
    arrays["subtree_end"][row, here], arrays["before"][row, here] = tree.ends, tree.before
    arrays["label_positions"][row, : len(due)] = due
    first = row * (spec.items // spec.rows)
    for slot, (path, number, sample) in enumerate(items, first):
        _fill_item(arrays, slot, sample, uncached)
        arrays["item_id"][slot], arrays["voken_start"][slot] = number, path[sample.text.voken_start]
    first = row * (spec.images // spec.rows)
    for slot, values in images.values():
        _fill_values(arrays, "image_states", "images", first + slot, values, uncached)
    first_image = first_row * (spec.images // spec.rows) + first
    for place, (start, slot) in enumerate(places.items(), row * spec.tree.image_places):
        arrays["image_start"][place], arrays["image_index"][place] = start, first_image + slot
        arrays["image_mask"][place] = True


def _check_room(spec: BatchSpec, *sizes: int) -> None:
    """DataError where the tree of a story is larger than the index of its source said."""
    names = ("length", "target positions", "images to draw", "input images", "places of input images")
    per_row = (spec.items // spec.rows, spec.images // spec.rows)
    rooms = (spec.length, spec.tree.labels, *per_row, spec.tree.image_places)
    for name, size, room in zip(names, sizes, rooms, strict=True):
        if size > room:
            raise DataError(
                f"a story's tree has {name} {size}, its row has room for {room}: the words or images of the "
                "source are not those that were measured; set data.packing=shuffled"
            )
