"""From a checkpoint back to a model: for generation, and for a stage that starts from another.

A checkpoint holds what training changed; frozen weights are read from their sources again and
compared by hash, so that a picture never comes from other weights than it was trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from minigpt5_jax.build import (
    NEW_PARTS,
    ModelSpec,
    build,
    caption_tokenizer,
    check_sources,
    llm_tokenizer,
    load_frozen,
)
from minigpt5_jax.config import get_config
from minigpt5_jax.data.tokenizer import LlamaTokenizer
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import (
    CheckpointError,
    check_compatible,
    describe_run,
    hash_parameters,
)
from minigpt5_jax.tuning import FROZEN


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as its checkpoint left it.

    Attributes:
      config: configuration of the run.  spec: the abstract model.
      params: every parameter of the composite.
      tokenizer: of the language model.  step: updates done.
    """

    config: ConfigDict
    spec: ModelSpec
    params: dict[str, jax.Array]
    tokenizer: LlamaTokenizer
    step: int


def open_checkpoints(path: str | Path) -> Checkpoints:
    """Checkpoints of a workdir, or of its ``checkpoints`` folder itself.

    Raises:
      CheckpointError: the folder does not exist or holds no complete checkpoint.
    """
    folder = Path(path).expanduser()
    inner = folder / "checkpoints"
    checkpoints = Checkpoints(inner if inner.is_dir() else folder)
    if checkpoints.latest_step is None:
        raise CheckpointError(
            f"no complete checkpoint in {checkpoints.directory}; "
            "give a run's --workdir or its checkpoints folder"
        )
    return checkpoints


def config_of(meta: Mapping[str, Any], weights: Mapping[str, str] | None = None) -> ConfigDict:
    """The configuration a checkpoint was written with; ``weights`` replaces source paths that moved."""
    config = get_config()
    with config.unlocked():
        for section, values in meta["config"].items():
            config[section] = ConfigDict(values)
    config.weights.update(weights or {})
    return config


def trained_parameters(checkpoints: Checkpoints, step: int | None = None) -> dict[str, jax.Array]:
    """Everything the run changed or inherited, on the first device."""
    step = checkpoints.latest_step if step is None else step
    spec = build(config_of(checkpoints.meta(step)))
    shapes = {path: s for path, s in spec.template.shapes.items() if _not_pretrained(path, spec)}
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed) for path, s in shapes.items()}
    trainable = {path: s for path, s in like.items() if spec.labels[path] != FROZEN}
    inherited = {path: s for path, s in like.items() if spec.labels[path] == FROZEN}
    parts = {"trainable": trainable, **({"inherited": inherited} if inherited else {})}
    restored, _, _ = checkpoints.restore(parts, step)
    return {path: value for part in restored.values() for path, value in part.items()}


def _not_pretrained(path: str, spec: ModelSpec) -> bool:
    """Whether a parameter comes from training (of this run or the one before) and from no source."""
    new = path.startswith("mapper/") or any(part in path for part in NEW_PARTS)
    return new or spec.labels[path] != FROZEN


def load_run(path: str | Path, *, step: int | None = None, weights: Mapping[str, str] | None = None) -> Run:
    """A trained model from its checkpoint and the sources of its frozen weights.

    Args:
      path: a run's workdir or its ``checkpoints`` folder.
      step: which checkpoint; the newest by default.
      weights: source paths that differ from those of the run (``{"llm": "/models/vicuna"}``).

    Raises:
      CheckpointError: nothing there, or other frozen weights or tokenizer than the run had.
      ConfigError: a source of frozen weights is missing.
    """
    checkpoints = open_checkpoints(path)
    step = checkpoints.latest_step if step is None else step
    meta = checkpoints.meta(step)
    config = config_of(meta, weights)
    check_sources(config)
    spec = build(config)
    tokenizer = llm_tokenizer(config, spec.towers)
    frozen = load_frozen(config, spec, lambda _, value: jnp.asarray(value))
    trained = trained_parameters(checkpoints, step)
    inherited = {path: value for path, value in trained.items() if spec.labels[path] == FROZEN}
    caption = caption_tokenizer(config, spec.towers)
    now = describe_run(
        config.to_dict(),
        tokenizer={"llm": tokenizer.identity(), "caption": caption.identity()},
        frozen=hash_parameters({**frozen, **inherited}),
    )
    check_compatible(meta, now)
    checkpoints.close()
    return Run(config, spec, {**frozen, **trained}, tokenizer, step)


def inherit(path: str | Path, fresh: Mapping[str, jax.Array], spec: ModelSpec) -> dict[str, jax.Array]:
    """``fresh`` with everything a former run trained put in its place (reference 4.5).

    Raises:
      CheckpointError: the former run trained something this model lacks or has in another shape.
    """
    checkpoints = open_checkpoints(path)
    trained = trained_parameters(checkpoints)
    checkpoints.close()
    here = {name: shape.shape for name, shape in spec.template.shapes.items()}
    wrong = [
        f"{name}: {value.shape} there, {here.get(name, 'absent')} here"
        for name, value in trained.items()
        if value.shape != here.get(name)
    ]
    if wrong:
        raise CheckpointError(f"run.init_from={path} does not fit this model:\n  " + "\n  ".join(wrong[:8]))
    return {**fresh, **{name: value for name, value in trained.items() if name in fresh}}
