"""Five-step stories: at each step something happens to one of the shapes.

A story has a subject, which stays to the end, and up to two companions, which come and go.  In a stated
share of stories the text never describes the subject, so its shape, colour and texture can be known from
earlier images only; what was told, step by step, is kept with the story.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minigpt5_jax.shapes.wording import choose, word, words_of
from minigpt5_jax.shapes.world import (
    ALL_KINDS,
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PLACES,
    SIZES,
    Object,
    Scene,
    draw_newcomer,
    free_places,
    kinds,
    make_scene,
)

STEPS = 5
IMAGE_ONLY_SHARE = 0.5  # of stories whose text never describes the subject
OBJECTS_AT_MOST = 3
COMPANION_AT_START = 0.25  # share of stories that begin with one
EVENTS = {"move": 0.3, "resize": 0.2, "turn": 0.2, "join": 0.2, "leave": 0.1}

OPENINGS = (
    "there is a {size} {texture} {colour} {shape} in the {place} on a {background} background .",
    "a {size} {colour} {texture} {shape} waits in the {place} , all is {background} .",
    "in the {place} lives a {texture} {colour} {shape} that is {size} , on {background} .",
)
SILENT_OPENINGS = (
    "there it is , in the {place} .",
    "a shape waits in the {place} .",
    "look , something is in the {place} .",
)
BESIDE = ("a {size} {texture} {colour} {shape} is in the {place} .",)
MOVES = ("{name} moves to the {place} .", "{name} goes to the {place} .", "now {name} is in the {place} .")
RESIZES = ("{name} becomes {size} .", "now {name} is {size} .", "{name} turns {size} .")
TURNS = ("{name} turns {colour} .", "{name} becomes {colour} .", "now {name} is {colour} .")
JOINS = (
    "a {size} {texture} {colour} {shape} comes to the {place} .",
    "a {size} {colour} {texture} {shape} appears in the {place} .",
)
LEAVES = ("{name} leaves .", "{name} goes away .")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A shape in a story: what it is now, and which attributes the texts up to now have told."""

    item: Object
    told: frozenset[str]
    is_subject: bool

    def now(self, **changes: int) -> Seen:
        """With changed attributes, which the text tells."""
        return Seen(dataclasses.replace(self.item, **changes), self.told | set(changes), self.is_subject)


@dataclasses.dataclass(frozen=True)
class Step:
    """One image and its sentence.

    Attributes:
      text: tokenised and in lower case, as VIST's.  event: what happened.
      shapes: everything in the image, the subject first.  background: index.
      background_told: whether the texts up to now have told the background.
      revealed: attributes of the subject (and ``background``) that earlier images show as they are
        now, and no text up to now has told.
    """

    text: str
    event: str
    shapes: tuple[Seen, ...]
    background: int
    background_told: bool
    revealed: tuple[str, ...]

    @property
    def scene(self) -> Scene:
        """What the image shows."""
        return make_scene(self.background, (seen.item for seen in self.shapes))

    def to_json(self) -> dict:
        """The truth of this step, readable by people."""
        subject = self.shapes[0]
        return {
            "text": self.text,
            "event": self.event,
            "scene": self.scene.to_json(),
            "subject_place": PLACES[subject.item.place],
            "subject_told": sorted(subject.told),
            "background_told": self.background_told,
            "only_images": list(self.revealed),
        }


@dataclasses.dataclass(frozen=True)
class Story:
    """Steps, and whether their texts leave the subject undescribed."""

    image_only: bool
    steps: tuple[Step, ...]


