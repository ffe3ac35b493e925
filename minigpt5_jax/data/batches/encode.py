"""An example as numbers: tokens by the template's rules, images as pixels or as the features kept of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8

from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import FLIP_MODES, ImageSource, draw_flip, draw_flips, image_name, prepare_image
from minigpt5_jax.data.samples.example import Example, Ready
from minigpt5_jax.data.sources.features import FeatureStore, image_id
from minigpt5_jax.data.text.templates import TokenizedSample, expand
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN, CaptionTokenizer, LanguageTokenizer


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
    example: Example,
    config: EncodeConfig,
    key: tuple[int, ...],
    shared_key: tuple[int, ...] | None = None,
    *,
    named: bool = True,
) -> tuple[int | None, tuple[int, ...]]:
    """Keys of the image to draw and of the input images: which it is, in the lowest bit whether mirrored.

    Args:
      key, shared_key: as of :func:`encode` and :class:`Shared`.
      named: whether to tell which image it is, at the cost of a hash of its bytes, where mirrors do not need
        that.
    """
    target = example.target_image
    once = config.flip_mode == "independent" and not config.flip_each_epoch
    ids = [
        0
        if image is None or isinstance(image, Ready) or not (named or once)
        else image_id(image, config.image_root)
        for image in (target, *example.images)
    ]
    if once:
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
    named = config.features is not None
    target_key, image_keys = feature_keys(example, config, key, shared and shared.key, named=named)
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
