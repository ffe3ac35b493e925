"""What there is to know of a scene, as classes: the background, and the content of every place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from minigpt5_jax.shapes.render import cell_index
from minigpt5_jax.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scene,
    kinds,
    make_scene,
)

UNTOLD = -1  # class of an attribute of nothing
EMPTY = len(SHAPES)  # class of ``shape`` where a place is empty
CONTENT = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "texture": len(TEXTURES)}
"""Attribute of a place's content -> its classes."""
CLASSES: tuple[int, ...] = (len(BACKGROUNDS), *(n for _ in PLACES for n in CONTENT.values()))
"""Classes of every field: the background, then :data:`CONTENT` place by place."""


def labels(scenes: Sequence[Scene]) -> Int32[np.ndarray, "n f"]:
    """Class of every field of every scene; :data:`UNTOLD` for the attributes of an empty place."""
    made = np.full((len(scenes), len(CLASSES)), UNTOLD, np.int32)
    for row, scene in zip(made, scenes, strict=True):
        row[0] = scene.background
        row[1 :: len(CONTENT)] = EMPTY
        for item in scene.objects:
            start = 1 + item.place * len(CONTENT)
            row[start : start + len(CONTENT)] = item.shape, item.colour, item.size, item.texture
    return made


def scenes_of(found: Int32[np.ndarray, "n f"]) -> list[Scene]:
    """Inverse of :func:`labels`; of an empty place only ``shape`` is looked at."""
    scenes = []
    for row in found:
        contents = row[1:].reshape(len(PLACES), -1).tolist()
        objects = [
            Object(shape, colour, size, texture, place)
            for place, (shape, colour, size, texture) in enumerate(contents)
            if shape != EMPTY
        ]
        scenes.append(make_scene(int(row[0]), objects))
    return scenes


def training_contents() -> np.ndarray:
    """Cell indices of every object of the training split."""
    sizes = range(len(SIZES))
    return np.array([cell_index(Object(s, c, z, t, 0)) for s, c, t in kinds(False) for z in sizes])


def fields_of_place(place: int) -> Bool[np.ndarray, " f"]:
    """The fields that tell of the background and of one place."""
    marked = np.zeros(len(CLASSES), bool)
    start = 1 + place * len(CONTENT)
    marked[0] = marked[start : start + len(CONTENT)] = True
    return marked


def alone(item: Object) -> Int32[np.ndarray, " f"]:
    """Labels of an object without its scene: all other places empty, the background untold."""
    row = labels([Scene(0, (item,))])[0]
    row[0] = UNTOLD
    return row


def by_turns(count: int) -> Bool[np.ndarray, "count f"]:
    """One place for each of ``count`` positions, in turns: the code that positions carry it by."""
    return np.stack([fields_of_place(i % len(PLACES)) for i in range(count)])


def ask(
    labels: Int32[np.ndarray, "n f"],
    states: Bool[np.ndarray, "n t"],
    fields: Bool[np.ndarray, "t f"] | None = None,
) -> Int32[np.ndarray, "n t f"]:
    """Labels of marked states, each asked the fields of its position, or all; :data:`UNTOLD` elsewhere."""
    asked = states[:, :, None] if fields is None else states[:, :, None] & fields[None]
    return np.where(asked, labels[:, None], UNTOLD).astype(np.int32)
