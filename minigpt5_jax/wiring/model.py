"""From a configuration to a model: tower sizes, the abstract composite, tokenizers, weights.

With ``weight_paths.py`` the one place that reads ``config.model`` and ``config.weights``; parts get plain
keyword arguments.  Everything up to :func:`load_frozen` is abstract and runs on any machine at full size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, part_settings, parts_of, setting_errors
from minigpt5_jax.minigpt5 import LOSSES, LossOptions, make_template
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.parts.contracts import FROZEN, Context, Part, Use, shipped
from minigpt5_jax.training.provenance import FileLeaf, hash_parameters
from minigpt5_jax.training.sharding import Rules
from minigpt5_jax.training.step import StepOptions
from minigpt5_jax.training.tuning import TABLE_DECAY, label_parameters, rules_of
from minigpt5_jax.weights.check import with_cause
from minigpt5_jax.weights.export.model import PretrainedTower
from minigpt5_jax.weights.foreign.release import tower_of_whole
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.quantization import SCALE
from minigpt5_jax.weights.stream import stream_tower
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.wiring.weight_paths import check_sources, find_source, read_config

Sizes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model before it has arrays.

    Attributes:
      parts: kind -> part.  keys: kind -> what the configuration says of it.
      sizes: name under ``config.weights`` -> sizes of every tower that is used.
      made: kind -> keyword arguments that the part's module is made with.
      template: abstract composite.  labels: tuning group of every path.
      sharding: (start of a path, logical axis -> mesh axis); the first match decides.
      options: what the train step needs.
      unused: names under ``config.weights`` of towers that are not loaded (:meth:`without`).
    """

    parts: Mapping[str, Part]
    keys: Mapping[str, Mapping[str, Any]]
    sizes: Sizes
    made: Mapping[str, Mapping[str, Any]]
    template: Template
    labels: dict[str, str]
    sharding: Rules
    options: StepOptions
    unused: frozenset[str] = frozenset()

    @functools.cached_property
    def model(self) -> Any:
        """The composite over abstract values: for sizes, never to be called outside of a trace."""
        return self.template.bind(self.template.shapes)

    @property
    def backbone(self) -> Any:
        """The abstract backbone (:class:`minigpt5_jax.parts.contracts.Backbone`)."""
        return self.model.backbone

    @property
    def generator(self) -> Any:
        """The abstract generator (:class:`minigpt5_jax.parts.contracts.Generator`)."""
        return self.model.generator

    def without(self, names: Collection[str]) -> ModelSpec:
        """The same model for a run that does not load the towers called ``names``."""
        absent = {
            path for name, part, use in self.towers() if name in names for path in self.paths_of(part, use)
        }
        return dataclasses.replace(self, template=self.template.without(absent), unused=frozenset(names))

    def quantized(self) -> ModelSpec:
        """The same model, frozen kernels stored as the parts' keys say; whatever trains stays as it is.

        Raises:
          ValueError: a kernel that cannot be stored so.
        """
        kernels, methods = self.template.kernels(), {}
        for name, part, use in self.towers():
            method = part.quantization(name, self.keys[part.kind])
            if method != "none":
                own = kernels.intersection(self.paths_of(part, use))
                methods |= {path: method for path in sorted(own) if self.labels[path] == FROZEN}
        template = self.template.quantize(methods)
        labels = {path: self.labels.get(path, FROZEN) for path in template.shapes}
        return dataclasses.replace(self, template=template, labels=labels)

    def towers(self) -> Iterator[tuple[str, Part, Use]]:
        """(name, part, files) of everything whose files hold parameters."""
        for kind, part in self.parts.items():
            for name, use in part.used(self.keys[kind]):
                if use.tower is not None and use.tower.table is not None:
                    yield name, part, use

    def paths_of(self, part: Part, use: Use) -> Iterator[str]:
        """The parameters that files hold, whole paths."""
        for path in self.template.shapes:
            if path.startswith(part.prefix) and use.fills(path.removeprefix(part.prefix)):
                yield path

    @functools.cached_property
    def pretrained(self) -> frozenset[str]:
        """Every parameter that some published file holds."""
        return frozenset(path for _, part, use in self.towers() for path in self.paths_of(part, use))


def tower_sizes(config: ConfigDict) -> dict[str, Any]:
    """Sizes of every tower that is used: presets, or JSON files beside the sources; nothing else is read.

    Raises:
      ConfigError: sizes are to come from a source that is not there.
    """
    found: dict[str, Any] = {}
    settings = part_settings(config)
    for kind, part in parts_of(config).items():
        keys = settings[kind]
        for name, use in part.used(keys):
            if use.tower is None:
                continue
            if use.sizes is not None:
                found[name] = use.sizes(found)
            elif keys.get(name) == "source":
                values = read_config(config, name)
                found[name] = use.tower.config.from_hf(use.tower.published(values))
            else:
                found[name] = use.tower.presets[keys.get(name, next(iter(use.tower.presets)))]
    return found


