"""Run files as configurations of a benchmark: as they stand, on cached moments and drawn samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.samples import Featured
from minigpt5_jax.config import validate
from minigpt5_jax.data.batches.pipeline import Loader
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.data.sources.features import FeatureStore
from minigpt5_jax.wiring.features import feature_spec
from minigpt5_jax.wiring.inputs import open_loader
from minigpt5_jax.wiring.model import ModelSpec

ROOT = Path(__file__).resolve().parents[1]


def read_run_file(name: str, variant: str = "") -> ConfigDict:
    """The configuration of ``configs/NAME.py``, or of a variant; ConfigError for one it has not."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant or None)


def on_drawn_samples(config: ConfigDict, cache: str, **changes: Any) -> ConfigDict:
    """The configuration with what drawn samples and ready moments need, and nothing else changed.

    Args:
      cache: folder for the index of lengths.  changes: dotted key (``__`` for a dot) -> value.
    """
    config.weights.update(tokenizer="shapes", clip_tokenizer="shapes")
    config.data.update(train="drawn", worker_count=0, flip_mode="off", index_cache=cache)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return validate(config)


def loader_of(
    config: ConfigDict, spec: ModelSpec, source: Source, moments: np.ndarray | None = None
) -> Loader:
    """Training batches of drawn samples on ready features, in the buckets or packed as configured."""
    described = feature_spec(config, spec, source, {})
    store = FeatureStore("given", described)  # an empty one: the samples have their features
    return open_loader(config, spec, Featured(source, described, moments), training=True, features=store)


def shapes_of(tree: Any) -> Any:
    """The tree with its arrays as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
