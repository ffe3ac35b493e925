"""What each row must reach, and where the number comes from.  Data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

SOURCE = "issue 19, section 4 (performance.md 5, revised)"
START = "issue 21 (performance.md 5, revised)"


@dataclasses.dataclass(frozen=True)
class Goal:
    """Bounds that all must hold.

    Attributes:
      at_least, at_most: name of a value of the line -> bound.
      limit: what is physically possible, where it is a constant and not measured beside.
      source: of the bounds.
    """

    at_least: Mapping[str, float] = dataclasses.field(default_factory=dict)
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    source: str = SOURCE

    def described(self) -> str:
        """The bounds in words."""
        bounds = [f"{name} >= {bound:g}" for name, bound in self.at_least.items()]
        return ", ".join(bounds + [f"{name} <= {bound:g}" for name, bound in self.at_most.items()])

    def met(self, values: Mapping[str, float | None]) -> bool | None:
        """Whether all bounds hold; None where a value could not be measured."""
        named = [values.get(name) for name in (*self.at_least, *self.at_most)]
        if not named or any(value is None for value in named):
            return None
        return all(values[name] >= bound for name, bound in self.at_least.items()) and all(
            values[name] <= bound for name, bound in self.at_most.items()
        )


LIMITS = "issue 21 (performance.md 5)"
GOALS: dict[tuple[int | str, str], Goal] = {
    # TFLOP a sample: performance.md 1.2 with the caption features in the step (2.097 + 0.045), and 1.3.
    (3, "stage 1"): Goal(
        {"ratio": 1.62}, {"over_minimum": 1.03, "frozen_gradients": 0, "peer_off": 0.03}, limit=2.142
    ),
    (3, "stage 2"): Goal({"ratio": 2.9}, {"over_minimum": 1.08, "frozen_gradients": 0}, limit=2.95),
    (4, "loss"): Goal({}, {"ours": 1e-5}, limit=0.0),
    (4, "gradients"): Goal({}, {"ours": 1e-5}, limit=0.0),
    ("5b", "UNet, v5e"): Goal({}, {"ours": 6.0}, limit=2.28, source=LIMITS),
    (6, "stage 1, int8, v5e"): Goal({}, {"ours": 13.0}, source=LIMITS),
    (6, "stage 2, int8, v5e"): Goal({}, {"ours": 15.0}, source=LIMITS),
    (6, "generation, int8, v5e"): Goal({}, {"ours": 11.0}, source=LIMITS),
    (6, "stage 1, bf16, GPU"): Goal({}, {"ours": 22.0}, source=LIMITS),
    ("7b", "decode, v5e"): Goal({}, {"ours": 1.1}, limit=1.0, source=LIMITS),
    ("7b", "decode, H100"): Goal({}, {"ours": 1.1}, limit=1.0, source=LIMITS),
    (9, "import"): Goal({}, {"ours": 3.0}, source=START),
    (9, "first step"): Goal({"ratio": 2.0}, source=START),
    (12, "P1"): Goal({"ratio": 1.4}),
    (12, "P2 eager"): Goal({"ratio": 0.85}),
    (12, "P2 torch.compile"): Goal(source="no goal: printed apart"),
    (13, "decode, batch 1"): Goal({"ratio": 1.2, "same_tokens": 1.0}),
    (13, "decode, batch 8"): Goal({"ratio": 1.0, "same_tokens": 1.0}),
    (13, "image, batch 1"): Goal({"ratio": 1.0}, {"difference": 1.0}),
    (13, "image, batch 4"): Goal({"ratio": 1.0}, {"difference": 1.0}),
}
P1_TFLOP = 3.577
"""What the original's stage-1 step does for a sample (performance.md 1.2)."""