@setting_errors()
def build(config: ConfigDict, remat: str = "") -> ModelSpec:
    """The abstract model of a validated configuration; allocates nothing.

    Args:
      remat: which layers are computed again in the backward pass, in the place of ``model.remat``.

    Raises:
      ConfigError: what a tower or a tuning pattern says about a setting.
    """
    parts, sizes, keys = parts_of(config), tower_sizes(config), part_settings(config)
    neighbours = {name: value for part in parts.values() for name, value in part.offers(sizes).items()}
    made = {}
    for kind, part in parts.items():
        context = Context(
            dtype=jnp.dtype(config.model.dtype),
            param_dtype=jnp.dtype(config.model.param_dtype),
            remat=(remat or config.model.remat) in ("all", kind),
            loss=config.loss.to_dict(),
            decay_frozen_rows=config.optimizer.decay_frozen_rows,
            tokenizer=functools.partial(make_tokenizer, config, part, sizes),
            neighbours=neighbours,
        )
        made[kind] = part.make(keys[kind], sizes, context)
    modules = {kind: (config.model[kind].name, made[kind]) for kind in parts}
    template = make_template(**modules, attention=config.model.attention)
    # A mapper may have no room for so many vokens: it says so here, not when the first step is compiled.
    jax.eval_shape(lambda params: template.bind(params).unconditional(), template.shapes)
    own = tuple((str(pattern), str(group)) for pattern, group in config.tuning.rules)
    labels = label_parameters(template.shapes, rules_of(parts.values(), config.tuning.stage, own))
    for path, group in labels.items():
        if path.endswith(TABLE_DECAY) and group == FROZEN:
            raise ConfigError(f"optimizer.decay_frozen_rows=True, but tuning.rules freeze {path}")
    sharding = tuple(
        (part.prefix + start, rules) for part in parts.values() for start, rules in part.sharding.items()
    )
    uses_dropout = template.bind(template.shapes).backbone.uses_dropout
    options = step_options(config, parts, lora_dropout=uses_dropout)
    return ModelSpec(parts, keys, sizes, made, template, labels, sharding, options).quantized()


def step_options(config: ConfigDict, parts: Mapping[str, Part], *, lora_dropout: bool) -> StepOptions:
    """Loss weights (those that are not 0; a part's own at its keys ``loss_<name>``) and rules of the step."""
    weights = {name: config.loss[name] for name in LOSSES}
    losses = dict(LOSSES)
    for kind, part in parts.items():
        losses |= part.losses
        weights |= {name: config.model[kind][f"loss_{name}"] for name in part.losses}
    given = {name: weight for name, weight in weights.items() if weight}
    return StepOptions(
        LossOptions(given, config.loss.caption_target_on_drop, losses),
        cfg_dropout=config.loss.cfg_dropout,
        lora_dropout=lora_dropout,
        accumulation=config.data.accumulation,
    )


# ---------------------------------------------------------------------------------------------
# Tokenizers


def make_tokenizer(config: ConfigDict, part: Part, sizes: Sizes) -> Any:
    """The tokenizer of a part; None for one that reads no text."""
    if part.tokenizer is None:
        return None
    find = functools.partial(find_source, config)
    return part.tokenizer(find, part_settings(config)[part.kind], sizes, config.data.bos_id)


def language_tokenizer(config: ConfigDict, sizes: Sizes) -> Any:
    """The backbone's tokenizer with the vokens behind its V rows."""
    return make_tokenizer(config, parts_of(config)["backbone"], sizes)


def caption_tokenizer(config: ConfigDict, sizes: Sizes) -> Any:
    """The generator's tokenizer."""
    return make_tokenizer(config, parts_of(config)["generator"], sizes)


def tokenizer_identity(config: ConfigDict, sizes: Sizes) -> dict[str, Any]:
    """Kind of part -> what its tokenizer is: a checkpoint is refused under others."""
    made = {kind: make_tokenizer(config, part, sizes) for kind, part in parts_of(config).items()}
    return {kind: tokenizer.identity() for kind, tokenizer in made.items() if tokenizer is not None}


# ---------------------------------------------------------------------------------------------
# Weights


def known_towers() -> dict[str, Tower]:
    """Name under ``weights`` -> tower, of every part that ships: what a file that does not fit may be."""
    return {name: use.tower for part in shipped() for name, use in part.uses.items() if use.tower is not None}


