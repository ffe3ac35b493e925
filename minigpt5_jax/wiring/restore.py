"""From a checkpoint back to a model: for generation, and for a stage that starts from another.

A checkpoint holds what training changed; frozen weights are read from their sources again and
compared by hash, so that an image never comes from other weights than it was trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from minigpt5_jax.config import (
    ConfigError,
    choose,
    get_config,
    quantization_keys,
    use_inference_quantization,
)
from minigpt5_jax.config.keys import FORMER_KEYS, RENAMED_KEYS
from minigpt5_jax.inference.session import Session
from minigpt5_jax.parts.contracts import FROZEN, KINDS
from minigpt5_jax.training.checkpoint import Checkpoints, first_lines
from minigpt5_jax.training.provenance import (
    NOT_LOADED,
    CheckpointError,
    Meta,
    check_compatible,
    describe_run,
    plain,
    require_same,
    stage_of,
    tower_of,
)
from minigpt5_jax.wiring.model import (
    ModelSpec,
    build,
    hash_frozen,
    language_tokenizer,
    load_frozen,
    not_pretrained,
    tokenizer_identity,
)
from minigpt5_jax.wiring.saved import SavedModel, find_folder, is_saved
from minigpt5_jax.wiring.session import LoadedModel, override
from minigpt5_jax.wiring.weight_paths import check_sources


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A run whose configuration and abstract model are known; its weights are read by :meth:`load`.

    Attributes:
      reader: of the checkpoints.  step: which of them.  meta: what it says of the run.
      config: the run's configuration, with changed sources and settings.
    """

    reader: Checkpoints | SavedModel
    step: int
    meta: Mapping[str, Any]
    config: ConfigDict

    @property
    def checkpoints(self) -> Path:
        """Folder with the checkpoints."""
        return self.reader.directory

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The abstract model.

        Raises:
          ConfigError: a source of frozen weights is missing, or another one than the configuration means.
        """
        check_sources(
            self.config, remedy="Say where they are: --weights NAME=PATH, or weights={NAME: PATH} in Python"
        )
        return build(self.config)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return language_tokenizer(self.config, self.spec.sizes)

    @property
    def stage(self) -> int:
        """1 for a run on captions, 2 for one that tuned the language model or started from another run."""
        return stage_of(self.meta["config"])

    def check(self) -> None:
        """Build everything but the weights, so that what does not go together is said before they are read.

        Raises:
          ConfigError: sources or settings, among them more images or text than the model has positions for.
        """
        LoadedModel(self.config, self.spec, {}, self.tokenizer, self.step).session()

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        frozen = load_frozen(self.config, self.spec)
        values = {**frozen, **trained_parameters(self.reader, self.spec, self.step)}
        described = describe(self.config, self.spec, values)
        other_storage = [f"config.{key}" for key in quantization_keys(self.config)]
        check_compatible(upgrade_meta(self.meta), described, allow=other_storage)
        return LoadedModel(self.config, self.spec, values, self.tokenizer, self.step)

    def load(self) -> LoadedModel:
        """The model with its weights, which are read once.

        Raises:
          CheckpointError: other frozen weights or tokenizer than the run had.
          ConfigError, WeightFileError, WeightTableError: a source of frozen weights cannot be used.
        """
        return self._loaded

    def session(self, *, batch_size: int = 4) -> Session:
        """:meth:`load`, and a session of it."""
        return self.load().session(batch_size=batch_size)


def open_run(
    path: str | Path,
    *,
    step: int | None = None,
    weights: Mapping[str, str] | None = None,
    inference: Mapping[str, str] | None = None,
) -> OpenedRun:
    """A trained run: its configuration and abstract model, weights not yet read.

    Args:
      path: a run's workdir or its ``checkpoints`` folder, a saved model's folder, ``shapes`` (the packaged
        run), or a Hugging Face id in the local cache.
      step: which checkpoint; by default the newest that can be read.
      weights: source paths that differ from those of the run, by their names under ``config.weights``.
      inference: settings in place of the run's, as Python spells them (``{"sampler": "ddim"}``).

    Raises:
      CheckpointError: nothing there.
      ConfigError: an unknown source or setting.
    """
    with contextlib.closing(open_checkpoints(path)) as checkpoints:
        chosen = checkpoints.newest_readable() if step is None else step
        meta = checkpoints.meta(chosen)
    config = override(config_of(meta, weights), inference or {})
    return OpenedRun(checkpoints, chosen, meta, use_inference_quantization(config))


def load_run(
    path: str | Path, *, step: int | None = None, weights: Mapping[str, str] | None = None
) -> LoadedModel:
    """A trained model from its checkpoint and the sources of its frozen weights: ``open_run(...).load()``.

    Args:
      path, step, weights: as for :func:`open_run`.

    Raises:
      CheckpointError: nothing there, or other frozen weights or tokenizer than the run had.
      ConfigError: a source of frozen weights is missing.
    """
    return open_run(path, step=step, weights=weights).load()


def open_checkpoints(path: str | Path) -> Checkpoints | SavedModel:
    """Checkpoints of a workdir, or of its ``checkpoints`` folder itself; or a saved model, which has one.

    Args:
      path: a folder, ``shapes`` for the packaged run, or a Hugging Face id in the local cache.

    Raises:
      CheckpointError: the folder does not exist or holds no complete checkpoint, the id is not in the cache,
        or a newer version saved it.
    """
    folder = find_folder(path)
    if is_saved(folder):
        return SavedModel(folder)
    inner = folder / "checkpoints"
    checkpoints = Checkpoints(inner if inner.is_dir() else folder, read_only=True)
    if checkpoints.latest_step is None:
        raise CheckpointError(
            f"no complete checkpoint in {checkpoints.directory}; give a run's --workdir or its checkpoints "
            "folder, a folder of save_pretrained, or a Hugging Face id in the local cache"
        )
    return checkpoints


def describe(config: ConfigDict, spec: ModelSpec, params: Mapping[str, jax.Array]) -> Meta:
    """What a checkpoint says about a run with these parameters; the frozen ones among them are hashed.

    A tower of which any is not loaded has no hash (``NOT_LOADED``).
    """
    partial = {tower_of(path): NOT_LOADED for path in spec.template.absent if path not in params}
    frozen = {
        path: value
        for path, value in params.items()
        if spec.labels[path] == FROZEN and tower_of(path) not in partial
    }
    tokenizer = tokenizer_identity(config, spec.sizes)
    hashes = hash_frozen(config, spec, frozen) | partial
    return describe_run(config.to_dict(), tokenizer=tokenizer, frozen=hashes)


def earlier_hashes(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, str]:
    """Tower -> hash of its frozen weights, as the checkpoint says that a run goes on from; none at a start.

    Of its own workdir (``checkpoints``), else of ``run.init_from``.
    """
    if checkpoints.latest_step is not None:
        return checkpoints.meta()["frozen"]
    if not config.run.init_from:
        return {}
    with contextlib.closing(open_checkpoints(config.run.init_from)) as parent:
        return parent.meta()["frozen"]


def config_of(meta: Mapping[str, Any], weights: Mapping[str, str] | None = None) -> ConfigDict:
    """The configuration a checkpoint was written with, keys that it did not know yet at their defaults.

    Args:
      meta: description in the checkpoint.
      weights: source paths that moved since, by their names under ``config.weights``.

    Raises:
      CheckpointError: it has a key this version does not know.
      ConfigError: ``weights`` names an unknown source.
    """
    saved, config = meta["config"], get_config()
    for kind in KINDS:
        choose(config, kind, saved["model"][kind]["name"])
    flat = {
        RENAMED_KEYS.get(key, key): value
        for key, value in flatten_dict(saved, sep=".").items()
        if key not in FORMER_KEYS
    }
    if isinstance(remat := flat.get("model.remat"), bool):  # it was one switch for all towers
        flat["model.remat"] = "all" if remat else "none"
    if unknown := sorted(flat.keys() - flatten_dict(config.to_dict(), sep=".").keys()):
        raise CheckpointError(f"the checkpoint was written with settings this version lacks: {unknown}")
    if "flip_each_epoch" not in saved["data"]:  # of a version that always did
        config.data.flip_each_epoch = not flat.get("data.features")
    if "exchange" not in saved["mesh"]:  # of a version that summed gradients in fp32
        config.mesh.exchange = "float32"
    if "stage" not in saved["tuning"]:  # of a version whose rules named every pattern
        config.tuning.stage = f"stage{stage_of(saved)}"
    for section, values in unflatten_dict(flat, sep=".").items():
        config[section].update(values)
    if unknown := sorted(set(weights or {}) - set(config.weights)):
        raise ConfigError(f"unknown weight sources {unknown}; known: {', '.join(config.weights)}")
    config.weights.update(weights or {})
    return config


def upgrade_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` as this version would have written it: keys at their defaults, names of today."""
    kinds = dict(llm="backbone", caption="generator")  # tokenizers were called after what they read
    tokenizers = {kinds.get(name, name): identity for name, identity in meta["tokenizer"].items()}
    return {**meta, "config": plain(config_of(meta).to_dict()), "tokenizer": tokenizers}


