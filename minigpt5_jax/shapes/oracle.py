"""The oracle: reads background and every object back from pixels.

The background with the least summed error over places wins, then each place takes its nearest content.
``python -m benchmarks.oracle`` prints how far its verdict can be trusted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num

from minigpt5_jax.shapes.render import CELL, cells, scenes_of_cells
from minigpt5_jax.shapes.world import ATTRIBUTES, BACKGROUNDS, Scene


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    flat = cells().astype(np.float32).reshape(-1, CELL * CELL * 3) / 127.5 - 1.0
    return flat, np.square(flat).sum(1)


def read(images: Num[np.ndarray, "n 64 64 3"]) -> list[Scene]:
    """Scene in each image, u8 or float in 0 ... 255."""
    count = len(images)
    parts = images.astype(np.float32).reshape(count, 2, CELL, 2, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    parts = parts.reshape(count * 4, -1) / 127.5 - 1.0
    templates, norms = _templates()
    # |part - template|^2 without |part|^2, which is the same for all templates
    error = (norms - 2.0 * parts @ templates.T).reshape(count, 4, -1, len(BACKGROUNDS))
    backgrounds = error.min(2).sum(1).argmin(-1)
    contents = error[np.arange(count), :, :, backgrounds].argmin(-1)
    return scenes_of_cells(contents, backgrounds)


def score(images: Num[np.ndarray, "n 64 64 3"], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of images in which everything is right (``all``), the background, and each attribute.

    An attribute is right where the objects, in order of their places, have the scene's values of it.
    """
    if len(images) != len(scenes) or not len(scenes):
        raise ValueError(f"{len(images)} images and {len(scenes)} scenes")
    rows = [_compare(got, want) for got, want in zip(read(images), scenes, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def right(images: Num[np.ndarray, "n 64 64 3"], scenes: Sequence[Scene]) -> np.ndarray:
    """bool[n]: everything right."""
    return np.array([got == want for got, want in zip(read(images), scenes, strict=True)])


def _compare(got: Scene, want: Scene) -> dict[str, bool]:
    result = {"all": got == want, "background": got.background == want.background}
    for name in ATTRIBUTES:
        result[name] = [getattr(o, name) for o in got.objects] == [getattr(o, name) for o in want.objects]
    return result
