"""Configurations: made from the table of keys and from those of the parts, and varied.

A run is a file in ``configs/`` with ``get_config(variant=None)``, which starts from
:func:`get_config` here and writes down only what differs.  Keys are locked: a misspelt name or a
value of another type is an error.  Every key, its default and why: ``keys.py`` and the parts' files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config.errors import ConfigError, setting_errors
from minigpt5_jax.config.keys import DEFAULT_PARTS, KEYS, Key
from minigpt5_jax.config.paths import local_path
from minigpt5_jax.config.profiles import PROFILES
from minigpt5_jax.parts.contracts import (
    INT8,
    KINDS,
    PREFIX,
    QUANTIZATION,
    SMALL,
    STAGE2,
    Part,
    find,
    names,
)

PACKAGED = "shapes"
"""Value of ``weights.*`` that names the packaged small world."""


def get_config() -> ConfigDict:
    """The base configuration: the paper's stage 1, locked, with every key at its default."""
    config = ConfigDict({path.split(".")[0]: {} for path in KEYS} | {"weights": {}})
    for path, key in KEYS.items():
        section, name = path.split(".")
        config[section][name] = key.initial()
    for kind, name in DEFAULT_PARTS.items():
        config.model[kind] = _part_keys(find(kind, name), name)
    _install_weights(config)
    return config.lock()


def _part_keys(part: Part, name: str) -> ConfigDict:
    return ConfigDict({"name": name, **{key: spec.initial() for key, spec in part.keys.items()}})


def _install_weights(config: ConfigDict) -> None:
    """Give ``weights`` the keys of the chosen parts; what a key said that stays is kept."""
    given = config.weights
    config.weights = ConfigDict({name: given.get(name, key.initial()) for name, key in weight_keys(config)})


def parts_of(config: ConfigDict) -> dict[str, Part]:
    """Kind -> the chosen part.

    Raises:
      ConfigError: there is no such part; the message lists the known ones.
    """
    with setting_errors():
        return {kind: find(kind, config.model[kind].name) for kind in KINDS}


