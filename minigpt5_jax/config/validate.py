"""What is checked of a configuration before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from minigpt5_jax.config.errors import ConfigError
from minigpt5_jax.config.make import expand_paths, keys_of, part_settings, parts_of, rate_groups, value_at
from minigpt5_jax.parts.contracts import FROZEN

STORY_FORMATS = ("vist", "prepared", "shapes_stories")
"""``data.format`` of what may be stories."""


def validate(config: ConfigDict) -> ConfigDict:
    """Check every value and how they go together, and replace the ``~`` of paths, which enter here.

    Raises:
      ConfigError: every problem on a line of its own, with the numbers and the remedy.
    """
    expand_paths(config)
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
    data, run = config.data, config.run
    micro = data.accumulation or 1
    if data.global_batch % micro:
        yield (
            f"data.global_batch={data.global_batch} does not divide into data.accumulation="
            f"{micro} micro-batches; choose {_near(data.global_batch, micro)}"
        )
    samples = data.global_batch // micro
    if data.pack and samples % data.pack:
        yield (
            f"data.pack={data.pack} does not divide the {samples} samples of a micro-batch; choose "
            f"{_near(samples, data.pack)}"
        )
    yield from _bad_packing(config)
    buckets = list(data.buckets)
    if buckets and (buckets != sorted(set(buckets)) or buckets[-1] != data.max_length):
        yield f"data.buckets={data.buckets} must ascend and end in data.max_length={data.max_length}"
    if data.features and data.flip_mode != "off" and data.flip_each_epoch:
        yield "data.features are of images that are mirrored once and for all; set data.flip_each_epoch=False"
    if data.context_dropout and data.features:
        yield f"data.features are of whole contexts; set data.context_dropout=0, it is {data.context_dropout}"
    if data.context_dropout and data.format not in STORY_FORMATS:
        yield (
            f"data.context_dropout={data.context_dropout} is for stories (data.format "
            f"{', '.join(STORY_FORMATS)}); data.format is {data.format!r}"
        )
    if run.num_steps is None and run.epochs <= 0:
        yield "give run.num_steps, or run.epochs more than 0"
    sizes = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor") if config.mesh[axis] is not None}
    if list(sizes.values()).count(-1) > 1 or 0 in sizes.values():
        yield f"mesh {sizes}: sizes are at least 1, and one may be -1 (what is left)"
    settings, parts = part_settings(config), parts_of(config)
    own = [settings[kind][f"loss_{name}"] for kind, part in parts.items() for name in part.losses]
    if not any((config.loss.text, config.loss.image, config.loss.caption, *own)):
        yield "loss.text, loss.image and loss.caption are all 0; there is nothing to train on"
    for kind, part in parts.items():
        yield from part.conflicts(settings[kind])
    yield from _bad_rules(config)


def _bad_packing(config: ConfigDict) -> Iterator[str]:
    data = config.data
    if data.pack > 1 and data.packing != "shuffled":
        yield f"data.pack={data.pack} is for data.packing=shuffled, it is {data.packing!r}; set data.pack=0"
    if data.packing != "tree":
        return
    if data.format not in STORY_FORMATS:
        yield (
            f"data.packing=tree is for stories (data.format {', '.join(STORY_FORMATS)}); data.format is "
            f"{data.format!r}, so set data.packing=shuffled"
        )
    if data.context_dropout:
        yield (
            "data.packing=tree shares whole contexts; set data.context_dropout=0, it is "
            f"{data.context_dropout}, or data.packing=shuffled"
        )
    if data.buckets:
        yield (
            f"data.buckets={data.buckets} are lengths of single samples; with data.packing=tree those of "
            "rows follow from the stories, so set data.buckets=()"
        )
    if not parts_of(config)["backbone"].reads_trees:
        yield (
            f"backbone {config.model.backbone.name!r} does not read trees (Part.reads_trees); set "
            "data.packing=shuffled"
        )


def _bad_rules(config: ConfigDict) -> Iterator[str]:
    groups = (*rate_groups(config), FROZEN)
    for rule in config.tuning.rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[1] in groups):
            yield f"tuning.rules: {rule!r} is not (pattern, group) with a group of {', '.join(groups)}"


def _near(batch: int, parts: int) -> str:
    lower, upper = batch // parts * parts, -(-batch // parts) * parts
    return f"a batch of {lower} or {upper}" if lower else f"a batch of {upper}"
