"""What the small world's language model and tokenizers read: captions, instructions, questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minigpt5_jax.data.prompts import CC3M_PROMPTS, CC3M_SYSTEM, DIALOG_SYSTEM, cc3m_instruction
from minigpt5_jax.data.templates import END, clean_caption
from minigpt5_jax.shapes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    FORMS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    caption,
    draw_scene,
)

VALUES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS, "shape": SHAPES, "colour": COLOURS, "size": SIZES,
    "texture": TEXTURES, "place": PLACES,
}  # fmt: skip
"""Everything a one-object scene is made of."""

QUESTIONS = {
    "background": ("what colour is the background?", "on what background is it?"),
    "shape": ("what shape is it?", "which shape do you see?"),
    "colour": ("what colour is the shape?", "which colour does it have?"),
    "size": ("how large is it?", "what size does it have?"),
    "texture": ("what texture does it have?", "is it solid, striped or dotted?"),
    "place": ("where is the shape?", "in which place is it?"),
}


def attributes(scene: Scene) -> dict[str, int]:
    """Value index of every attribute of a one-object scene, the background included."""
    (item,) = scene.objects
    return {"background": scene.background, **{name: getattr(item, name) for name in ATTRIBUTES}}


def labels(scenes: Sequence[Scene]) -> np.ndarray:
    """i32[n attributes] in the order of :data:`VALUES`."""
    return np.array([[attributes(scene)[name] for name in VALUES] for scene in scenes], np.int32)


def instruction(scene: Scene, random: np.random.Generator) -> str:
    """A caption as stage 1's instruction samples ask for its picture."""
    prompts = CC3M_PROMPTS["head"]
    return cc3m_instruction(clean_caption(caption(scene, random)), prompts[random.integers(len(prompts))])


def question(scene: Scene, random: np.random.Generator) -> tuple[str, str]:
    """(a caption and a question about it, the answer)."""
    name = tuple(VALUES)[random.integers(len(VALUES))]
    choices = QUESTIONS[name]
    asked = choices[random.integers(len(choices))]
    answer = VALUES[name][attributes(scene)[name]]
    return f"###Human: {clean_caption(caption(scene, random))} {asked} ###Assistant:", f"{answer} {END}"


def recall(scene: Scene, random: np.random.Generator) -> tuple[str, str]:
    """(a caption, the same scene in other words)."""
    first, second = (clean_caption(caption(scene, random)) for _ in range(2))
    return f"###Human: {first} ###Assistant:", f"{second} {END}"


def corpus(count: int = 4000, seed: int = 0) -> list[str]:
    """Lines a tokenizer is trained on: every kind of text in the proportions of their use."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        scene = draw_scene(random)
        lines += [caption(scene, random), caption(scene, random), instruction(scene, random)]
        lines += [" ".join(question(scene, random)), " ".join(recall(scene, random))]
    return lines + [CC3M_SYSTEM, DIALOG_SYSTEM] * 20


def caption_words() -> list[str]:
    """Every word that captions are made of."""
    values = [name for names in VALUES.values() for name in names]
    spoken = [word for name in values for word in WORDS.get(name, (name,))]
    frames = [form.format(**dict.fromkeys(VALUES, "")) for form in FORMS]
    return sorted({word for text in spoken + frames for word in text.split()})
