"""Dialogues about images: turns that call for an image, and turns that call for words only.

Even turns are the human's, odd ones the assistant's, two and two an exchange.  MMDialog's reader shows
a turn two or three turns of its past (fidelity 5.4), so a request or question that needs an image comes
only right after an exchange that has one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minigpt5_jax.shapes.wording import answer_to, caption, choose, word, words_of
from minigpt5_jax.shapes.world import (
    ALL_KINDS,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    TEXTURES,
    Object,
    Scene,
    draw_newcomer,
    draw_scene,
    free_places,
    kinds,
    make_scene,
)

EXCHANGES = (2, 3, 4)
OBJECTS_AT_START = (0.6, 0.4)  # shares of one and two objects in images asked for or shown
OBJECTS_AT_MOST = 3
STARTS = {"show": 0.75, "look": 0.25}
AFTER_IMAGE = {"edit": 0.45, "ask": 0.3, "show": 0.1, "look": 0.1, "thank": 0.05}
AFTER_WORDS = {"show": 0.6, "look": 0.3, "thank": 0.1}

SHOW = (
    "show me this: {caption}.",
    "please draw: {caption}.",
    "i want to see {caption}.",
    "can you draw {caption}?",
)
ADJECTIVES = ("size", "texture", "colour")
SHOWN = ("here it is.", "here you are.", "this is it.")
LOOK = ("look at my picture.", "here is a picture of mine.", "what do you see here?")
SEEN = ("i see {caption}.", "it shows {caption}.")
THANK = (("thank you.", "you are welcome."), ("that is all.", "good bye."))
DONE = ("done.", "like this?", "here you are.")
EDITS = {
    "move": ("move {name} to the {place}.", "put {name} in the {place}."),
    "turn": ("make {name} {colour}.", "paint {name} {colour}."),
    "resize": ("make {name} {size}.",),
    "texture": ("make {name} {texture}.",),
    "background": ("make the background {background}.", "put it on {background}."),
    "add": ("add a {size} {texture} {colour} {shape} in the {place}.",),
    "remove": ("take {name} away.", "remove {name}."),
}
QUESTIONS = {
    "colour": ("what colour is {name}?", "which colour does {name} have?"),
    "size": ("what size is {name}?", "is {name} small or large?"),
    "texture": ("what texture does {name} have?", "is {name} solid, striped or dotted?"),
    "place": ("where is {name}?",),
    "shape": ("what shape is it?", "which shape do you see?"),
    "background": ("what colour is the background?",),
    "count": ("how many shapes are there?",),
}
ANSWERS = {"place": "{name} is in the {value}.", "count": "{value}.", "shape": "it is a {value}."}
ANSWER = "{name} is {value}."


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
      text: words; never empty, as MMDialog's reader stops at an empty turn.
      scene: of the image that comes with it, or None.
      kind: of the exchange it belongs to.
      answer: (what was asked, the right value) of the assistant's turn of an ``ask``.
    """

    text: str
    scene: Scene | None
    kind: str
    answer: tuple[str, str] | None = None

    def to_json(self) -> dict:
        """The truth of this turn; ``wants_image`` counts for the assistant's turns."""
        return {
            "text": self.text,
            "kind": self.kind,
            "wants_image": self.scene is not None,
            "scene": self.scene and self.scene.to_json(),
            "answer": self.answer and {"asked": self.answer[0], "value": self.answer[1]},
        }


