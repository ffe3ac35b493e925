"""Refuses settings that break a run, before weights are read."""

from __future__ import annotations

import math
import re

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, rate_groups
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import HARMLESS, CheckpointError, differences, plain, require_same
from minigpt5_jax.training.tuning import REST, label_parameters, rules_of
from minigpt5_jax.wiring.model import ModelSpec
from minigpt5_jax.wiring.restore import upgrade_meta

FIXED = ("config.model", "config.optimizer.decay_frozen_rows")
"""Settings that decide which parameters there are."""
SETTLED = ("data.accumulation", "mesh.tensor")
"""Settings that a run may leave to its devices, None then."""
LINE = "{}: checkpoint {!r}, this run {!r}"


def compare_settings(config: ConfigDict, spec: ModelSpec, checkpoints: Checkpoints) -> list[str]:
    """Every setting in which a run differs from the checkpoint that it goes on from, a line each.

    ``config`` is as it was given: what it leaves to the devices is no change.

    Raises:
      CheckpointError: another model, or other parameters train; each such setting with both values.
    """
    saved = {"config": upgrade_meta(checkpoints.meta())["config"]}
    here = {"config": plain(config.to_dict())}
    title = "the checkpoint is of another run; start in another workdir, or change these back:"
    require_same(saved, here, FIXED, title, LINE, allow=HARMLESS)
    tuning = saved["config"]["tuning"]
    rules = rules_of(spec.parts.values(), tuning["stage"], tuple(map(tuple, tuning["rules"])))
    shapes = spec.template.file_shapes
    if label_parameters(shapes, rules) != {path: spec.labels[path] for path in shapes}:
        title = "other parameters trained than would now; start in another workdir, or change this back:"
        require_same(saved, here, ("config.tuning",), title, LINE)
    found = {key.removeprefix("config."): pair for key, pair in differences(saved, here).items()}
    return [
        LINE.format(key, *pair) for key, pair in found.items() if key not in SETTLED or pair[1] is not None
    ]


def saved_accumulation(checkpoints: Checkpoints) -> int | None:
    """Micro-batches of an update in the newest checkpoint; None where there is no checkpoint."""
    return (
        None if checkpoints.latest_step is None else checkpoints.meta()["config"]["data"].get("accumulation")
    )


def check_end(config: ConfigDict, steps: int, checkpoints: Checkpoints) -> None:
    """Refuse a run that would end before the checkpoint that it goes on from.

    Raises:
      CheckpointError: with both steps and the remedy.
    """
    done = checkpoints.latest_step or 0
    if done > steps:
        raise CheckpointError(
            f"{config.run.workdir} is at step {done}, and this run would end at step {steps}: give "
            f"run.num_steps={done} or more (or run.epochs), or start in another workdir"
        )


def check_new_parameters(config: ConfigDict, spec: ModelSpec) -> None:
    """Refuse parameters that no file fills and no pattern names: they would stay as they were drawn.

    Raises:
      ConfigError: their number, the first of them, and the rule that trains them.
    """
    own = tuple((str(pattern), str(group)) for pattern, group in config.tuning.rules)
    rules = rules_of(spec.parts.values(), config.tuning.stage, own)
    named = [pattern for pattern, group in rules if (pattern, group) != REST]
    idle = [
        path
        for path, group in spec.labels.items()
        if group == FROZEN
        and path not in spec.pretrained
        and not any(re.fullmatch(pattern, path) for pattern in named)
    ]
    if not idle:
        return
    count = sum(math.prod(spec.template.shapes[path].shape) for path in idle)
    pattern, group = _training_rule(config, spec, idle[0])
    raise ConfigError(
        f"{count:,} new parameters would never train: tuning.stage={config.tuning.stage!r} has no pattern "
        f"for {idle[0]} ({len(idle)} paths).  To train them: "
        f'--config.tuning.rules="(({pattern!r}, {group!r}),)", or a second stage from this run '
        f"(run.init_from); to keep them as they start, the same with {FROZEN!r}; or switch off the "
        f"model.{idle[0].split('/')[0]} setting that makes them"
    )


def _training_rule(config: ConfigDict, spec: ModelSpec, path: str) -> tuple[str, str]:
    """(pattern, learning-rate group) that trains a path in some stage, or one for this path alone."""
    for part in spec.parts.values():
        for stage in part.trainable:
            for pattern, group in rules_of([part], stage)[:-1]:
                if group != FROZEN and re.fullmatch(pattern, path):
                    return pattern, group
    return re.escape(path), next(iter(rate_groups(config)))
