"""Measure a trained run of the small world on data that no training has seen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.shapes.dialogs import judge_dialogs
from minigpt5_jax.evaluation.shapes.pairs import judge_pairs
from minigpt5_jax.evaluation.shapes.stories import NARRATIONS, judge_stories
from minigpt5_jax.wiring.restore import open_run
from minigpt5_jax.wiring.session import override

WHAT = ("stories", "dialogs", "pairs")


def measure(
    path: str | os.PathLike[str],
    what: str,
    *,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
    step: int | None = None,
    contexts: Sequence[str] = CONTEXTS,
    narrations: Sequence[str] = NARRATIONS,
    native: bool = True,
    inference: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What was measured, with which checkpoint and settings, as plain JSON.

    Args: the flags of the command (:mod:`minigpt5_jax.evaluation.shapes.__main__`).

    Raises:
      ConfigError, CheckpointError, DataError: as their messages say.
    """
    if what not in WHAT:
        raise ConfigError(f"unknown {what!r}; known: {', '.join(WHAT)}")
    override(get_config(), inference or {})  # before the checkpoint is looked for
    run = open_run(path, step=step, weights=weights, inference=inference).load()
    common = {"count": count, "seed": seed, "batch_size": batch_size}
    if what == "stories":
        result = judge_stories(run, contexts=contexts, narrations=narrations, **common)
    elif what == "dialogs":
        result = judge_dialogs(run, **common)
    else:
        result = judge_pairs(run, native=native, **common)
    made = {"run": str(path), "name": run.config.run.name, "step": run.step, "seed": seed, "count": count}
    return {**made, "what": what, "inference": run.config.inference.to_dict(), "result": result}
