"""Configurations: made from the table of keys, varied, described and validated.

A run is a file in ``configs/`` with ``get_config(variant=None)``, which starts from
:func:`get_config` here and writes down only what differs.  Keys are locked: a misspelt name or a
value of another type is an error.  Every key, its default and why: ``config_keys.py``.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax import tuning
from minigpt5_jax.config_keys import KEYS, PARTS, Key
from minigpt5_jax.profiles import PROFILES


class ConfigError(ValueError):
    """A key is unknown, has a wrong type or value, or two keys do not go together."""


@contextlib.contextmanager
def setting_errors() -> Iterator[None]:
    """What the model's parts say about a setting (ValueError, a bad pattern) as a :class:`ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, re.error) as error:
        raise ConfigError(str(error)) from error


STORY_FORMATS = ("vist", "prepared", "shapes_stories")
"""``data.format`` of what may be stories."""
SUBFOLDERS = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "clip_tokenizer": "tokenizer",
    "scheduler": "scheduler",
}


def get_config() -> ConfigDict:
    """The base configuration: the paper's stage 1, locked, with every key at its default."""
    config = ConfigDict({path.split(".")[0]: {} for path in KEYS})
    for path, key in KEYS.items():
        section, name = path.split(".")
        config[section][name] = key.initial()
    for part, variants in PARTS.items():
        config.model[part] = _part_keys(part, next(iter(variants)))
    return config.lock()


def _part_keys(part: str, name: str) -> ConfigDict:
    keys = PARTS[part][name]
    return ConfigDict({"name": name, **{key: spec.initial() for key, spec in keys.items()}})


def choose(config: ConfigDict, part: str, name: str) -> ConfigDict:
    """Install variant ``name`` of ``part`` with all its keys; no key of the former one is left.

    Raises:
      ConfigError: listing the known parts or variants.
    """
    if part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; known: {', '.join(PARTS)}")
    if name not in PARTS[part]:
        raise ConfigError(f"unknown {part} {name!r}; known: {', '.join(PARTS[part])}")
    with config.unlocked():
        config.model[part] = _part_keys(part, name)
    return config


def apply_variant(
    config: ConfigDict, variant: str | None, known: Mapping[str, Callable[[ConfigDict], Any]] | None = None
) -> ConfigDict:
    """What follows the colon of ``--config file.py:variant``, comma separated.

    Each piece is a name in ``known`` or a profile (:mod:`minigpt5_jax.profiles`), whose function changes the
    configuration in place, or ``part=name``, which installs another backbone, mapper or generator.

    Raises:
      ConfigError: listing what the file knows.
    """
    known = {**PROFILES, **(known or {})}
    for piece in filter(None, (variant or "").split(",")):
        part, equals, name = piece.partition("=")
        if piece in known:
            known[piece](config)
        elif equals:
            choose(config, part, name)
        else:
            pairs = [f"{part}={name}" for part, names in PARTS.items() for name in names]
            raise ConfigError(f"unknown variant {piece!r}; known: {', '.join([*known, *pairs])}")
    return config


def use_shapes_backbones(config: ConfigDict) -> ConfigDict:
    """The packaged tiny towers in place of MiniGPT-4 and Stable Diffusion, in fp32."""
    config.model.dtype = config.model.param_dtype = "float32"
    config.model.remat = False
    config.model.backbone.update(llm="source", vit="source", qformer="source")
    config.model.mapper.update(d_model=128, dim_feedforward=512)
    config.model.generator.update(
        unet="source", vae="source", text_encoder="source", scheduler="source", image_size=64
    )
    config.weights.update(
        llm="shapes", vit="shapes", qformer="shapes", llama_proj="shapes", stable_diffusion="shapes"
    )
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
    """The paper's stage 2: LoRA, one rate of 2e-5, batch 32, four epochs, no caption loss (4.1, 4.2)."""
    config.run.update(epochs=4.0, eval_every=2000, grid_every=2000)
    config.data.update(global_batch=32, accumulation=4, max_length=512, max_targets=128)
    config.model.backbone.lora_rank = 8
    config.loss.caption = 0.0
    config.optimizer.update(lr_llm=2e-5, lr_mapper=2e-5)
    config.tuning.rules = tuning.STAGE2_LORA
    return config


def use_shapes_stage2(config: ConfigDict) -> ConfigDict:
    """The paper's losses, masks, trainables and guidance of stage 2; rates, steps and text weight scaled.

    With the paper's text weight of 0.01, 0.13 of a story's pictures were not begun after 600 steps.
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
    """Prefix tuning in place of LoRA (390,562,816 trainable parameters, 4.4)."""
    config.model.backbone.update(lora_rank=0, prefix_tokens=5)
    config.tuning.rules = tuning.STAGE2_PREFIX
    return config


def keys_of(config: ConfigDict) -> dict[str, Key]:
    """Every key of this configuration by dotted path, its parts' keys included."""
    keys = dict(KEYS)
    for part, variants in PARTS.items():
        name = config.model[part].name
        keys[f"model.{part}.name"] = Key(
            name, f"{part}; `:{part}=NAME` behind the file chooses", tuple(variants)
        )
        keys |= {f"model.{part}.{key}": spec for key, spec in variants.get(name, {}).items()}
    return keys


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


