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
from ml_collections import ConfigDict

from minigpt5_jax.build import NEW_PARTS, ModelSpec, build, llm_tokenizer, load_frozen, tokenizer_identity
from minigpt5_jax.config import ConfigError, choose, get_config
from minigpt5_jax.data.tokenizer import LlamaTokenizer
from minigpt5_jax.frozen_sources import check_sources
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import (
    CheckpointError,
    check_compatible,
    describe_run,
    differences,
    hash_parameters,
    plain,
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
    checkpoints = Checkpoints(inner if inner.is_dir() else folder, read_only=True)
    if checkpoints.latest_step is None:
        raise CheckpointError(
            f"no complete checkpoint in {checkpoints.directory}; "
            "give a run's --workdir or its checkpoints folder"
        )
    return checkpoints


def config_of(meta: Mapping[str, Any], weights: Mapping[str, str] | None = None) -> ConfigDict:
    """The configuration a checkpoint was written with, keys it did not know yet at their defaults.

    Args:
      meta: description in the checkpoint.
      weights: source paths that moved since (``{"llm": "/models/vicuna"}``).

    Raises:
      CheckpointError: it has a key this version does not know.
      ConfigError: ``weights`` names an unknown source.
    """
    saved, config = meta["config"], get_config()
    for part in ("backbone", "mapper", "generator"):
        choose(config, part, saved["model"][part]["name"])
    if unknown := sorted(_paths(saved) - _paths(config.to_dict())):
        raise CheckpointError(f"the checkpoint was written with settings this version lacks: {unknown}")
    for section, values in saved.items():
        config[section].update(values)
    if unknown := sorted(set(weights or {}) - set(config.weights)):
        raise ConfigError(f"unknown weight sources {unknown}; known: {', '.join(config.weights)}")
    config.weights.update(weights or {})
    return config


def _paths(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of nested dicts."""
    found: set[str] = set()
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= _paths(value, f"{prefix}{name}.") if inner else {prefix + name}
    return found


def as_now(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` with its configuration as :func:`config_of` completes it, for comparing."""
    return {**meta, "config": plain(config_of(meta).to_dict())}


def trained_parameters(
    checkpoints: Checkpoints, step: int, spec: ModelSpec, shardings: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
    """Everything the run of ``spec`` changed or inherited.

    Args:
      shardings: path -> where it goes; the first local device for paths that are not named.
    """
    own = checkpoints.paths("inherited", step)  # may hold pretrained parameters in a form of its own
    shapes = {
        path: s for path, s in spec.template.shapes.items() if not_pretrained(path, spec) or path in own
    }
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=(shardings or {}).get(path, here))
        for path, s in shapes.items()
    }
    trainable = {path: s for path, s in like.items() if spec.labels[path] != FROZEN}
    inherited = {path: s for path, s in like.items() if spec.labels[path] == FROZEN}
    parts = {"trainable": trainable, **({"inherited": inherited} if inherited else {})}
    restored, _, _ = checkpoints.restore(parts, step)
    return {path: value for part in restored.values() for path, value in part.items()}


def not_pretrained(path: str, spec: ModelSpec) -> bool:
    """Whether a parameter comes from training (of this run or the one before) and from no source."""
    return starts_from_nothing(path) or spec.labels[path] != FROZEN


def starts_from_nothing(path: str) -> bool:
    """Whether no source has a parameter: the mapper, and the new parts of the language model."""
    return path.startswith("mapper/") or any(part in path for part in NEW_PARTS)


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
    frozen = load_frozen(config, spec)
    trained = trained_parameters(checkpoints, step, spec)
    kept = {path: value for path, value in {**frozen, **trained}.items() if spec.labels[path] == FROZEN}
    now = describe_run(
        config.to_dict(),
        tokenizer=tokenizer_identity(config, spec.towers),
        frozen=hash_parameters(kept),
    )
    check_compatible(as_now(meta), now)
    checkpoints.close()
    return Run(config, spec, {**frozen, **trained}, tokenizer, step)


def former_run(
    path: str | Path, spec: ModelSpec, weights: Mapping[str, str]
) -> tuple[Mapping[str, Any], ModelSpec]:
    """(description, abstract model) of the run at ``path``, from which one of ``spec`` can start.

    No weights are read.  What this model has besides (the second stage's LoRA) starts from nothing.

    Args:
      path: workdir or checkpoints.  spec: of this run.  weights: its source paths.

    Raises:
      CheckpointError: nothing there; or that run trained something that this model lacks or has in another
        shape (a second stage's LoRA or prefix, another number of vokens, another mapper).
    """
    checkpoints = open_checkpoints(path)
    meta = checkpoints.meta(checkpoints.latest_step)
    checkpoints.close()
    former = build(config_of(meta, {name: value for name, value in weights.items() if value}))
    here = {name: s.shape for name, s in spec.template.shapes.items() if starts_from_nothing(name)}
    wrong = [
        f"{name}: {shape.shape} there, {here.get(name, 'not trained')} here"
        for name, shape in former.template.shapes.items()
        if not_pretrained(name, former) and shape.shape != here.get(name)
    ]
    if wrong:
        stage = meta.get("bundle", {}).get("stage", "unknown")
        lines = wrong[:8] + [f"... and {len(wrong) - 8} more"] * (len(wrong) > 8)
        raise CheckpointError(
            f"run.init_from={path} (of stage {stage}) does not fit this model:\n  "
            + "\n  ".join(lines)
            + "\nStart from a run whose model is part of this one (stage 2: a stage-1 run with the same "
            "mapper and number of vokens), or give this run that one's model settings"
        )
    return meta, former


def inherit(
    path: str | Path,
    fresh: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    spec: ModelSpec,
    shardings: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    weights: Mapping[str, str],
) -> dict[str, jax.Array]:
    """``fresh`` with everything a former run trained put in its place (reference 4.5).

    Args:
      path: workdir or checkpoints of the former run.
      fresh: start values of this run.  frozen: its pretrained parameters.  spec, shardings: of this run.
      tokenizer: identity of this run's.  weights: its source paths.

    Returns:
      start values, and pretrained parameters that the former run had in a form of its own (the whole tables
      of a released checkpoint).

    Raises:
      CheckpointError: the former run had another tokenizer or other frozen weights, or trained
        something that this model lacks or has in another shape.
    """
    meta, former = former_run(path, spec, weights)
    checkpoints = open_checkpoints(path)
    trained = trained_parameters(checkpoints, checkpoints.latest_step, former, shardings)
    checkpoints.close()
    kept = {**frozen, **{name: value for name, value in trained.items() if name in frozen}}
    hashes = {tower: value for tower, value in hash_parameters(kept).items() if tower in meta["frozen"]}
    before = {"tokenizer": meta["tokenizer"], "frozen": {name: meta["frozen"][name] for name in hashes}}
    if other := differences(before, {"tokenizer": tokenizer, "frozen": hashes}, before):
        lines = [f"  {key}: {theirs!r} there, {ours!r} here" for key, (theirs, ours) in other.items()]
        raise CheckpointError(f"run.init_from={path} stood on other weights or words:\n" + "\n".join(lines))
    return {**fresh, **trained}
