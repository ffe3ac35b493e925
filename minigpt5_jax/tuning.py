"""What trains: one ordered list of path patterns decides freezing, learning rates and checkpoints.

The first pattern that matches a parameter's path (``re.fullmatch``) decides; a path no pattern
matches is an error, so nothing trains or freezes by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

FROZEN = "frozen"
TABLE_DECAY = "backbone/llm/table_decay"
"""Share by which weight decay has shrunk the language model's frozen rows, where a model has it (Q3)."""

STAGE1: tuple[tuple[str, str], ...] = (
    (r"backbone/llm/((embed_tokens|lm_head)/voken|table_decay)", "llm"),
    (r"mapper/.*", "mapper"),
    (r".*", FROZEN),
)
"""Stage 1 (reference 4.2): voken rows at the base rate, mapper, its MLP and queries at ten times it."""

STAGE1_FIXED_QUERIES: tuple[tuple[str, str], ...] = ((r"mapper/queries", FROZEN), *STAGE1)
"""Stage 1 with the mapper's queries as they were drawn (the papers' "fixed queries", reference 9.1)."""

STAGE2_LORA: tuple[tuple[str, str], ...] = (
    (r"backbone/llm/((embed_tokens|lm_head)/voken|table_decay)", "llm"),
    (r"backbone/llm/.*/lora_[ab]", "llm"),
    (r"mapper/(fc|queries)(/.*)?", FROZEN),
    (r"mapper/.*", "mapper"),
    (r".*", FROZEN),
)
"""Stage 2 with LoRA: the mapper's MLP and queries are frozen (reference 4.2, 4.5)."""

STAGE2_NO_STAGE1: tuple[tuple[str, str], ...] = tuple(
    rule for rule in STAGE2_LORA if rule != (r"mapper/(fc|queries)(/.*)?", FROZEN)
)
"""Stage 2 with LoRA on a mapper that no stage 1 made: its MLP and queries train too (reference 9.1)."""

STAGE2_PREFIX: tuple[tuple[str, str], ...] = (
    (r"backbone/llm/prefix_encoder/.*", "llm"),
    *(rule for rule in STAGE2_LORA if "lora" not in rule[0]),
)
"""Stage 2 with prefix tuning in place of LoRA (reference 4.2, 4.4)."""


def label_parameters(paths: Iterable[str], rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Group name of every path, ``"frozen"`` where nothing trains.

    Raises:
      ValueError: naming paths that no pattern matches, or patterns that match nothing (a typo would
        otherwise freeze silently).
    """
    labels, used, unmatched = {}, set(), []
    for path in paths:
        for number, (pattern, group) in enumerate(rules):
            if re.fullmatch(pattern, path):
                labels[path] = group
                used.add(number)
                break
        else:
            unmatched.append(path)
    if unmatched:
        raise ValueError(
            f"no tuning pattern matches {unmatched[:5]} ({len(unmatched)} paths); "
            "end the list with ('.*', 'frozen')"
        )
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(f"tuning patterns match no parameter: {unused}")
    return labels


def trainable_paths(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Paths that train, sorted."""
    return tuple(sorted(path for path, group in labels.items() if group != FROZEN))
