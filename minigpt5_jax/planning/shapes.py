"""Shapes of a run's batches without its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from minigpt5_jax.data.batches.spec import BatchSpec, TreeSpec
from minigpt5_jax.planning.topology import PlanError
from minigpt5_jax.wiring.features import plans_features, with_planned_features
from minigpt5_jax.wiring.inputs import batch_spec, micro_batch, samples_a_row, splits_prompts
from minigpt5_jax.wiring.model import ModelSpec

CAPTIONS = ("cc3m", "cc3m_tar", "parquet", "shapes")
"""``data.format`` of samples that are words, then vokens."""
STORY_SAMPLES, STORY_ITEMS, STORY_IMAGES, STORY_PLACES = 13, 9, 5, 8
STORY_LENGTH, STORY_LABELS = 984, 195
"""A story of VIST as a tree: its samples, those that draw, images, places where one is read, positions and
labels, as the loader of ``configs/stage2_vist.py`` has them for the longest quarter of 96 drawn stories
(the shortest quarter has 848 and 127): ``python -m benchmarks.story_sizes``."""


def planned_shapes(
    config: ConfigDict, spec: ModelSpec, devices: Sequence[jax.Device], length: int = 0
) -> BatchSpec:
    """The largest micro-batch of a run, as its loader would make it; trees are those of VIST.

    Args:
      length: positions of a row, in the place of the longest.

    Raises:
      PlanError: rows cannot be so long, or micro-batches are not whole stories.
    """
    data = config.data
    samples = micro_batch(config)
    if data.packing == "tree":
        return _with_features(config, spec, _trees(config, spec, samples, length))
    split = splits_prompts(config, spec, ends_in_vokens=data.format in CAPTIONS)
    pack = samples_a_row(config, split, devices)
    shapes = batch_spec(config, spec, samples, pack, split)
    longest = data.max_length
    if data.buckets and (pack > 1 or split):
        longest = pack * max(2, data.max_length - shapes.apart)
    elif pack == 1:
        longest -= shapes.apart
    if length > longest:
        raise PlanError(f"--length={length}: rows of this run have at most {longest} positions")
    return _with_features(config, spec, shapes.bucket(length or longest, data.max_images))


def _with_features(config: ConfigDict, spec: ModelSpec, shapes: BatchSpec) -> BatchSpec:
    """The shapes with features in the place of images, where the run reads such."""
    return with_planned_features(config, spec, shapes) if plans_features(config) else shapes


def _trees(config: ConfigDict, spec: ModelSpec, samples: int, length: int) -> BatchSpec:
    if samples % STORY_SAMPLES:
        raise PlanError(
            f"data.packing=tree: {samples} samples of a micro-batch are not whole stories of "
            f"{STORY_SAMPLES}; make data.global_batch / data.accumulation a multiple of {STORY_SAMPLES}"
        )
    shapes = batch_spec(config, spec, samples, STORY_SAMPLES)
    images = min(STORY_IMAGES, config.data.max_images)
    tree = TreeSpec(
        config.data.max_length, config.data.max_images, STORY_PLACES if images else 0, STORY_LABELS
    )
    return dataclasses.replace(
        shapes,
        length=length or STORY_LENGTH,
        items=shapes.rows * STORY_ITEMS,
        images=shapes.rows * images,
        tree=tree,
    )
