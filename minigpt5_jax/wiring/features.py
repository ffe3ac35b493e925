"""Precomputed features of a run's images: made once, read by every step (performance: a third of stage 1).

    python -m minigpt5_jax.prepare features --config configs/stage1.py --output features/cc3m

runs the VAE's encoder over every target image and, where the configuration reads images, the vision
tower and the Q-Former over every input image.  Training takes them with ``data.features=FOLDER``, or makes
them while its first epoch reads the images (``data.cache=on``, :mod:`minigpt5_jax.wiring.feature_cache`).
Format and checks: :mod:`minigpt5_jax.data.sources.features`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from minigpt5_jax.data.batches.image_index import ImageIndex, image_index
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.feature_writer import (
    Encoder,
    FeatureWriter,
    claim,
    room_for,
    write_missing,
)
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.sources.features import (
    FeatureSpec,
    FeatureStore,
    check_folder,
    image_fingerprint,
)
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.distributed import main_process
from minigpt5_jax.training.sharding import make_mesh, replicated
from minigpt5_jax.wiring.inputs import encode_config
from minigpt5_jax.wiring.model import ModelSpec, build, hash_frozen, load_frozen

KINDS = {"target": "generator", "image": "backbone"}
"""Kind of feature -> the part whose frozen towers make it (``Part.features``)."""


def plans_features(config: ConfigDict) -> bool:
    """Whether a run reads features of its training images in the place of pixels, where the disk has room."""
    return bool(config.data.features) or (config.data.cache == "on" and not why_no_cache(config))


def why_no_cache(config: ConfigDict) -> str:
    """What in a configuration gives its images another form in each epoch; empty where nothing does."""
    data = config.data
    if data.flip_each_epoch and data.flip_mode != "off":
        return "data.flip_each_epoch=True draws mirrors again"
    if data.context_dropout:
        return f"data.context_dropout={data.context_dropout} chooses other images"
    return ""


def feature_kinds(config: ConfigDict, spec: ModelSpec) -> list[str]:
    """The features a configuration has use for: of images that it reads, by towers that do not train."""
    used = {
        "target": bool(set(spec.options.loss.weights) - {"text", "caption"}),
        "image": bool(spec.backbone.image_tokens and config.data.max_images),
    }
    return [kind for kind, use in used.items() if use and not _trains(spec, kind)]


def _trains(spec: ModelSpec, kind: str) -> bool:
    """Whether a tower that makes features of this kind is trained itself."""
    part = spec.parts[KINDS[kind]]
    starts = tuple(part.prefix + start for starts in part.features.values() for start in starts)
    return any(path.startswith(starts) for path, group in spec.labels.items() if group != FROZEN)


def encoder_bytes(config: ConfigDict, spec: ModelSpec, shardings: Mapping[str, Sharding]) -> int:
    """Bytes of a device for towers that write features in the first epoch, without what a step has whole."""
    starts = tuple(
        part.prefix + start
        for part in (spec.parts[KINDS[kind]] for kind in feature_kinds(config, spec))
        for starts in part.features.values()
        for start in starts
    )
    return sum(
        math.prod(shape.shape) * shape.dtype.itemsize
        for path, shape in spec.template.shapes.items()
        if path.startswith(starts)
        and (path in spec.template.absent or not shardings[path].is_fully_replicated)
    )


def load_towers(config: ConfigDict, spec: ModelSpec, kind: str) -> tuple[Params, dict[str, str]]:
    """(the leaves that make one kind of feature, tower -> hash of those of them that are its)."""
    part = spec.parts[KINDS[kind]]
    loaded = load_frozen(config, spec, only=part.features.keys())
    params, hashes = {}, {}
    for tower, starts in part.features.items():
        prefixes = tuple(part.prefix + start for start in starts)
        leaves = {path: value for path, value in loaded.items() if path.startswith(prefixes)}
        digests = hash_frozen(config, spec, leaves)  # of the files: int8 values differ between devices
        methods = {spec.template.quantized[path].method for path in leaves if path in spec.template.quantized}
        hashes[tower] = "+".join([digests[name] for name in sorted(digests)] + sorted(methods))
        params |= leaves
    return params, hashes


def _make(model: Any, kind: str) -> Callable[[jax.Array], jax.Array]:
    """What makes one kind of feature of images."""
    return model.generator.moments if kind == "target" else model.backbone.image_states


def make_encoder(template: Template, kind: str, params: Mapping[str, jax.Array]) -> Encoder:
    """The jitted towers of one kind of feature, rows over this process's devices: u8[n H W 3] -> f32[n ...].

    Args:
      params: leaves that take part; the model's others need not exist.
    """

    def encode(params: Params, images: jax.Array) -> jax.Array:
        model = template.bind({**template.shapes, **params})
        return _make(model, kind)(images).astype(jnp.float32)

    mesh = make_mesh(devices=jax.local_devices())
    rows, compiled = NamedSharding(mesh, P("data")), jax.jit(encode)
    here = {path: _local(value, replicated(mesh)) for path, value in params.items()}

    def run(images: np.ndarray) -> np.ndarray:
        padding = np.zeros((-len(images) % mesh.size, *images.shape[1:]), images.dtype)
        with jax.set_mesh(mesh):
            made = compiled(here, jax.device_put(np.concatenate([images, padding]), rows))
        return np.asarray(made)[: len(images)]

    return run


def _local(value: jax.Array, everywhere: NamedSharding) -> jax.Array:
    """A parameter on every device of this process, of an array that other processes may have too."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        parts = [shard.data for shard in value.addressable_shards]
        return jax.make_array_from_single_device_arrays(value.shape, everywhere, parts)
    return jax.device_put(value, everywhere)


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
    config: ConfigDict, spec: ModelSpec, source: Source, hashes: Mapping[str, str]
) -> FeatureSpec:
    """What a store for this configuration and source holds.

    Moments leave the VAE in ``model.dtype`` and the Q-Former's states in fp32 (fidelity 1.13): they are
    stored so, and lose nothing.
    """
    shapes = feature_shapes(config, spec)
    return FeatureSpec(
        image_fingerprint=image_fingerprint(source),
        samples=len(source),
        towers=dict(hashes),
        target=shapes.get("target"),
        image=shapes.get("image"),
        target_size=spec.generator.image_size,
        image_size=spec.backbone.image_size,
        pad_input_square=config.data.pad_input_square,
        images_as_shown=config.data.images_as_shown,
        target_dtype=config.model.dtype,
        compute_dtype=config.model.dtype,
    )


