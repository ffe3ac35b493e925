"""The papers' numbers beside which ours are set, and what their orderings claim.

Tables are those of the newer paper; "old" ones those of the first version (fidelity 8.3, 8.4).  Figures 5
and 6 were published as plots only: their claims are the text's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.shapes.stories import TABLE_6

LABELS = {
    "plain": "MiniGPT-5 (plain)",
    "no_cfg": "w/o CFG dropout",
    "no_cap": "w/o L_CAP",
    "no_ldm": "w/o L_LDM",
    "fixed_queries": "fixed queries",
    "decoder_only": "decoder-only",
    "lora": "LoRA",
    "prefix": "prefix tuning",
    "no_stage1": "w/o stage 1",
    "zero_shot": "stage 1 only (zero-shot)",
}

CC3M = ("CLIP-I", "CLIP-T", "IS", "FID")
TABLE5 = {
    "plain": (0.61, 0.22, 28.09, 31.47),
    "no_cfg": (0.60, 0.22, 23.41, 33.73),
    "no_cap": (0.54, 0.16, 21.27, 40.24),
    "no_ldm": (0.58, 0.20, 24.79, 34.65),
}
TABLE7 = {
    "plain": (0.61, 0.22, 28.09, 31.47),
    "fixed_queries": (0.60, 0.21, 28.55, 30.56),
    "decoder_only": (0.58, 0.20, 24.74, 34.88),
}
TABLE6 = {
    "zero_shot": (0.54, 0.57, 0.57, 0.57),
    "prefix": (0.60, 0.63, 0.68, 0.70),
    "lora": tuple(TABLE_6[name] for name in CONTEXTS),
    "no_stage1": (0.55, 0.57, 0.58, 0.58),
}
"""CLIP-I on the last step of a story, by context; "w/o stage 1" is of the old Table 1."""
STEPS = {"lora": (0.66, 366.62), "prefix": (0.65, 381.55), "no_stage1": (0.57, 420.79)}
"""CLIP-I and FID over all steps of a story: Table 1; "w/o stage 1" of the old Table 2."""
NARRATION = {
    "GILL": (0.3864, 0.1784, 0.1951),
    "MiniGPT-4": (0.6273, 0.3401, 0.3296),
    "MiniGPT-5": (0.6315, 0.3373, 0.3263),
}
"""S-BERT, ROUGE-L and METEOR of narrations: Table 2."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering of the paper.

    Attributes:
      text: what is compared.  terms: (weight, variant, metric): our side is their weighted sum.
      expected: its sign by the paper; 0 for no difference.  paper: where that is from.
    """

    text: str
    terms: tuple[tuple[float, str, str], ...]
    expected: int
    paper: str


def sign(value: float) -> int:
    """-1, 0 or 1."""
    return (value > 0) - (value < 0)


def minus(text: str, first: tuple[str, str], second: tuple[str, str], expected: int, paper: str) -> Claim:
    """A claim about ``first - second``, each (variant, metric)."""
    return Claim(text, ((1.0, *first), (-1.0, *second)), expected, paper)


def orderings(table: Mapping[str, tuple[float, ...]], metric: str, name: str) -> list[Claim]:
    """Every pair of rows of a table by its first column, CLIP-I, where more is better."""
    claims = []
    for first, second in itertools.combinations(table, 2):
        ours, theirs = table[first][0], table[second][0]
        claims.append(
            minus(
                f"{LABELS[first]} against {LABELS[second]}",
                (first, metric),
                (second, metric),
                sign(round(ours - theirs, 6)),
                f"{name}: CLIP-I {ours:.2f} and {theirs:.2f}",
            )
        )
    return claims


def context_claims(variants: Iterable[str], metric: str) -> list[Claim]:
    """Table 6: each context against the next, and with all context against none; ``metric`` has a slot."""
    claims = []
    for variant in variants:
        values = dict(zip(CONTEXTS, TABLE6[variant]))
        for less, more in [*itertools.pairwise(CONTEXTS), (CONTEXTS[0], CONTEXTS[-1])]:
            claims.append(
                minus(
                    f"{LABELS[variant]}: {more} against {less}",
                    (variant, metric.format(more)),
                    (variant, metric.format(less)),
                    sign(round(values[more] - values[less], 6)),
                    f"Table 6: CLIP-I {values[more]:.2f} and {values[less]:.2f}",
                )
            )
    return claims


VOKENS = {"vokens_1": 1, "vokens_2": 2, "vokens_4": 4, "plain": 8, "vokens_16": 16}
"""The paper stops at 8."""
GUIDANCE_CLAIMS = [
    minus(
        "guidance 7.5 against 1",
        ("guidance_7.5", "all"),
        ("guidance_1", "all"),
        1,
        "Figure 5: better with the scale up to 10",
    ),
    minus(
        "guidance 10 against 1",
        ("guidance_10", "all"),
        ("guidance_1", "all"),
        1,
        "Figure 5: better with the scale up to 10",
    ),
    minus(
        "guidance 10 against 5",
        ("guidance_10", "all"),
        ("guidance_5", "all"),
        1,
        "Figure 5: better with the scale up to 10",
    ),
    minus(
        "guidance 15 against 10",
        ("guidance_15", "all"),
        ("guidance_10", "all"),
        0,
        "Figure 5: beyond 10 quality (IS, FID) falls, coherence (CLIP) stays; what is right is coherence",
    ),
]
VOKEN_CLAIMS = [
    *(
        minus(
            f"{VOKENS[more]} vokens against {VOKENS[less]}",
            (more, "all"),
            (less, "all"),
            1,
            "Figure 6: better with more vokens",
        )
        for less, more in itertools.pairwise(list(VOKENS)[:4])
    ),
    Claim(
        "gain from 1 to 4 against gain from 4 to 8",
        ((2.0, "vokens_4", "all"), (-1.0, "vokens_1", "all"), (-1.0, "plain", "all")),
        1,
        "Figure 6: the most between 1 and 4",
    ),
]