class _Talk:
    """A dialogue while it is made up; ``scene`` is the image in sight, if any."""

    def __init__(self, random: np.random.Generator, held_out: bool):
        self.random, self.held_out = random, held_out
        self.scene: Scene | None = None
        self.turns: list[Turn] = []

    def exchange(self, kind: str) -> None:
        """Two turns more."""
        human, assistant = getattr(self, kind)()
        self.turns += [human, assistant]
        self.scene = assistant.scene or human.scene

    def new_scene(self) -> Scene:
        """Shapes of their own kind each, so that every one has a name."""
        while True:
            count = 1 + int(self.random.choice(len(OBJECTS_AT_START), p=OBJECTS_AT_START))
            scene = draw_scene(self.random, self.held_out, count)
            if len({item.shape for item in scene.objects}) == count:
                return scene

    def show(self) -> tuple[Turn, Turn]:
        scene = self.new_scene()
        asked = choose(SHOW, self.random).format(caption=caption(scene, self.random))
        return Turn(asked, None, "show"), Turn(choose(SHOWN, self.random), scene, "show")

    def wish(self) -> tuple[Turn, Turn]:
        """A request that leaves attributes open, which the image then has in some way."""
        scene = draw_scene(self.random, self.held_out)
        words = words_of(scene.objects[0], self.random)
        said = [words[name] for name in ADJECTIVES if self.random.random() < 0.5]
        where = f" in the {words['place']}" if self.random.random() < 0.25 else ""
        wish = f"a {' '.join([*said, words['shape']])}{where}"
        asked = choose(SHOW, self.random).format(caption=wish)
        return Turn(asked, None, "show"), Turn(choose(SHOWN, self.random), scene, "show")

    def look(self) -> tuple[Turn, Turn]:
        scene = self.new_scene()
        told = choose(SEEN, self.random).format(caption=caption(scene, self.random))
        return Turn(choose(LOOK, self.random), scene, "look"), Turn(told, None, "look")

    def thank(self) -> tuple[Turn, Turn]:
        said, answered = THANK[self.random.integers(len(THANK))]
        return Turn(said, None, "thank"), Turn(answered, None, "thank")

    def edit(self) -> tuple[Turn, Turn]:
        scene = self.scene
        few, many = len(scene.objects) == 1, len(scene.objects) == OBJECTS_AT_MOST
        left_out = {"remove"} if few else {"add"} if many else set()
        change = str(self.random.choice([name for name in EDITS if name not in left_out]))
        chosen = scene.objects[self.random.integers(len(scene.objects))]
        background, objects, spoken = scene.background, list(scene.objects), chosen
        if change == "background":
            background = self.other(background, len(BACKGROUNDS))
        elif change == "add":
            choice = ALL_KINDS if self.held_out else kinds(False)
            spoken = draw_newcomer(self.random, scene.objects, choice)
            objects.append(spoken)
        else:
            objects.remove(chosen)
            if change != "remove":
                spoken = self.changed(scene, chosen, change)
                objects.append(spoken)
        words = words_of(spoken, self.random) | {"background": BACKGROUNDS[background]}
        asked = choose(EDITS[change], self.random).format(name=self.name(scene, chosen), **words)
        answer = Turn(choose(DONE, self.random), make_scene(background, objects), "edit")
        return Turn(asked, None, "edit"), answer

    def ask(self) -> tuple[Turn, Turn]:
        scene = self.scene
        about = [name for name in QUESTIONS if name != ("shape" if len(scene.objects) > 1 else "")]
        asked = str(self.random.choice(about))
        item = scene.objects[self.random.integers(len(scene.objects))]
        name = "the background" if asked == "background" else self.name(scene, item)
        value = answer_to(asked, scene, item)
        question = choose(QUESTIONS[asked], self.random).format(name=name)
        answer = ANSWERS.get(asked, ANSWER).format(name=name, value=value)
        return Turn(question, None, "ask"), Turn(answer, None, "ask", (asked, value))

    def name(self, scene: Scene, item: Object) -> str:
        """What it is called: "it" when it is alone."""
        shape = f"the {word(SHAPES[item.shape], self.random)}"
        return choose(("it", shape), self.random) if len(scene.objects) == 1 else shape

    def other(self, value: int, count: int) -> int:
        return (value + 1 + int(self.random.integers(count - 1))) % count

    def changed(self, scene: Scene, item: Object, change: str) -> Object:
        """The object after a change; of a kind that may be shown."""
        while True:
            if change == "move":
                place = int(self.random.choice(free_places(scene.objects)))
                return dataclasses.replace(item, place=place)
            if change == "resize":
                return dataclasses.replace(item, size=1 - item.size)
            if change == "turn":
                new = dataclasses.replace(item, colour=self.other(item.colour, len(COLOURS)))
            else:
                new = dataclasses.replace(item, texture=self.other(item.texture, len(TEXTURES)))
            if self.held_out or new.kind not in HELD_OUT:
                return new


def draw_dialog(random: np.random.Generator, held_out: bool = False, wishes: float = 0.0) -> tuple[Turn, ...]:
    """Turns of a dialogue; images of a held-out one are asked for with held-out kinds.

    ``wishes`` is the share of dialogues whose first request leaves attributes open ("a large red circle").
    """
    talk = _Talk(random, held_out)
    for number in range(int(random.choice(EXCHANGES))):
        if not number and wishes and random.random() < wishes:
            talk.exchange("wish")
            continue
        shares = STARTS if not number else AFTER_IMAGE if talk.scene else AFTER_WORDS
        talk.exchange(str(random.choice(list(shares), p=list(shares.values()))))
    return tuple(talk.turns)