class _Teller:
    """A story while it is made up."""

    def __init__(self, random: np.random.Generator, held_out: bool):
        self.random, self.held_out = random, held_out
        self.image_only = bool(random.random() < IMAGE_ONLY_SHARE)
        self.background = int(random.integers(len(BACKGROUNDS)))
        self.shapes: list[Seen] = []
        self.steps: list[Step] = []

    # -- the world of this story --

    def allowed(self, shape: int, colour: int, texture: int) -> bool:
        """Whether an object may look so: training shows no held-out kind."""
        return self.held_out or (shape, colour, texture) not in HELD_OUT

    def items(self) -> list[Object]:
        return [seen.item for seen in self.shapes]

    def new_object(self, held_out_kind: bool = False) -> Object:
        """Of a shape that nothing here has, so that its name is its own."""
        choice = kinds(True) if held_out_kind else ALL_KINDS if self.held_out else kinds(False)
        return draw_newcomer(self.random, self.items(), choice)

    # -- names --

    def name(self, seen: Seen) -> str:
        """What a text calls it; a companion by its colour and shape, the subject as told as it is."""
        spoken = words_of(seen.item, self.random)
        full = f"the {spoken['colour']} {spoken['shape']}"
        if not seen.is_subject:
            return full
        alone = len(self.shapes) == 1
        if self.image_only:
            return choose(("it", "the shape") if alone else ("it", "the first shape"), self.random)
        return choose(("it", full, f"the {spoken['shape']}"), self.random)

    # -- events; each changes the shapes and returns its sentence --

    def opening(self) -> str:
        item = self.new_object(held_out_kind=self.held_out)
        told = frozenset({"place"}) if self.image_only else frozenset(ATTRIBUTES)
        self.shapes.append(Seen(item, told, is_subject=True))
        form = choose(SILENT_OPENINGS if self.image_only else OPENINGS, self.random)
        text = form.format(background=BACKGROUNDS[self.background], **words_of(item, self.random))
        if self.random.random() < COMPANION_AT_START:
            text += " " + self.join(BESIDE)
        return text

    def move(self) -> str:
        seen, name = self.somebody()
        place = int(self.random.choice(free_places(self.items())))
        self.put(seen, seen.now(place=place))
        return choose(MOVES, self.random).format(name=name, place=word(PLACES[place], self.random))

    def resize(self) -> str:
        seen, name = self.somebody()
        size = 1 - seen.item.size
        self.put(seen, seen.now(size=size))
        return choose(RESIZES, self.random).format(name=name, size=word(SIZES[size], self.random))

    def turn(self) -> str:
        seen, name = self.somebody()
        item = seen.item
        colours = [
            colour
            for colour in range(len(COLOURS))
            if colour != item.colour and self.allowed(item.shape, colour, item.texture)
        ]
        colour = int(self.random.choice(colours))
        self.put(seen, seen.now(colour=colour))
        return choose(TURNS, self.random).format(name=name, colour=COLOURS[colour])

    def join(self, forms: tuple[str, ...] = JOINS) -> str:
        item = self.new_object()
        self.shapes.append(Seen(item, frozenset(ATTRIBUTES), is_subject=False))
        return choose(forms, self.random).format(**words_of(item, self.random))

    def leave(self) -> str:
        seen = self.shapes[self.random.integers(1, len(self.shapes))]
        text = choose(LEAVES, self.random).format(name=self.name(seen))
        self.shapes.remove(seen)
        return text

    def somebody(self) -> tuple[Seen, str]:
        """The subject in most cases, and what it is called."""
        at = 0
        if len(self.shapes) > 1 and self.random.random() < 0.25:
            at = int(self.random.integers(1, len(self.shapes)))
        return self.shapes[at], self.name(self.shapes[at])

    def put(self, old: Seen, new: Seen) -> None:
        self.shapes[self.shapes.index(old)] = new

    def happens(self) -> tuple[str, str]:
        """(event, sentence) of a step after the first."""
        possible = dict(EVENTS)
        if len(self.shapes) == OBJECTS_AT_MOST:
            del possible["join"]
        if len(self.shapes) == 1:
            del possible["leave"]
        shares = np.array(list(possible.values()))
        event = str(self.random.choice(list(possible), p=shares / shares.sum()))
        return event, getattr(self, event)()

    def add_step(self, event: str, text: str) -> None:
        before, subject = (self.steps[-1] if self.steps else None), self.shapes[0]
        revealed = []
        if before is not None:
            revealed = [
                name
                for name in ATTRIBUTES
                if name not in subject.told
                and getattr(subject.item, name) == getattr(before.shapes[0].item, name)
            ]
            revealed += ["background"] * self.image_only
        self.steps.append(
            Step(text, event, tuple(self.shapes), self.background, not self.image_only, tuple(revealed))
        )


def draw_story(random: np.random.Generator, held_out: bool = False) -> Story:
    """A story; the subject of a held-out one begins as a held-out kind, a training one shows none."""
    teller = _Teller(random, held_out)
    teller.add_step("opening", teller.opening())
    for _ in range(STEPS - 1):
        teller.add_step(*teller.happens())
    return Story(teller.image_only, tuple(teller.steps))
