"""A small supervised loop for the backbones of the small world: AdamW, one cycle, EMA, progress."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

Params = Any
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def fit(
    loss: Loss,
    params: Params,
    batches: Iterator[Any],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    name: str,
    ema_decay: float = 0.99,
    warmup: float = 0.05,
    weight_decay: float = 1e-2,
    report_every: int = 100,
) -> tuple[Params, float]:
    """Minimise ``loss(params, batch, key) -> (value, metrics)``.

    Returns the exponential moving average of the parameters and the seconds it took.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, int(warmup * steps)), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, ema, opt_state, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        return params, ema, opt_state, {"loss": value, **metrics}

    start, root = time.time(), jax.random.key(seed)
    params, ema = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)
    window: dict[str, list[jax.Array]] = {}
    with tqdm(total=steps, desc=name, mininterval=5.0) as bar:
        for number in range(steps):
            batch = next(batches)
            params, ema, opt_state, metrics = step(
                params, ema, opt_state, batch, jax.random.fold_in(root, number)
            )
            for key, value in metrics.items():
                window.setdefault(key, []).append(value)
            bar.update()
            if (number + 1) % report_every == 0 or number + 1 == steps:
                shown = {key: float(np.mean(jax.device_get(values))) for key, values in window.items()}
                line = " ".join(f"{key}={value:.4f}" for key, value in shown.items())
                tqdm.write(f"{name} {number + 1}/{steps} {time.time() - start:.0f}s {line}")
                window = {}
    return ema, time.time() - start
