"""Scenes, and the combinations held out of every training.

A scene is a coloured background with objects on a 2 x 2 grid of places.  An object has a shape, a
colour, a size, a texture and a place.  Ten (shape, colour, texture) triples never occur in training, of
backbones or vokens; every pair of their attributes does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "pink")
NAMES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
    "place": PLACES,
}
"""Values of every attribute of an object."""
ATTRIBUTES = tuple(NAMES)


@dataclasses.dataclass(frozen=True)
class Object:
    """Indices into the attribute tables above."""

    shape: int
    colour: int
    size: int
    texture: int
    place: int

    @property
    def names(self) -> dict[str, str]:
        """The name of each attribute."""
        return {name: values[getattr(self, name)] for name, values in NAMES.items()}

    @property
    def kind(self) -> tuple[int, int, int]:
        """The triple that decides whether it is held out."""
        return self.shape, self.colour, self.texture


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and its objects, in order of places; at most one object per place."""

    background: int
    objects: tuple[Object, ...]

    def __post_init__(self):
        places = [item.place for item in self.objects]
        if places != sorted(set(places)):
            raise ValueError(f"objects must be in order of distinct places, got places {places}")

    @property
    def held_out(self) -> bool:
        """Whether any object is of a kind that training never shows."""
        return any(item.kind in HELD_OUT for item in self.objects)

    def to_json(self) -> dict:
        """Attribute names, readable by people."""
        return {
            "background": BACKGROUNDS[self.background],
            "objects": [item.names for item in self.objects],
        }

    @classmethod
    def from_json(cls, value: dict) -> Scene:
        """Inverse of :meth:`to_json`."""
        objects = (
            Object(**{name: values.index(item[name]) for name, values in NAMES.items()})
            for item in value["objects"]
        )
        return cls(BACKGROUNDS.index(value["background"]), tuple(objects))


HELD_OUT = frozenset(
    (shape, (shape + 3 * k) % len(COLOURS), (shape + k) % len(TEXTURES))
    for shape in range(len(SHAPES))
    for k in range(2)
)


ALL_KINDS = tuple(itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(TEXTURES))))


@functools.cache
def kinds(held_out: bool) -> tuple[tuple[int, int, int], ...]:
    """Every (shape, colour, texture) that is, or is not, held out."""
    return tuple(triple for triple in ALL_KINDS if (triple in HELD_OUT) == held_out)


def all_scenes(held_out: bool) -> Iterator[Scene]:
    """Every one-object scene of a split: 2,560 in training, 320 held out."""
    for shape, colour, texture in kinds(held_out):
        for size, place in itertools.product(range(len(SIZES)), range(len(PLACES))):
            for background in range(len(BACKGROUNDS)):
                yield Scene(background, (Object(shape, colour, size, texture, place),))


def draw_scene(random: np.random.Generator, held_out: bool = False, count: int = 1) -> Scene:
    """A scene of ``count`` objects drawn uniformly.

    In a training scene no object is of a held-out kind; in a held-out one at least one is, and the
    others are of any kind.
    """
    chosen = [_draw(random, kinds(held_out))]
    chosen += [_draw(random, ALL_KINDS if held_out else kinds(False)) for _ in range(count - 1)]
    places = random.choice(len(PLACES), count, replace=False)
    objects = [
        Object(shape, colour, int(random.integers(len(SIZES))), texture, int(place))
        for place, (shape, colour, texture) in zip(places, chosen, strict=True)
    ]
    return make_scene(int(random.integers(len(BACKGROUNDS))), objects)


def _draw(random: np.random.Generator, choice: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    return choice[random.integers(len(choice))]


def draw_newcomer(
    random: np.random.Generator, present: Sequence[Object], choice: Sequence[tuple[int, int, int]]
) -> Object:
    """An object of one of the kinds of ``choice``, at a free place and of a shape that none present has."""
    there = {item.shape for item in present}
    shape, colour, texture = _draw(random, [kind for kind in choice if kind[0] not in there])
    place = random.choice(free_places(present))
    return Object(shape, colour, int(random.integers(len(SIZES))), texture, int(place))


def free_places(present: Iterable[Object]) -> list[int]:
    """Places where none of the objects stands."""
    taken = {item.place for item in present}
    return [place for place in range(len(PLACES)) if place not in taken]


def make_scene(background: int, objects: Iterable[Object]) -> Scene:
    """A scene of objects in any order.

    Raises:
      ValueError: two of them are in one place.
    """
    return Scene(background, tuple(sorted(objects, key=lambda item: item.place)))
