"""Precomputed features of a run's images: made once, read by every step (performance: a third of stage 1).

    python -m minigpt5_jax.prepare features --config configs/stage1.py --output features/cc3m

runs the VAE's encoder over every target image and, where the configuration reads images, the vision
tower and the Q-Former over every input image.  Training takes them with ``data.features=FOLDER`` and
``data.flip_mode=off``.  Format and checks: :mod:`minigpt5_jax.data.sources.features`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.batches.collate import BatchSpec
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.feature_writer import Encoder, write_features
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.sources.features import (
    FeatureSource,
    FeatureSpec,
    FeatureStore,
    image_fingerprint,
    read_spec,
)
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.training.provenance import hash_parameters
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.wiring.model import ModelSpec, build, load_frozen

KINDS = {"target": "generator", "image": "backbone"}
"""Kind of feature -> the part whose frozen towers make it (``Part.features``)."""


def feature_kinds(config: ConfigDict, spec: ModelSpec) -> list[str]:
    """The features a configuration has use for: input images only where it reads any."""
    reads = bool(spec.backbone.image_tokens and config.data.max_images)
    return ["target", "image"] if reads else ["target"]


def load_towers(config: ConfigDict, spec: ModelSpec, kind: str) -> tuple[Params, dict[str, str]]:
    """(the leaves that make one kind of feature, tower -> hash of those of them that are its)."""
    part = spec.parts[KINDS[kind]]
    loaded = load_frozen(config, spec, only=part.features.keys())
    params, hashes = {}, {}
    for tower, starts in part.features.items():
        prefixes = tuple(part.prefix + start for start in starts)
        leaves = {path: value for path, value in loaded.items() if path.startswith(prefixes)}
        digests = hash_parameters(leaves)
        hashes[tower] = "+".join(digests[name] for name in sorted(digests))
        params |= leaves
    return params, hashes


def _make(model: Any, kind: str) -> Callable[[jax.Array], jax.Array]:
    """What makes one kind of feature of images."""
    return model.generator.moments if kind == "target" else model.backbone.image_states


def make_encoder(template: Template, kind: str, params: Mapping[str, jax.Array]) -> Encoder:
    """The jitted towers of one kind of feature: u8[n H W 3] -> f32[n ...].

    Args:
      params: leaves that take part; the model's others need not exist.
    """

    def encode(params: Params, images: jax.Array) -> jax.Array:
        model = template.bind({**template.shapes, **params})
        return _make(model, kind)(images).astype(jnp.float32)

    compiled = jax.jit(encode)
    return lambda images: compiled(params, images)


def feature_shapes(config: ConfigDict, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Kind of feature (:func:`feature_kinds`) -> shape of one."""

    def shape_of(kind: str) -> tuple[int, ...]:
        size = spec.generator.image_size if kind == "target" else spec.backbone.image_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        call = jax.eval_shape(
            lambda params, x: _make(spec.template.bind(params), kind)(x), spec.template.shapes, images
        )
        return call.shape[1:]

    return {kind: shape_of(kind) for kind in feature_kinds(config, spec)}


def feature_spec(
    config: ConfigDict, spec: ModelSpec, source: Source, hashes: Mapping[str, str], *, dtype: str
) -> FeatureSpec:
    """What a store for this configuration and source holds: input images where it reads any."""
    shapes = feature_shapes(config, spec)
    return FeatureSpec(
        image_fingerprint=image_fingerprint(source),
        samples=len(source),
        towers=dict(hashes),
        target=shapes["target"],
        image=shapes.get("image"),
        target_size=spec.generator.image_size,
        image_size=spec.backbone.image_size,
        pad_input_square=config.data.pad_input_square,
        images_as_shown=config.data.images_as_shown,
        dtype=dtype,
    )


