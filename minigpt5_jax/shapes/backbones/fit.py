"""A small supervised loop for the backbones of the small world: AdamW, one cycle, EMA, progress.

A fit with a ``checkpoint`` goes on where it was stopped: batches are a function of the step, so the
result is the one an undisturbed fit gives.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

Params = Any
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
SAVE_EVERY = 120.0  # seconds
GATHERING_LAYERS = 2  # by then the last word of an object holds it


class FitError(ValueError):
    """A fit cannot go on from a file; the message names it and the remedy."""


def fit(
    loss: Loss,
    params: Params,
    batch: Callable[[int], Any],
    *,
    steps: int,
    seed: int,
    name: str,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.99,
    warmup: float = 0.05,
    weight_decay: float = 1e-2,
    report_every: int = 100,
    checkpoint: Path | None = None,
) -> tuple[Params, float]:
    """Minimise ``loss(params, batch(step), key) -> (value, metrics)``.

    Returns the exponential moving average of the parameters and the seconds in all.  ``checkpoint`` is
    written every two minutes and at the end, and resumed if it is of a fit with the same settings.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, int(warmup * steps)), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state, batch, key):
        params, ema, opt_state = state
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        return (params, ema, opt_state), {"loss": value, **metrics}

    root = jax.random.key(seed)
    state = (jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params), optimizer.init(params))
    settings = f"{name} {steps} {learning_rate} {seed} {ema_decay} {warmup} {weight_decay}"
    state, done, earlier = _restore(checkpoint, state, settings)
    start = saved = time.time()
    window: dict[str, list[jax.Array]] = {}
    with tqdm(total=steps, initial=done, desc=name, mininterval=5.0) as bar:
        for number in range(done, steps):
            state, metrics = step(state, batch(number), jax.random.fold_in(root, number))
            for key, value in metrics.items():
                window.setdefault(key, []).append(value)
            bar.update()
            last = number + 1 == steps
            if (number + 1) % report_every == 0 or last:
                shown = {key: float(np.mean(jax.device_get(values))) for key, values in window.items()}
                line = " ".join(f"{key}={value:.4f}" for key, value in shown.items())
                tqdm.write(f"{name} {number + 1}/{steps} {earlier + time.time() - start:.0f}s {line}")
                window = {}
            if checkpoint is not None and (last or time.time() - saved > SAVE_EVERY):
                _save(checkpoint, state, settings, number + 1, earlier + time.time() - start)
                saved = time.time()
    return state[1], earlier + time.time() - start


def unit_gain(params: Params) -> Params:
    """Kernels of a fresh tower scaled so that they keep the size of what they are given.

    The 0.02 of the full-size towers leaves attention flat at a width of 128.
    """
    scaled = dict(params)
    for path, value in params.items():
        if path.endswith("kernel") and "lm_head" not in path:
            convolution = "conv" in path or "patch_embed" in path
            fan_in = math.prod(value.shape[:-1]) if convolution else value.shape[-2]
            scaled[path] = value / (value.std() * math.sqrt(fan_in))
    return scaled


def in_parts(function: Callable[..., Any], size: int, *arrays: np.ndarray) -> np.ndarray:
    """``function(*arrays)``, ``size`` rows at a time."""
    starts = range(0, len(arrays[0]), size)
    return np.concatenate([np.asarray(function(*(a[i : i + size] for a in arrays))) for i in starts])


def lower_layers(params: Params, layers: str) -> Params:
    """The parameters of a tower that ends after :data:`GATHERING_LAYERS` under the path ``layers``."""
    return {path: v[:GATHERING_LAYERS] if path.startswith(layers) else v for path, v in params.items()}


def _identity(state: Any, settings: str) -> str:
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(state)]
    return hashlib.sha256(f"{settings} {shapes}".encode()).hexdigest()


def _save(path: Path, state: Any, settings: str, done: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with partial.open("wb") as file:
        np.savez(file, identity=_identity(state, settings), done=done, seconds=seconds, **arrays)
    os.replace(partial, path)


def _restore(path: Path | None, state: Any, settings: str) -> tuple[Any, int, float]:
    """(state, steps done, seconds spent): what the file holds, or ``state`` where there is none.

    Raises:
      FitError: the file is of a fit with other settings.
    """
    if path is None or not path.is_file():
        return state, 0, 0.0
    with np.load(path) as held:
        if str(held["identity"]) != _identity(state, settings):
            raise FitError(f"{path} is of a fit with other settings; delete it to start again")
        leaves = [jnp.asarray(held[str(i)]) for i in range(len(jax.tree.leaves(state)))]
        done, seconds = int(held["done"]), float(held["seconds"])
    return jax.tree.unflatten(jax.tree.structure(state), leaves), done, seconds
