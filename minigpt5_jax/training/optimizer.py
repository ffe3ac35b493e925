"""AdamW over the trainable groups, frozen leaves held by Optax masks (fidelity 4.1).

Every leaf of the full parameter dict carries a label; ``optax.partition`` gives each group its
own learning rate and ``set_to_zero`` to the frozen ones.  A frozen leaf's gradient is an
``optax.MaskedNode()``: it is never computed, has no optimizer state, and no norm is taken over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from minigpt5_jax.training.tuning import FROZEN, TABLE_DECAY


def linear_warmup_decay(learning_rate: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Linear from 0 over ``warmup_steps``, then linear to 0 at ``num_steps``; the first update has rate 0.

    The factor at 0-based step s is s/warmup, then (T-s)/(T-warmup) floored at 0 (fidelity 4.1).

    Raises:
      ValueError: if the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} must be at least 0 and less than "
            f"the {num_steps} steps of the run"
        )
    decay = optax.linear_schedule(learning_rate, 0.0, num_steps - warmup_steps)
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    labels: Mapping[str, str],
    schedules: Mapping[str, optax.Schedule],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_clip: float | None = None,
) -> optax.GradientTransformation:
    """Optimizer over the full tree described by ``labels`` (path -> group, ``"frozen"`` included).

    Decay acts on every trainable leaf, biases and norms included, and on no frozen row; but for a model
    that has ``TABLE_DECAY``, which keeps count of what decay has done to its frozen tables (Q3).
    ``grad_clip`` is a global norm over all trainable leaves together.

    Raises:
      ValueError: if a group has no learning-rate schedule.
    """
    groups = set(labels.values()) - {FROZEN}
    if missing := sorted(groups - set(schedules)):
        raise ValueError(f"tuning groups {missing} have no learning rate; known: {sorted(schedules)}")
    transforms: dict[str, optax.GradientTransformation] = {
        group: optax.adamw(schedules[group], b1, b2, eps, weight_decay=weight_decay)
        for group in sorted(groups)
    }
    transforms[FROZEN] = optax.set_to_zero()
    names = dict(labels)
    for path, group in labels.items():
        if path.endswith(TABLE_DECAY) and group != FROZEN:
            names[path] = path
            transforms[path] = shrink_tables(schedules[group], weight_decay)
    optimizer = optax.partition(transforms, names)
    if grad_clip is None:
        return optimizer
    trainable = {path: group != FROZEN for path, group in labels.items()}
    return optax.chain(optax.masked(optax.clip_by_global_norm(grad_clip), trainable), optimizer)


def shrink_tables(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Update of ``TABLE_DECAY``: AdamW multiplies a row without gradient by ``1 - rate * weight_decay``.

    The share d that is lost is kept, not the factor 1 - d: a step of 2e-7 would be rounded by a third next
    to 1 in fp32.
    """
    return optax.chain(
        optax.stateless(lambda updates, params: jax.tree.map(lambda d: weight_decay * (d - 1.0), params)),
        optax.scale_by_learning_rate(schedule),
    )


def with_frozen_masked(tree: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """``tree`` of trainable leaves as a full tree, ``MaskedNode`` at every frozen path."""
    return {path: tree[path] if group != FROZEN else optax.MaskedNode() for path, group in labels.items()}
