"""What trains: one ordered list of path patterns decides freezing, learning rates and checkpoints.

The first pattern that matches a parameter's path (``re.fullmatch``) decides.  The list is put together from
what each part says of its own parameters (``Part.trainable``), and ends in "everything else is frozen".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from minigpt5_jax.parts.contracts import FROZEN

Rules = tuple[tuple[str, str], ...]
TABLE_DECAY = "/table_decay"
"""End of the path of the share by which weight decay has shrunk frozen tables, where a model has it (Q3)."""
REST = (r".*", FROZEN)


def rules_of(parts: Iterable[Any], stage: str, before: Rules = ()) -> Rules:
    """The patterns of a whole model (fidelity 4.2).

    Args:
      parts: records of backbone, mapper and generator.  stage: ``stage1`` or ``stage2``.
      before: patterns that come first, of whole paths.
    """
    own = tuple(
        (f"{re.escape(part.prefix)}(?:{pattern})", group)
        for part in parts
        for pattern, group in part.trainable.get(stage, ())
    )
    return (*before, *own, REST)


def label_parameters(paths: Iterable[str], rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Group name of every path, ``"frozen"`` where nothing trains.

    Raises:
      ValueError: naming paths that no pattern matches, or patterns that match nothing (a typo would
        otherwise freeze silently).
    """
    labels: dict[str, str] = {}
    matched: set[str] = set()
    for path in paths:
        for pattern, group in rules:
            if re.fullmatch(pattern, path):
                matched.add(pattern)
                labels.setdefault(path, group)
    if unmatched := [path for path in paths if path not in labels]:
        raise ValueError(
            f"no tuning pattern matches {unmatched[:5]} ({len(unmatched)} paths); "
            "end the list with ('.*', 'frozen')"
        )
    if unused := [pattern for pattern, _ in rules if pattern not in matched]:
        raise ValueError(f"tuning patterns match no parameter: {unused}")
    return labels
