"""AdamW over the trainable groups, frozen leaves held by Optax masks (fidelity 4.1).

Every leaf of the full parameter dict carries a label; ``optax.partition`` gives each group its
own learning rate and ``set_to_zero`` to the frozen ones.  A frozen leaf's gradient is an
``optax.MaskedNode()``: it is never computed, has no optimizer state, and no norm is taken over it.

A part that no loss of an update reaches (the mapper, where all samples are text) has no gradient there, which
is something else than a gradient of zero: parameters, moments and their count stay, as torch leaves tensors
whose ``grad`` is None.  The schedule goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    ``grad_clip`` is a global norm over all trainable leaves together; it has no state, so that a run can be
    resumed with another one.

    ``update`` takes ``reached``, kind of part -> bool[] (:func:`minigpt5_jax.minigpt5.parts_with_gradient`);
    a part that is not reached does not move.  Without it every part moves.

    Raises:
      ValueError: if a group has no learning-rate schedule.
    """
    groups = set(labels.values()) - {FROZEN}
    if missing := sorted(groups - set(schedules)):
        raise ValueError(f"tuning groups {missing} have no learning rate; known: {sorted(schedules)}")
    kinds: dict[str, set[str]] = {}
    for path, group in labels.items():
        kinds.setdefault(group, set()).add(kind_of(path))
    transforms: dict[str, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    names = dict(labels)
    for path, group in labels.items():
        if group == FROZEN:
            continue
        kind = kind_of(path)
        if path.endswith(TABLE_DECAY):
            names[path] = path
        elif len(kinds[group]) > 1:  # counted apart: one of the parts may be reached where another is not
            names[path] = f"{group}/{kind}"
        if names[path] not in transforms:
            adamw = (optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay))
            steps = (shrink_tables(weight_decay),) if path.endswith(TABLE_DECAY) else adamw
            transforms[names[path]] = optax.chain(
                *(where_reached(step, kind) for step in steps), optax.scale_by_learning_rate(schedules[group])
            )
    optimizer = optax.partition(transforms, names)
    if grad_clip is None:
        return optimizer
    clip = optax.masked(
        optax.clip_by_global_norm(grad_clip), {path: group != FROZEN for path, group in labels.items()}
    )

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return optimizer.update(clip.update(grads, clip.init(grads))[0], state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def kind_of(path: str) -> str:
    """The kind of part that a parameter belongs to."""
    return path.split("/")[0]


def where_reached(inner: optax.GradientTransformation, kind: str) -> optax.GradientTransformationExtraArgs:
    """``inner`` for the parameters of one part: where no loss reaches it, no update, and its state stays."""

    def update(
        grads: Any, state: Any, params: Any = None, *, reached: Mapping[str, Any] | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        updates, after = inner.update(grads, state, params)
        if reached is None or kind not in reached:
            return updates, after
        return (
            jax.tree.map(lambda new: jnp.where(reached[kind], new, jnp.zeros_like(new)), updates),
            jax.tree.map(lambda new, old: jnp.where(reached[kind], new, old), after, state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


def shrink_tables(weight_decay: float) -> optax.GradientTransformation:
    """Step of ``TABLE_DECAY``: AdamW multiplies a row without gradient by ``1 - rate * weight_decay``.

    The share d that is lost is kept, not the factor 1 - d: a step of 2e-7 would be rounded by a third next
    to 1 in fp32.
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda d: weight_decay * (d - 1.0), params),
    )


def with_frozen_masked(tree: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """``tree`` of trainable leaves as a full tree, ``MaskedNode`` at every frozen path."""
    return {path: tree[path] if group != FROZEN else optax.MaskedNode() for path, group in labels.items()}