def images_of(config: ConfigDict, spec: ModelSpec, source: Source) -> ImageIndex:
    """Which images the training samples have, mirrored as training mirrors them.

    The main process lists them and the others read its file: a listing may read every image.
    """

    def listed() -> ImageIndex:
        return image_index(
            source,
            encode_config(config, spec.sizes, training=True),
            seed=config.run.seed,
            trees=config.data.packing == "tree",
            folder=config.data.index_cache,
        )

    if jax.process_count() == 1:
        return listed()
    try:
        if main_process():
            listed()
    finally:
        multihost_utils.sync_global_devices("list of images")
    return listed()


def prepare_features(
    config: ConfigDict,
    source: Source,
    folder: str | Path,
    *,
    tell: Callable[[str], None] = print,
    batch_size: int = 16,
    threads: int = 8,
) -> str:
    """Makes the store of a configuration; an interrupted run continues with the same call.

    Args:
      source: the training samples of ``config``.
      folder: of the store.
      tell: gets a line with the size before anything is written.
      batch_size: images in one call of a tower.
      threads: that decode images meanwhile.

    Returns:
      A line that says what was made.

    Raises:
      ConfigError, WeightFileError, WeightTableError: a tower cannot be read.
      DataError: the folder holds features of other images or towers; images differ between epochs; the disk
        is too small.
    """
    check_fixed(config)
    spec, folder = build(config), Path(folder)
    towers = {kind: load_towers(config, spec, kind) for kind in feature_kinds(config, spec)}
    if not towers:
        raise DataError("no loss of this configuration reads an image, so there are no features to prepare")
    hashes = {name: digest for _, digests in towers.values() for name, digest in digests.items()}
    wanted = feature_spec(config, spec, source, hashes)
    check_folder(folder, wanted)
    index, store = images_of(config, spec, source), FeatureStore(folder, wanted)
    fits, words = room_for(index, store)
    if not fits:
        raise DataError(f"the disk is too small for {words}; free some, or name a folder on another disk")
    tell(words)
    claim(folder, wanted)
    writer = FeatureWriter(store)
    bad = write_missing(
        source,
        index,
        store,
        writer,
        {kind: make_encoder(spec.template, kind, params) for kind, (params, _) in towers.items()},
        batch_size=batch_size,
        threads=threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    writer.close()
    store.refresh()
    return f"features of {len(store):,} images in {folder}; {bad:,} images are unusable"


def check_fixed(config: ConfigDict) -> None:
    """DataError where images have another form in each epoch, so that features cannot be kept of them."""
    if reason := why_no_cache(config):
        raise DataError(
            f"precomputed features are of the same images in each epoch, and {reason}; "
            "set data.flip_each_epoch=False and data.context_dropout=0"
        )


def with_planned_features(config: ConfigDict, spec: ModelSpec, batch: BatchSpec) -> BatchSpec:
    """Shapes of a training batch with the features that the configuration has use for."""
    shapes = feature_shapes(config, spec)
    return dataclasses.replace(
        batch,
        target_moments=shapes.get("target") if batch.items else None,
        image_states=shapes.get("image") if batch.images else None,
        moments_dtype=config.model.dtype,
    )
