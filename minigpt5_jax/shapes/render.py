"""Scenes to pixels: sprites drawn once, then looked up (a scene takes microseconds)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from minigpt5_jax.shapes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Object, Scene

CELL = 32  # side of a place in pixels
IMAGE_SIZE = 2 * CELL
OVERSAMPLE = 4
RADII = {"small": 10.0, "large": 15.0}
PERIOD = 6.0  # of stripes and dots, in pixels
RGB = {
    "red": (215, 40, 45),
    "green": (40, 165, 65),
    "blue": (45, 85, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 55, 190),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "pink": (250, 190, 205),
}


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Whether points (y down, origin at the centre) lie in a shape of a radius."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance <= 0.95 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.95 * radius
    if shape == "triangle":
        return (y <= 0.8 * radius) & (abs(x) <= (y + radius) * 0.55)
    if shape == "star":  # five points; the radius falls linearly with the angle from the nearest point
        angle = np.arctan2(x, -y) % (2 * np.pi / 5)
        nearest = np.minimum(angle, 2 * np.pi / 5 - angle)
        return distance <= radius * (1.05 - 0.95 * nearest)
    arm = 0.33 * radius
    return ((abs(x) <= arm) | (abs(y) <= arm)) & (np.maximum(abs(x), abs(y)) <= 0.95 * radius)


def _light(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a texture shows its light colour."""
    if texture == "striped":
        return (y / PERIOD) % 1.0 < 0.5
    if texture == "dotted":
        return np.hypot((x / PERIOD) % 1.0 - 0.5, (y / PERIOD) % 1.0 - 0.5) < 0.3
    return np.zeros(x.shape, bool)


@functools.cache
def cells() -> UInt8[np.ndarray, "n b 32 32 3"]:
    """Every content of a place on every background; index 0 is empty, then :func:`cell_index` order."""
    side = (np.arange(CELL * OVERSAMPLE) + 0.5) / OVERSAMPLE - CELL / 2
    y, x = np.meshgrid(side, side, indexing="ij")
    backgrounds = np.array([RGB[name] for name in BACKGROUNDS], np.float32)
    out = np.empty((1 + number_of_objects(), len(BACKGROUNDS), CELL, CELL, 3), np.uint8)
    out[0] = backgrounds[:, None, None].round().astype(np.uint8)
    for s, shape in enumerate(SHAPES):
        for z, size in enumerate(SIZES):
            mask = _inside(shape, x, y, RADII[size])
            for t, texture in enumerate(TEXTURES):
                light = mask & _light(texture, x, y)
                cover, bright = (_shrink(m.astype(np.float32))[None, ..., None] for m in (mask, light))
                for c, colour in enumerate(COLOURS):
                    rgb = np.array(RGB[colour], np.float32)
                    pale = 0.25 * rgb + 0.75 * 255.0
                    pixels = (1 - cover) * backgrounds[:, None, None] + (cover - bright) * rgb + bright * pale
                    out[cell_index(Object(s, c, z, t, 0))] = pixels.round().astype(np.uint8)
    out.flags.writeable = False
    return out


def _shrink(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(CELL, OVERSAMPLE, CELL, OVERSAMPLE).mean((1, 3))


def number_of_objects() -> int:
    """Different objects in one place."""
    return len(SHAPES) * len(COLOURS) * len(SIZES) * len(TEXTURES)


def cell_index(item: Object | None) -> int:
    """Place content of an object in :func:`cells`; 0 for none."""
    if item is None:
        return 0
    index = (item.shape * len(COLOURS) + item.colour) * len(SIZES) + item.size
    return 1 + index * len(TEXTURES) + item.texture


def object_of(index: int, place: int) -> Object | None:
    """Inverse of :func:`cell_index`."""
    if index == 0:
        return None
    rest, texture = divmod(index - 1, len(TEXTURES))
    rest, size = divmod(rest, len(SIZES))
    shape, colour = divmod(rest, len(COLOURS))
    return Object(shape, colour, size, texture, place)


def render_cells(contents: np.ndarray, backgrounds: np.ndarray) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Images from cell indices [n 4] (places in order) and backgrounds [n]."""
    parts = cells()[contents, backgrounds[:, None]]  # [n 4 32 32 3]
    grid = parts.reshape(-1, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(grid.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))


def scenes_of_cells(contents: np.ndarray, backgrounds: np.ndarray) -> list[Scene]:
    """The scenes that :func:`render_cells` shows, given the same."""
    scenes = []
    for background, row in zip(backgrounds, contents, strict=True):
        found = (object_of(int(index), place) for place, index in enumerate(row))
        scenes.append(Scene(int(background), tuple(item for item in found if item is not None)))
    return scenes


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Images of scenes."""
    contents = np.zeros((len(scenes), 4), np.int64)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            contents[row, item.place] = cell_index(item)
    return render_cells(contents, np.array([scene.background for scene in scenes]))