def part_settings(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Kind -> what the configuration says of its part, without the name."""
    return {
        kind: {key: value for key, value in config.model[kind].to_dict().items() if key != "name"}
        for kind in KINDS
    }


def weight_keys(config: ConfigDict) -> list[tuple[str, Key]]:
    """(name, key) of everything below ``weights``: files of the chosen parts, and folders of several."""
    found: dict[str, Key] = {}
    for part in parts_of(config).values():
        for name, use in part.uses.items():
            if use.group and use.group not in found:
                found[use.group] = Key("", part.groups[use.group], path=True)
            found[name] = Key("", use.why, path=True)
    return list(found.items())


def choose(config: ConfigDict, kind: str, name: str) -> ConfigDict:
    """Install part ``name`` with all its keys; no key of the former one is left.

    What the run is otherwise (in the small world, of stage 2) holds for the new part too.

    Raises:
      ConfigError: listing the known kinds or parts.
    """
    with setting_errors():
        part = find(kind, name)
    with config.unlocked():
        config.model[kind] = _part_keys(part, name)
        _install_weights(config)
    if PACKAGED in config.weights.values():
        apply_setting(config, SMALL, kind)
        config.weights.update({name: PACKAGED for name in part.groups or part.uses})
    if config.tuning.stage == "stage2":
        apply_setting(config, STAGE2, kind)
    if part.samplers and config.inference.sampler not in part.samplers:
        config.inference.sampler = part.samplers[0]
    return config


def apply_setting(config: ConfigDict, setting: str, *kinds: str) -> int:
    """Give the parts the values that they have under a setting; how many of them know it."""
    known = 0
    for kind, part in parts_of(config).items():
        if setting in part.settings and (not kinds or kind in kinds):
            config.model[kind].update(part.settings[setting])
            known += 1
    return known


def apply_variant(
    config: ConfigDict, variant: str | None, known: Mapping[str, Callable[[ConfigDict], Any]] | None = None
) -> ConfigDict:
    """What follows the colon of ``--config file.py:variant``, comma separated.

    Each piece is a name in ``known``, ``int8`` (:func:`use_int8`) or a profile
    (:mod:`minigpt5_jax.config.profiles`), whose function changes the configuration in place, or
    ``part=name``, which installs another part.

    Raises:
      ConfigError: listing what the file knows.
    """
    known = {**PROFILES, "int8": use_int8, **(known or {})}
    for piece in filter(None, (variant or "").split(",")):
        part, equals, name = piece.partition("=")
        if piece in known:
            known[piece](config)
        elif equals:
            choose(config, part, name)
        else:
            pairs = [f"{kind}={name}" for kind in KINDS for name in names(kind)]
            raise ConfigError(f"unknown variant {piece!r}; known: {', '.join([*known, *pairs])}")
    return config


def use_shapes_backbones(config: ConfigDict) -> ConfigDict:
    """The packaged tiny towers in place of MiniGPT-4 and Stable Diffusion, in fp32."""
    config.model.dtype = config.model.param_dtype = "float32"
    config.model.remat = "none"
    apply_setting(config, SMALL)
    groups = {name for part in parts_of(config).values() for name in part.groups}
    inside = {
        name
        for part in parts_of(config).values()
        for name, use in part.uses.items()
        if use.group or use.beside
    }
    config.weights.update({name: PACKAGED for name in config.weights if name in groups or name not in inside})
    # The most likely token, without a penalty on words said before: this world has fifty of them.
    config.inference.update(
        sampler="ddim",
        num_inference_steps=20,
        guidance_scale=2.0,
        max_new_tokens=64,
        do_sample=False,
        repetition_penalty=1.0,
    )
    return config


def use_stage2(config: ConfigDict) -> ConfigDict:
    """The paper's stage 2: LoRA, one rate of 2e-5, batch 32, four epochs, no caption loss (fidelity 4.1)."""
    config.run.update(epochs=4.0, eval_every=2000, grid_every=2000)
    config.data.update(global_batch=32, accumulation=4, max_length=512, max_targets=128)
    config.loss.caption = 0.0
    config.optimizer.update(lr_llm=2e-5, lr_mapper=2e-5)
    config.tuning.stage = "stage2"
    apply_setting(config, STAGE2)
    return config


def use_shapes_stage2(config: ConfigDict) -> ConfigDict:
    """The paper's losses, masks, trainables and guidance of stage 2; rates, steps and text weight scaled.

    The text weight is ten times the paper's, so that so few steps suffice to learn when an image is due.
    """
    use_shapes_backbones(use_stage2(config))
    config.run.update(
        num_steps=600, log_every=20, eval_every=300, eval_batches=4, save_every=300, grid_every=300
    )
    config.data.update(global_batch=16, accumulation=1, worker_count=0, flip_mode="off")
    config.loss.text = 0.1
    config.optimizer.update(lr_llm=2e-3, lr_mapper=5e-4, warmup_steps=50)
    config.inference.guidance_scale = 7.5
    return config


def use_prefix(config: ConfigDict) -> ConfigDict:
    """Prefix tuning in place of LoRA (390,562,816 trainable parameters, fidelity 4.4)."""
    if not apply_setting(config, PREFIX):
        raise ConfigError(f"backbone {config.model.backbone.name!r} has no prefix tuning")
    return config


def use_int8(config: ConfigDict) -> ConfigDict:
    """The largest frozen tower of the backbone in 8 bits: half the memory (docs/training.md)."""
    if not apply_setting(config, INT8):
        raise ConfigError(f"backbone {config.model.backbone.name!r} has no tower that may be quantised")
    return config


def quantization_keys(config: ConfigDict) -> dict[str, Key]:
    """The keys that say how frozen kernels are held, by dotted path."""
    return {path: key for path, key in keys_of(config).items() if path.endswith(QUANTIZATION)}


def use_inference_quantization(config: ConfigDict) -> ConfigDict:
    """Frozen towers held as ``inference.quantization`` says, those that may be so; the others as they are."""
    method = config.inference.quantization
    for path, key in quantization_keys(config).items():
        if method in key.choices:
            section, _, name = path.rpartition(".")
            value_at(config, section)[name] = method
    return config


def keys_of(config: ConfigDict) -> dict[str, Key]:
    """Every key of this configuration by dotted path, its parts' keys included."""
    keys, parts = dict(KEYS), parts_of(config)
    for kind, part in parts.items():
        why = f"{kind}; `:{kind}=NAME` behind the file chooses: {', '.join(names(kind))}"
        keys[f"model.{kind}.name"] = Key(config.model[kind].name, why)
        keys |= {f"model.{kind}.{key}": spec for key, spec in part.keys.items()}
    sampler = keys["inference.sampler"]
    keys["inference.sampler"] = dataclasses.replace(sampler, choices=parts["generator"].samplers)
    return keys | {f"weights.{name}": key for name, key in weight_keys(config)}


def describe(config: ConfigDict | None = None) -> str:
    """The table of keys: path, value (default in brackets where it differs), why."""
    config = get_config() if config is None else config
    lines, section = [], None
    for path, key in keys_of(config).items():
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append(f"\n{section}")
        value = value_at(config, path)
        shown = f"{value!r}" if value == key.default else f"{value!r} [{key.default!r}]"
        rule = f" ({' | '.join(map(str, key.choices))})" if key.choices else ""
        lines.append(f"  --config.{path}={shown}\n      {key.why}{rule}")
    return "\n".join(lines).lstrip("\n")


def expand_paths(config: ConfigDict) -> ConfigDict:
    """``config`` with the ``~`` of every path replaced (``Key.path``), in place.

    Raises:
      ConfigError: a path is an address of object storage.
    """
    for name, key in keys_of(config).items():
        if key.path and (value := value_at(config, name)):
            section, _, last = name.rpartition(".")
            try:
                value_at(config, section)[last] = local_path(value)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
    return config


def value_at(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = value[name]
    return value


def rate_groups(config: ConfigDict) -> dict[str, float]:
    """Learning-rate group -> its peak rate: the keys ``optimizer.lr_<group>``."""
    return {name[3:]: rate for name, rate in config.optimizer.items() if name.startswith("lr_")}


def num_steps(config: ConfigDict, samples: int) -> int:
    """Updates of the run: ``run.num_steps``, or ``run.epochs`` over ``samples``."""
    if config.run.num_steps is not None:
        return config.run.num_steps
    return math.ceil(config.run.epochs * samples / config.data.global_batch)


def warmup_steps(config: ConfigDict, steps: int | float) -> int:
    """Updates over which the rates rise: ``optimizer.warmup_steps``; a tenth of a run that is not longer."""
    wanted = config.optimizer.warmup_steps
    return wanted if wanted < steps else int(steps) // 10


def weight_sources(config: ConfigDict) -> dict[str, str]:
    """Name -> path of every file of the parts, folders and neighbours filled in; '' where none was given."""
    given = dict(config.weights)
    uses = {name: use for part in parts_of(config).values() for name, use in part.uses.items()}
    for name, use in uses.items():
        if folder := not given[name] and use.group and given[use.group]:
            given[name] = folder if folder == PACKAGED else f"{folder.rstrip('/')}/{use.subfolder}"
    return {name: given[name] or (given[use.beside] if use.beside else "") for name, use in uses.items()}
