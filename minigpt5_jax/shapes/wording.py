"""Words for scenes: captions in varied wording, and reading them back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from minigpt5_jax.shapes.world import ATTRIBUTES, BACKGROUNDS, NAMES, Object, Scene

# Wordings of each value; the first is its name.  Captions draw one of them.
WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "small": ("small", "tiny"),
    "large": ("large", "big"),
    "solid": ("solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "top left": ("top left", "upper left"),
    "top right": ("top right", "upper right"),
    "bottom left": ("bottom left", "lower left"),
    "bottom right": ("bottom right", "lower right"),
}
FORMS = (
    "a {size} {texture} {colour} {shape} in the {place} on a {background} background",
    "a {background} picture with a {size} {colour} {texture} {shape} at the {place}",
    "in the {place} there is a {texture} {colour} {shape} that is {size} on {background}",
)
"""A scene of one object."""
PHRASES = (
    "a {size} {texture} {colour} {shape} in the {place}",
    "a {size} {colour} {texture} {shape} at the {place}",
    "a {texture} {colour} {shape} that is {size} in the {place}",
    "in the {place} a {size} {texture} {colour} {shape}",
)
"""An object among several."""
SCENE_FORMS = (
    "{objects} on a {background} background",
    "a {background} picture with {objects}",
    "on a {background} background there are {objects}",
    "{count} shapes on {background}, {objects}",
)
JOINTS = (", ", " and ")
COUNTS = ("none", "one", "two", "three")


def word(name: str, random: np.random.Generator) -> str:
    """One of the wordings of a value."""
    choices = WORDS.get(name, (name,))
    return choices[random.integers(len(choices))]


def choose(forms: Sequence[str], random: np.random.Generator) -> str:
    """One of several forms."""
    return forms[random.integers(len(forms))]


def words_of(item: Object, random: np.random.Generator) -> dict[str, str]:
    """A wording of each attribute of an object, to be put into a form."""
    return {name: word(value, random) for name, value in item.names.items()}


def answer_to(asked: str, scene: Scene, item: Object) -> str:
    """Name of what is asked: the ``background`` or ``count`` of a scene, or an attribute of its object."""
    if asked == "background":
        return BACKGROUNDS[scene.background]
    return COUNTS[len(scene.objects)] if asked == "count" else item.names[asked]


def caption(scene: Scene, random: np.random.Generator) -> str:
    """One of the wordings of a scene of one to three objects, lower case, as CC3M is cleaned.

    Raises:
      ValueError: another number of objects.
    """
    background = BACKGROUNDS[scene.background]
    if len(scene.objects) == 1:
        form = choose(FORMS, random)
        return form.format(background=background, **words_of(scene.objects[0], random))
    if not 2 <= len(scene.objects) < len(COUNTS):
        raise ValueError(f"captions are written for one to three objects, the scene has {len(scene.objects)}")
    order = random.permutation(len(scene.objects))
    phrases = [choose(PHRASES, random).format(**words_of(scene.objects[i], random)) for i in order]
    joint = choose(JOINTS, random)
    return choose(SCENE_FORMS, random).format(
        objects=joint.join(phrases[:-1]) + " and " + phrases[-1],
        background=background,
        count=COUNTS[len(phrases)],
    )


def describe(scene: Scene) -> str:
    """The one way in which an image is described: place first, so that one is looked at at a time."""
    phrases = [PHRASES[-1].format(**item.names) for item in scene.objects]
    return f"a {BACKGROUNDS[scene.background]} picture with " + " and ".join(phrases)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a text says of a scene.

    Attributes:
      background: index, or None where the text does not say.
      objects: attribute -> index of what is said of each object, in the order of the text.
    """

    background: int | None
    objects: tuple[dict[str, int], ...]

    def scene(self) -> Scene | None:
        """The scene, where everything was said of every object; else None."""
        whole = [item for item in self.objects if item.keys() == set(ATTRIBUTES)]
        places = {item["place"] for item in whole}
        if self.background is None or len(places) != len(self.objects):
            return None
        objects = sorted((Object(**item) for item in whole), key=lambda item: item.place)
        return Scene(self.background, tuple(objects))


def caption_words() -> list[str]:
    """Every word that captions are made of, commas aside."""
    values = [value for values in (BACKGROUNDS, *NAMES.values()) for value in values]
    spoken = [text for value in values for text in WORDS.get(value, (value,))]
    frames = [re.sub(r"[{][a-z]+[}]|,", " ", form) for form in (*FORMS, *PHRASES, *SCENE_FORMS, *JOINTS)]
    return sorted({name for text in (*spoken, *frames, *COUNTS[1:]) for name in text.split()})


_VALUES = {
    spoken: (name, index)
    for name, values in {"background": BACKGROUNDS, **NAMES}.items()
    for index, value in enumerate(values)
    for spoken in WORDS.get(value, (value,))
}
_SPOKEN = re.compile(r"\b(" + "|".join(sorted(_VALUES, key=len, reverse=True)) + r")\b")
_SEPARATORS = re.compile(r",|\band\b|\bwith\b|$")


def clauses(text: str) -> Iterator[tuple[int, dict[str, int]]]:
    """(where it ends, attribute -> index) of every clause: up to a comma, "and", "with" or the end.

    Where a value is named twice in a clause, the first one counts.
    """
    start = 0
    for separator in _SEPARATORS.finditer(text):
        found: dict[str, int] = {}
        for spoken in _SPOKEN.findall(text, start, separator.start()):
            name, index = _VALUES[spoken]
            found.setdefault(name, index)
        yield len(text[: separator.start()].rstrip()), found
        start = separator.end()


def ends_of_objects(text: str) -> list[tuple[int, Object]]:
    """(where its clause ends, object) of every object that a caption says everything of."""
    ends = []
    for end, found in clauses(text):
        item = {name: index for name, index in found.items() if name != "background"}
        if item.keys() == set(ATTRIBUTES):
            ends.append((end, Object(**item)))
    return ends


def understand(text: str) -> Description:
    """What a caption says, whatever its wording; a clause that names a shape tells of one object."""
    background, objects = None, []
    for _, found in clauses(text.lower()):
        seen = found.pop("background", None)
        background = seen if background is None else background
        if "shape" in found:
            objects.append(found)
    return Description(background, tuple(objects))