def open_tower(name: str, use: Use, path: Path, sizes: Any) -> tuple[Any, Any]:
    """(table, tensors by the names it reads) of a tower's files; headers are read, nothing else.

    The files may be a whole state dict of the original, of which the tower's part is taken.

    Raises:
      WeightFileError: a file cannot be read.
    """
    source = tower_of_whole(name, open_weights(path, use.tower.key))
    adapted = use.tower.adapt(source, sizes)
    return use.tower.table(adapted, sizes), adapted


def not_pretrained(path: str, spec: ModelSpec) -> bool:
    """Whether a parameter comes from training (of this run or the one before) and from no source."""
    return path not in spec.pretrained or spec.labels[path] != FROZEN


def open_towers(
    spec: ModelSpec, paths: Mapping[str, Path], own: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, PretrainedTower]]:
    """Name -> (start of its paths, tower) of the pretrained towers among ``paths``; only headers are read.

    ``own`` has parameters (whole paths) that the run has in a form of its own.
    """
    found, shapes = {}, spec.template.file_shapes
    for name, part, use in spec.towers():
        if name not in paths:
            continue
        at = part.prefix + use.at
        inside = {path.removeprefix(at): shapes[path] for path in spec.paths_of(part, use) if path in shapes}
        mine = {path: own[at + path] for path in inside if at + path in own}
        table, source = open_tower(name, use, paths[name], spec.sizes[name])
        found[name] = at, PretrainedTower(table, source, inside, mine)
    return found


def hash_frozen(config: ConfigDict, spec: ModelSpec, frozen: Mapping[str, jax.Array]) -> dict[str, str]:
    """Tower -> hash of frozen weights as their files have them in ``model.param_dtype``, quantised or not.

    What is quantised is read from its file once more for it.
    """
    quantized = spec.template.quantized
    scales = {path + SCALE for path in quantized}
    values = {path: value for path, value in frozen.items() if path not in scales}
    stored = [path for path in quantized if path in values]
    names = {
        name for name, part, use in spec.towers() if not set(stored).isdisjoint(spec.paths_of(part, use))
    }
    sources = check_sources(config, spec.unused, names) if names else {}
    leaves = {
        at + path: FileLeaf(quantized[at + path].kernel, functools.partial(tower.layers, path))
        for at, tower in open_towers(spec, sources, {}).values()
        for path in tower.paths()
        if at + path in quantized
    }
    return hash_parameters(values, leaves)


def load_frozen(
    config: ConfigDict,
    spec: ModelSpec,
    shardings: Mapping[str, Sharding] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Every pretrained parameter that is used, streamed from its source onto its devices.

    Args:
      shardings: path -> where it goes; the first local device for paths that are not named.
      only: names under ``weights`` to read, the only ones looked for; by default all but ``spec.unused``.

    Raises:
      ConfigError, WeightFileError, WeightTableError: naming file and keys.
    """
    sources, params = check_sources(config, spec.unused, only), {}
    for name, part, use in spec.towers():
        if name not in sources:
            continue
        at = part.prefix + use.at
        targets = {}
        for path in spec.paths_of(part, use):
            shape = spec.template.shapes[path]
            place = (shardings or {}).get(path)
            targets[path.removeprefix(at)] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
        quantized = {
            path.removeprefix(at): how
            for path, how in spec.template.quantized.items()
            if path.removeprefix(at) in targets and path.startswith(at)
        }
        try:
            table, source = open_tower(name, use, sources[name], spec.sizes[name])
            arrays = stream_tower(table, source, targets, quantized=quantized)
        except WeightTableError as error:
            source = open_weights(sources[name], use.tower.key)
            message = with_cause(str(error), name, use.tower, source, known_towers())
            raise WeightTableError(message) from None
        params |= {at + path: array for path, array in arrays.items()}
    return params


def initial_trainable(
    config: ConfigDict, spec: ModelSpec, frozen: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Start values of what is not pretrained, as the modules and the parts' ``initial`` say."""
    known = {*frozen, *spec.template.absent}
    missing = [path for path in spec.template.shapes if path not in known]
    key = jax.random.key(config.run.seed)
    fresh = _init_only(spec.template, missing, key)
    for kind, part in spec.parts.items():
        if part.initial is not None:
            own, pretrained = _below(part.prefix, fresh), _below(part.prefix, frozen)
            made = part.initial(own, pretrained, spec.keys[kind], key)
            fresh |= {part.prefix + path: value for path, value in made.items()}
    return fresh


def _below(prefix: str, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The values whose paths start with ``prefix``, without it."""
    return {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}


def _init_only(template: Template, paths: list[str], key: jax.Array) -> dict[str, jax.Array]:
    """Initial values of some paths; XLA drops the rest, so the frozen towers are never allocated."""
    wanted = set(paths)
    # Optimising initialisers costs four times what it saves.
    make = jax.jit(
        lambda k: {p: v for p, v in template.init(k).items() if p in wanted},
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return make(key)
