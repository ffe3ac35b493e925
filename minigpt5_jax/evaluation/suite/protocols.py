"""Protocols: which metrics a task has under each, and every switch that changes their numbers.

``paper`` scores as MiniGPT-5's code did, quirks included; ``standard`` as the field does today.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from minigpt5_jax.config import ConfigError
from minigpt5_jax.evaluation.metrics.networks import CLEAN_UPS
from minigpt5_jax.evaluation.metrics.pixels import INCEPTION_RESIZES
from minigpt5_jax.evaluation.metrics.relevance import MMREL
from minigpt5_jax.evaluation.metrics.statistics import IS_CHUNKS
from minigpt5_jax.evaluation.metrics.text import BLEU_UNITS

PROTOCOLS = ("paper", "standard")
TASKS = {
    "pairs": "CC3M: an image for each caption",
    "stories": "VIST: the image of every step, after the texts and images before it",
    "last_step": "VIST: the image of the last step, by --context",
    "narration": "VIST: the text of every step but the first, from its image",
    "dialogs": "MMDialog and the user's own records: every answer",
}
DRAWN = ("pairs", "stories", "last_step")
"""Tasks whose samples all want an image."""


@dataclasses.dataclass(frozen=True)
class Switches:
    """What changes a number; each is named in the results.

    Attributes:
      inception_weights: ``published`` refuses another file than that of FID; ``other`` takes any, and calls
        the scores ``..._other_network``.
      inception_resize: to 299 x 299 (:data:`INCEPTION_RESIZES`).
      fid_resize: shorter side of images before that, for FID and KID; ``none``.
      fid_target: real images as they are ``stored``, or as training reads targets (``white_square``: on a
        white square, 512 x 512).
      clip_target: the same, for CLIP-I.
      is_chunks: rule of the Inception Score.  kid_subset: images of a subset of KID.
      clip_activation: of CLIP where no ``config.json`` says it.  clip_tokenizer: clean-up of texts.
      missing_image: where one is wanted and not there: ``error``, ``skip`` or ``zero`` (Q45).
      bleu_unit, rouge, mmrel: forms of these scores (Q41, Q49).
      text_mean: mean over ``samples``, or over the means of stories and dialogues (``groups``).
      dummy_token: the text of the first token that the original leaves in predictions (Q42), ``kept`` or
        ``stripped``.
    """

    inception_weights: str = "published"
    inception_resize: str = "tf1"
    fid_resize: str = "256"
    fid_target: str = "white_square"
    clip_target: str = "white_square"
    is_chunks: str = "torchmetrics"
    kid_subset: str = "1000"
    clip_activation: str = "quick_gelu"
    clip_tokenizer: str = "open_clip"
    missing_image: str = "skip"
    bleu_unit: str = "char"
    rouge: str = "rouge"
    mmrel: str = "m5"
    text_mean: str = "groups"
    dummy_token: str = "kept"


ALLOWED: dict[str, Sequence[str]] = {
    "inception_weights": ("published", "other"),
    "inception_resize": INCEPTION_RESIZES,
    "fid_target": ("stored", "white_square"),
    "clip_target": ("stored", "white_square"),
    "is_chunks": IS_CHUNKS,
    "clip_activation": ("quick_gelu", "gelu"),
    "clip_tokenizer": CLEAN_UPS,
    "missing_image": ("error", "skip", "zero"),
    "bleu_unit": BLEU_UNITS,
    "rouge": ("rouge", "rouge_score"),
    "mmrel": MMREL,
    "text_mean": ("samples", "groups"),
    "dummy_token": ("kept", "stripped"),
}
"""Values of switches; the others are numbers."""

STANDARD = {
    "inception_resize": "clean",
    "fid_resize": "none",
    "fid_target": "stored",
    "clip_target": "stored",
    "is_chunks": "fidelity",
    "clip_tokenizer": "none",
    "bleu_unit": "word",
    "rouge": "rouge_score",
    "mmrel": "official",
    "text_mean": "samples",
    "dummy_token": "stripped",
}
"""Where ``standard`` differs from ``paper``."""

_IMAGES = ("clip_i", "clip_t", "clip_score", "fid", "kid", "inception_score", "cmmd")
_TEXTS = ("bleu_1", "bleu_2", "sacrebleu", "rouge_l", "meteor", "cider_d", "s_bert")
_PLACED = ("image_precision", "image_recall", "image_f1", "image_exact")
METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {
        "pairs": ("clip_i", "clip_t", "inception_score", "fid"),
        "stories": ("clip_i", "fid_per_story", "inception_score", "fid"),
        "last_step": ("clip_i", "inception_score", "fid"),
        "narration": ("s_bert", "rouge_l", "meteor"),
        "dialogs": ("inception_score", "bleu_1", "bleu_2", "rouge_l", "s_bert", "mm_relevance"),
    },
    "standard": {
        "pairs": ("image_recall", *_IMAGES, "clip_score_captioning"),
        "stories": ("image_recall", *_IMAGES, "fid_per_story"),
        "last_step": ("image_recall", *_IMAGES),
        "narration": _TEXTS,
        "dialogs": (*_PLACED, *_TEXTS, "mm_relevance", "clip_i", "fid", "kid", "inception_score"),
    },
}
"""Protocol -> task -> its metrics, in the order they are printed."""
ORACLE = tuple(
    f"oracle_{name}" for name in ("all", "background", "shape", "colour", "size", "texture", "place")
)
"""What is added for the small world, whose images can be read exactly."""
EVERY = tuple(
    dict.fromkeys(
        [name for tasks in METRICS.values() for some in tasks.values() for name in some] + [*ORACLE]
    )
)


def switches_of(protocol: str, task: str, given: Mapping[str, str] | None = None) -> Switches:
    """The switches of a protocol for a task, some replaced.

    Raises:
      ConfigError: an unknown protocol, task, switch or value.
    """
    if protocol not in PROTOCOLS or task not in TASKS:
        raise ConfigError(
            f"protocol {protocol!r}, task {task!r}: known are {', '.join(PROTOCOLS)} and {', '.join(TASKS)}"
        )
    values = dict(STANDARD) if protocol == "standard" else {}
    if protocol == "paper" and task == "pairs":
        values["fid_target"] = "stored"  # every file of the validation folder, as it is (Q47)
    if protocol == "paper" and task == "narration":
        values["text_mean"] = "samples"  # of one number a step, means of stories are not mentioned
    if given:
        _check(given)
    return Switches(**{**values, **(given or {})})


def _check(given: Mapping[str, str]) -> None:
    names = [field.name for field in dataclasses.fields(Switches)]
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"unknown switch {name!r}; known: {', '.join(names)}")
        if name in ALLOWED and value not in ALLOWED[name]:
            raise ConfigError(f"--switch {name}={value} is none of {', '.join(ALLOWED[name])}")
        number = value.isascii() and value.isdigit() and int(value) > 1
        if name not in ALLOWED and not (number or (name == "fid_resize" and value == "none")):
            raise ConfigError(f"--switch {name}={value} must be a whole number above 1")


def metrics_of(protocol: str, task: str, named: Sequence[str], oracle: bool) -> tuple[str, ...]:
    """The metrics to compute: those that are ``named``, else those of the protocol.

    Raises:
      ConfigError: an unknown metric.
    """
    if unknown := [name for name in named if name not in EVERY]:
        raise ConfigError(f"unknown metric {', '.join(unknown)}; known: {', '.join(EVERY)}")
    shown = METRICS[protocol][task]
    return tuple(dict.fromkeys(named)) or (*shown, *(ORACLE if oracle else ()))