def trained_parameters(
    checkpoints: Checkpoints | SavedModel,
    spec: ModelSpec,
    step: int | None = None,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Everything the run of ``spec`` changed or inherited.

    Args:
      checkpoints: of the run; closed when it returns.
      step: which of them; by default the newest that can be read.
      shardings: path -> where it goes; the first local device for paths that are not named.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with contextlib.closing(checkpoints):
        own = checkpoints.paths("inherited", step)  # may hold pretrained parameters in a form of its own
        like: dict[str, dict[str, jax.ShapeDtypeStruct]] = {"trainable": {}}
        for name, shape in spec.template.shapes.items():
            if not_pretrained(name, spec) or name in own:
                part = like.setdefault("inherited" if spec.labels[name] == FROZEN else "trainable", {})
                place = (shardings or {}).get(name, here)
                part[name] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
        restored, _, _ = checkpoints.restore(like, step)
    return {name: value for part in restored.values() for name, value in part.items()}


def open_parent_run(config: ConfigDict, spec: ModelSpec) -> tuple[Mapping[str, Any], ModelSpec]:
    """(description, abstract model) of the run at ``run.init_from``, from which this one can start.

    No weights are read.  What this model has besides (the second stage's LoRA) is newly initialised.

    Raises:
      CheckpointError: nothing there; or that run trained something that this model lacks or has in another
        shape (a second stage's LoRA or prefix, another number of vokens, another mapper).
    """
    path = config.run.init_from
    with contextlib.closing(open_checkpoints(path)) as checkpoints:
        meta = checkpoints.meta()
    known = meta["config"]["weights"]
    given = {name: value for name, value in config.weights.items() if value and name in known}
    parent = build(config_of(meta, given))
    here = {name: s.shape for name, s in spec.template.shapes.items() if name not in spec.pretrained}
    wrong = [
        f"{name}: {shape.shape} there, {here.get(name, 'not trained')} here"
        for name, shape in parent.template.shapes.items()
        if not_pretrained(name, parent) and shape.shape != here.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"run.init_from={path} (of stage {stage_of(meta['config'])}) does not fit this model:\n"
            + first_lines(wrong)
            + "\nStart from a run whose model is part of this one (stage 2: a stage-1 run with the same "
            "mapper and number of vokens), or give this run that one's model settings"
        )
    return meta, parent


def warm_start(
    config: ConfigDict,
    spec: ModelSpec,
    fresh: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    shardings: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """``fresh`` with everything that the run at ``run.init_from`` trained in its place (fidelity 4.5).

    Args:
      fresh: start values of this run.  frozen: its pretrained parameters.
      shardings: path -> where what the parent run trained goes.

    Returns:
      start values, and pretrained parameters that the parent run had in a form of its own (the whole tables
      of a released checkpoint).

    Raises:
      CheckpointError: the parent run had another tokenizer or other frozen weights, or trained
        something that this model lacks or has in another shape.
    """
    path, (meta, parent) = config.run.init_from, open_parent_run(config, spec)
    trained = trained_parameters(open_checkpoints(path), parent, shardings=shardings)
    kept = {**frozen, **{name: value for name, value in trained.items() if name in frozen}}
    hashes = hash_frozen(config, spec, kept)
    hashes = {tower: value for tower, value in hashes.items() if tower in meta["frozen"]}
    before = {
        "tokenizer": upgrade_meta(meta)["tokenizer"],
        "frozen": {name: meta["frozen"][name] for name in hashes},
    }
    require_same(
        before,
        {"tokenizer": tokenizer_identity(config, spec.sizes), "frozen": hashes},
        before,
        f"run.init_from={path} was trained with different frozen weights or a different tokenizer:",
        "{}: {!r} there, {!r} here",
    )
    return {**fresh, **trained}
