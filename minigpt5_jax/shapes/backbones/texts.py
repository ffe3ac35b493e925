"""Texts besides stories and dialogues: captions, instructions, questions, and the same about images."""

from __future__ import annotations

import numpy as np

from minigpt5_jax.data.text.prompts import (
    CC3M_PROMPTS,
    CC3M_SYSTEM,
    DIALOG_SYSTEM,
    STORY_PROMPTS,
    STORY_SYSTEM,
    cc3m_instruction,
)
from minigpt5_jax.data.text.templates import END, IMAGE, clean_caption
from minigpt5_jax.shapes.dialogs import draw_dialog
from minigpt5_jax.shapes.stories import draw_story
from minigpt5_jax.shapes.wording import answer_to, caption, choose, describe, words_of
from minigpt5_jax.shapes.world import Scene, draw_scene

QUESTIONS = {
    "background": ("what colour is the background?", "on what background is it?"),
    "count": ("how many shapes are there?",),
    "shape": ("what shape is in the {place}?", "which shape do you see in the {place}?"),
    "colour": ("what colour is the {shape} in the {place}?", "which colour has the shape in the {place}?"),
    "size": ("how large is the {shape} in the {place}?", "what size has the shape in the {place}?"),
    "texture": ("what texture has the {shape} in the {place}?", "is the {shape} solid, striped or dotted?"),
    "place": ("where is the {colour} {shape}?", "in which place is the {texture} {shape}?"),
}
DESCRIBE = ("describe this picture.", "what do you see here?", "what is in this picture?")
COUNT_SHARES = (0.3, 0.35, 0.35)  # of scenes with one, two, three objects

Sample = tuple[str, str]
"""(what is read, what is written)."""


def draw_training_scene(random: np.random.Generator) -> Scene:
    """A training scene of one to three objects."""
    return draw_scene(random, count=1 + int(random.choice(len(COUNT_SHARES), p=COUNT_SHARES)))


def instruction(scene: Scene, random: np.random.Generator) -> str:
    """A caption as stage 1's instruction samples ask for its image."""
    return cc3m_instruction(clean_caption(caption(scene, random)), choose(CC3M_PROMPTS["head"], random))


def asked(scene: Scene, random: np.random.Generator) -> Sample:
    """(a question about the scene, the answer)."""
    item = scene.objects[random.integers(len(scene.objects))]
    name = str(random.choice(list(QUESTIONS)))
    return choose(QUESTIONS[name], random).format(**words_of(item, random)), answer_to(name, scene, item)


def question(scene: Scene, random: np.random.Generator) -> Sample:
    """A caption and a question about it."""
    ask, answer = asked(scene, random)
    return f"###Human: {clean_caption(caption(scene, random))} {ask} ###Assistant:", f"{answer} {END}"


def recall(scene: Scene, random: np.random.Generator) -> Sample:
    """A caption, and the same scene in other words."""
    first, second = (clean_caption(caption(scene, random)) for _ in range(2))
    return f"###Human: {first} ###Assistant:", f"{second} {END}"


def description(scene: Scene, random: np.random.Generator) -> Sample:
    """An image, and what is in it."""
    ask = choose(DESCRIBE, random)
    return f"###Human: {IMAGE} {ask} ###Assistant:", f"{clean_caption(describe(scene))} {END}"


def image_question(scene: Scene, random: np.random.Generator) -> Sample:
    """An image and a question about it."""
    ask, answer = asked(scene, random)
    return f"###Human: {IMAGE} {ask} ###Assistant:", f"{answer} {END}"


def corpus(count: int = 2000, seed: int = 0) -> list[str]:
    """Lines a tokenizer is trained on: every kind of text in the proportions of their use."""
    random, lines = np.random.default_rng(seed), []
    for _ in range(count):
        scene = draw_training_scene(random)
        lines += [caption(scene, random), instruction(scene, random), " ".join(question(scene, random))]
        lines += [step.text for step in draw_story(random).steps]
        lines += [turn.text for turn in draw_dialog(random)]
    requests = [form for forms in STORY_PROMPTS["head"].values() for form in forms]
    return lines + [CC3M_SYSTEM, DIALOG_SYSTEM, STORY_SYSTEM, *requests] * (count // 50)
