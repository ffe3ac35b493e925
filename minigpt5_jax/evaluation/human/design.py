"""Who judges what, in which order, and which system is on which side: drawn by hashes of a seed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

SHARE = 0.05
"""Share of the items of a rater that are added as controls of each kind, and as repeats; at least one."""


class Draw:
    """Draws that depend on a seed and on names only, so that they do not change when something is added.

    Args:
      seed: keeps what is drawn secret as long as it is.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def digest(self, *names: object) -> str:
        """Hexadecimal digits for a thing with these names."""
        return hashlib.sha256("\n".join(map(str, (self._seed, *names))).encode()).hexdigest()

    def coin(self, *names: object) -> bool:
        """Heads or tails."""
        return int(self.digest(*names), 16) % 2 == 1

    def order(self, things: Sequence[str], *names: object) -> list[str]:
        """The things in a random order."""
        return sorted(things, key=lambda thing: self.digest(*names, thing))


@dataclasses.dataclass(frozen=True)
class Shown:
    """One screen of a rater.

    Attributes:
      item: its name.  first_left: whether the study's first system is on the left.
      repeat: shown a second time.
    """

    item: str
    first_left: bool
    repeat: bool = False


def deal(items: Sequence[str], judgements: int, per_rater: int, draw: Draw) -> list[list[Shown]]:
    """The items of each rater, without controls.

    Each item is judged by ``judgements`` raters, and the first system is on the left for half of them; so it
    is for half of the items of each rater.  Both up to one.

    Args:
      per_rater: items of a rater at most.
    """
    order = draw.order(items, "sides")
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    number, raters = math.ceil(len(items) / per_rater), []
    for turn in range(judgements):
        hands: list[list[Shown]] = [[] for _ in range(number)]
        for side, half in enumerate(halves):
            for place, item in enumerate(draw.order(half, "deal", turn)):
                # The second half is dealt from the other end, so that no hand gets the odd ones of both.
                hand = place % number if side == 0 else number - 1 - place % number
                hands[hand].append(Shown(item, (side + turn) % 2 == 0))
        raters += hands
    return [hand for hand in raters if hand]


def extra(size: int) -> int:
    """How many controls of each kind, and repeats, are added to ``size`` items."""
    return max(1, round(SHARE * size))


def arrange(hand: Sequence[Shown], controls: Sequence[str], rater: str, draw: Draw) -> list[Shown]:
    """All screens of a rater in their order: items, controls, and repeats with sides exchanged.

    A repeat comes in the second half, its first showing in the first half.
    """
    shown = {screen.item: screen for screen in hand}
    shown |= {name: Shown(name, draw.coin("side", rater, name)) for name in controls}
    order = [shown[name] for name in draw.order(list(shown), "order", rater)]
    middle = (len(order) + 1) // 2
    early = [screen.item for screen in order[:middle] if screen.item not in controls]
    early = early or [screen.item for screen in hand]
    again = draw.order(early, "repeat", rater)[: extra(len(hand))]
    late = {f"{screen.item}": screen for screen in order[middle:]}
    late |= {
        f"{name} again": dataclasses.replace(shown[name], first_left=not shown[name].first_left, repeat=True)
        for name in again
        if name not in late
    }
    return [*order[:middle], *(late[name] for name in draw.order(list(late), "late", rater))]