def prepare_features(
    config: ConfigDict,
    source: Source,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    batch_size: int = 16,
    threads: int = 8,
) -> str:
    """Makes the store of a configuration; an interrupted run continues with the same call.

    Args:
      source: the training samples of ``config``.
      folder: of the store.
      dtype: of stored numbers: ``bfloat16`` (65 kB a 512-pixel target) or ``float32``.
      batch_size: images in one call of a tower.
      threads: that decode images meanwhile.

    Returns:
      A line that says what was made.

    Raises:
      ConfigError, WeightFileError, WeightTableError: a tower cannot be read.
      DataError: the folder holds features of other images or towers; contexts are thinned.
    """
    _check_contexts(config)
    spec = build(config)
    kinds = feature_kinds(config, spec)
    towers = {kind: load_towers(config, spec, kind) for kind in kinds}
    hashes = {name: digest for _, digests in towers.values() for name, digest in digests.items()}
    store = feature_spec(config, spec, source, hashes, dtype=dtype)
    missing = write_features(
        folder,
        source,
        store,
        {kind: make_encoder(spec.template, kind, params) for kind, (params, _) in towers.items()},
        batch_size=batch_size,
        threads=threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return f"features of {store.samples - missing:,} samples in {folder}; {missing:,} samples are unusable"


def open_features(config: ConfigDict, spec: ModelSpec, source: Source, folder: str | Path) -> FeatureSource:
    """The samples of ``source`` with their features, which are those of its images by this run's towers.

    A tower that the run does not use (``spec.unused``), for the features stand in its place, need not be
    there: without it a warning says that nothing was compared.

    Raises:
      DataError: they are not, with both fingerprints; mirrors or thinned contexts are asked for; no
        finished store.
    """
    _check_contexts(config)
    if config.data.flip_mode != "off":  # also of callers that have no validated configuration
        raise DataError(
            "precomputed features are of images as they are, never mirrored; set data.flip_mode=off, it is "
            f"{config.data.flip_mode!r}"
        )
    store, hashes = FeatureStore(folder), {}
    for kind in store.spec.shapes():
        hashes |= _hashes(config, spec, store.spec, kind)
    store.check(feature_spec(config, spec, source, hashes, dtype=store.spec.dtype))
    return FeatureSource(source, store)


def _hashes(config: ConfigDict, spec: ModelSpec, stored: FeatureSpec, kind: str) -> dict[str, str]:
    """Hashes of the towers that make one kind of feature; as stored where an unused one cannot be read."""
    try:
        return load_towers(config, spec, kind)[1]
    except (ConfigError, WeightFileError) as error:
        towers = spec.parts[KINDS[kind]].features.keys()
        if not spec.unused.issuperset(towers):
            raise
        reason = str(error).splitlines()[0]
        logging.warning(
            "features of %s are taken to be those of this run's weights.%s, which cannot be compared (%s)",
            kind,
            " and weights.".join(towers),
            reason,
        )
        return {name: stored.towers[name] for name in towers}


def _check_contexts(config: ConfigDict) -> None:
    """Refuse ``data.context_dropout``: it reads other images each epoch, a store has each sample's once."""
    if config.data.context_dropout:
        raise DataError(
            "precomputed features are of whole contexts, the same each epoch; set data.context_dropout=0, "
            f"it is {config.data.context_dropout}"
        )


def with_features(batch: BatchSpec, store: FeatureSpec) -> BatchSpec:
    """Shapes of a batch that holds a store's features in the place of images."""
    return dataclasses.replace(
        batch,
        target_moments=store.target if batch.items else None,
        image_states=store.image if batch.images else None,
        feature_dtype=store.dtype,
    )


def with_planned_features(config: ConfigDict, spec: ModelSpec, batch: BatchSpec) -> BatchSpec:
    """Shapes of a training batch: with the features of ``data.features``, where the run reads any.

    For a store that is not there yet, those that ``prepare features`` will make; without it
    :func:`open_features` refuses to train.
    """
    if not config.data.features:
        return batch
    try:
        return with_features(batch, read_spec(config.data.features))
    except DataError:
        shapes = feature_shapes(config, spec)
        return dataclasses.replace(batch, target_moments=shapes["target"], image_states=shapes.get("image"))