def value_at(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = value[name]
    return value


def validate(config: ConfigDict) -> ConfigDict:
    """Check every value and how they go together.

    Raises:
      ConfigError: every problem on a line of its own, with the numbers and the remedy.
    """
    problems = [*_bad_values(config), *_conflicts(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _bad_values(config: ConfigDict) -> Iterator[str]:
    for path, key in keys_of(config).items():
        value = value_at(config, path)
        if value is None:
            continue
        if key.choices and value not in key.choices:
            yield f"{path}={value!r} is not one of {', '.join(map(repr, key.choices))}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{path}={value} is not a finite number"
        elif key.low is not None and value < key.low:
            yield f"{path}={value} is less than {key.low}"
        elif key.high is not None and value > key.high:
            yield f"{path}={value} is more than {key.high}"


def _conflicts(config: ConfigDict) -> Iterator[str]:
    data, run, model = config.data, config.run, config.model
    if data.global_batch % data.accumulation:
        yield (
            f"data.global_batch={data.global_batch} does not divide into data.accumulation="
            f"{data.accumulation} micro-batches; choose {_near(data.global_batch, data.accumulation)}"
        )
    samples = data.global_batch // data.accumulation
    if samples % data.pack:
        yield (
            f"data.pack={data.pack} does not divide the {samples} samples of a micro-batch; choose "
            f"{_near(samples, data.pack)}"
        )
    buckets = list(data.buckets)
    if buckets and (buckets != sorted(set(buckets)) or buckets[-1] != data.max_length):
        yield f"data.buckets={data.buckets} must ascend and end in data.max_length={data.max_length}"
    if buckets and data.pack > 1:
        yield "data.buckets and data.pack exclude each other; packed rows all have data.max_length positions"
    if data.features and data.flip_mode != "off":
        yield f"data.features are of pictures as they are; set data.flip_mode=off, it is {data.flip_mode!r}"
    if data.context_dropout and data.features:
        yield f"data.features are of whole contexts; set data.context_dropout=0, it is {data.context_dropout}"
    if data.context_dropout and data.format not in STORY_FORMATS:
        yield (
            f"data.context_dropout={data.context_dropout} is for stories (data.format "
            f"{', '.join(STORY_FORMATS)}); data.format is {data.format!r}"
        )
    if run.num_steps is not None and config.optimizer.warmup_steps >= run.num_steps:
        yield (
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be less than "
            f"run.num_steps={run.num_steps}"
        )
    if run.num_steps is None and run.epochs <= 0:
        yield "give run.num_steps, or run.epochs more than 0"
    if list(config.mesh.values()).count(-1) > 1 or 0 in config.mesh.values():
        yield f"mesh {config.mesh.to_dict()}: sizes are at least 1, and one may be -1 (what is left)"
    if not any((config.loss.text, config.loss.image, config.loss.caption)):
        yield "loss.text, loss.image and loss.caption are all 0; there is nothing to train on"
    if model.backbone.name == "minigpt4" and (model.backbone.vit == "none") != (
        model.backbone.qformer == "none"
    ):
        yield "model.backbone.vit and model.backbone.qformer are 'none' together or not at all"
    if model.backbone.name == "minigpt4" and model.backbone.lora_rank and model.backbone.prefix_tokens:
        yield "model.backbone.lora_rank and prefix_tokens exclude each other; set one of them to 0"
    if "nhead" in model.mapper and model.mapper.d_model % model.mapper.nhead:
        yield (
            f"model.mapper.d_model={model.mapper.d_model} does not divide into "
            f"model.mapper.nhead={model.mapper.nhead} heads"
        )
    yield from _bad_rules(config.tuning.rules)


def _bad_rules(rules: Iterable[Any]) -> Iterator[str]:
    groups = ("llm", "mapper", tuning.FROZEN)
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[1] in groups):
            yield f"tuning.rules: {rule!r} is not (pattern, group) with a group of {', '.join(groups)}"


def _near(batch: int, parts: int) -> str:
    lower, upper = batch // parts * parts, -(-batch // parts) * parts
    return f"a batch of {lower} or {upper}" if lower else f"a batch of {upper}"


def num_steps(config: ConfigDict, samples: int) -> int:
    """Updates of the run: ``run.num_steps``, or ``run.epochs`` over ``samples``."""
    if config.run.num_steps is not None:
        return config.run.num_steps
    return math.ceil(config.run.epochs * samples / config.data.global_batch)


def weight_sources(config: ConfigDict) -> dict[str, str]:
    """Name -> path for each of ``weights.*``, sub-folders filled in; '' where none was given."""
    given = {name: path for name, path in config.weights.items() if name != "stable_diffusion"}
    folder = config.weights.stable_diffusion
    for name, sub in SUBFOLDERS.items():
        if not given[name] and folder:
            given[name] = folder if folder == "shapes" else f"{folder.rstrip('/')}/{sub}"
    return given | {"tokenizer": given["tokenizer"] or given["llm"]}
