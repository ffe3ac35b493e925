"""Scenes, the combinations held out of every training, and captions.

A scene is a coloured background with objects on a 2 x 2 grid of places.  An object has a shape, a
colour, a size, a texture and a place.  Ten (shape, colour, texture) triples never occur in training, of
backbones or vokens; every pair of their attributes does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "pink")
ATTRIBUTES = ("shape", "colour", "size", "texture", "place")

# Wordings of each attribute; the first is its name.  Captions draw one of them.
WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus"),
    "small": ("small", "tiny"), "large": ("large", "big"),
    "solid": ("solid", "plain"), "striped": ("striped",), "dotted": ("dotted", "spotted"),
    "top left": ("top left", "upper left"), "top right": ("top right", "upper right"),
    "bottom left": ("bottom left", "lower left"), "bottom right": ("bottom right", "lower right"),
}  # fmt: skip
FORMS = (
    "a {size} {texture} {colour} {shape} in the {place} on a {background} background",
    "a {background} picture with a {size} {colour} {texture} {shape} at the {place}",
    "in the {place} there is a {texture} {colour} {shape} that is {size} on {background}",
)


@dataclasses.dataclass(frozen=True)
class Object:
    """Indices into the attribute tables above."""

    shape: int
    colour: int
    size: int
    texture: int
    place: int

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
            "objects": [
                {
                    "shape": SHAPES[o.shape], "colour": COLOURS[o.colour], "size": SIZES[o.size],
                    "texture": TEXTURES[o.texture], "place": PLACES[o.place],
                }
                for o in self.objects
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict) -> Scene:
        """Inverse of :meth:`to_json`."""
        objects = tuple(
            Object(
                SHAPES.index(o["shape"]), COLOURS.index(o["colour"]), SIZES.index(o["size"]),
                TEXTURES.index(o["texture"]), PLACES.index(o["place"]),
            )
            for o in value["objects"]
        )  # fmt: skip
        return cls(BACKGROUNDS.index(value["background"]), objects)


HELD_OUT = frozenset(
    (shape, (shape + 3 * k) % len(COLOURS), (shape + k) % len(TEXTURES))
    for shape in range(len(SHAPES))
    for k in range(2)
)


def kinds(held_out: bool) -> list[tuple[int, int, int]]:
    """Every (shape, colour, texture) that is, or is not, held out."""
    triples = itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(TEXTURES)))
    return [triple for triple in triples if (triple in HELD_OUT) == held_out]


def all_scenes(held_out: bool) -> Iterator[Scene]:
    """Every one-object scene of a split: 2,560 in training, 320 held out."""
    for shape, colour, texture in kinds(held_out):
        for size, place in itertools.product(range(len(SIZES)), range(len(PLACES))):
            for background in range(len(BACKGROUNDS)):
                yield Scene(background, (Object(shape, colour, size, texture, place),))


def draw_scene(random: np.random.Generator, held_out: bool = False, count: int = 1) -> Scene:
    """A scene of ``count`` objects drawn uniformly; every object's kind is of the split."""
    choice = kinds(held_out)
    objects = []
    for place in sorted(random.choice(len(PLACES), count, replace=False)):
        shape, colour, texture = choice[random.integers(len(choice))]
        objects.append(Object(shape, colour, int(random.integers(len(SIZES))), texture, int(place)))
    return Scene(int(random.integers(len(BACKGROUNDS))), tuple(objects))


def caption(scene: Scene, random: np.random.Generator) -> str:
    """One of the wordings of a one-object scene, lower case, no punctuation (as CC3M is cleaned)."""
    if len(scene.objects) != 1:
        raise ValueError(f"captions are written for one object, the scene has {len(scene.objects)}")
    (item,) = scene.objects

    def word(name: str) -> str:
        choices = WORDS.get(name, (name,))
        return choices[random.integers(len(choices))]

    return FORMS[random.integers(len(FORMS))].format(
        shape=word(SHAPES[item.shape]),
        colour=COLOURS[item.colour],
        size=word(SIZES[item.size]),
        texture=word(TEXTURES[item.texture]),
        place=word(PLACES[item.place]),
        background=BACKGROUNDS[scene.background],
    )
