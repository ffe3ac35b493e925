"""Measure a trained run of the small world on data that no training has seen.

    python -m minigpt5_jax.shapes.judge --run runs/shapes_story --what stories --count 200 [--out FILE.json]
    python -m minigpt5_jax.shapes.judge --run runs/shapes_story --what stories --contexts none,image+text
    python -m minigpt5_jax.shapes.judge --run runs/shapes_dialog --what dialogs --count 200
    python -m minigpt5_jax.shapes.judge --run runs/shapes_full --what pairs --count 200

Prints one JSON line: what was measured with which checkpoint and ``inference`` settings, and its numbers
(``judge_stories.py``, ``judge_dialogs.py``, ``judge_pairs.py`` say what they mean).  A stage-1 run is
measured as it is (zero-shot).  ``--inference KEY=VALUE`` and ``--weights NAME=PATH`` as in
``minigpt5_jax.generate``, and ``--step``, ``--seed``, ``--batch_size``; for stories and dialogues, where a
picture is forced, how many there may be and how long a prompt may be is the judges' own choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from minigpt5_jax import cli, generate
from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data.stories import CONTEXTS
from minigpt5_jax.restore import load_run
from minigpt5_jax.sessions import override
from minigpt5_jax.shapes.judge_dialogs import judge_dialogs
from minigpt5_jax.shapes.judge_pairs import judge_pairs
from minigpt5_jax.shapes.judge_stories import NARRATIONS, judge_stories

WHAT = ("stories", "dialogs", "pairs")
SHARED = (generate.STEP, generate.SEED, generate.BATCH_SIZE, generate.INFERENCE, generate.WEIGHTS)


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
    """What the command prints.

    Args:
      path: a run's workdir.  what: one of :data:`WHAT`.  count: stories, dialogues, or captions of each
        number of objects.  step: which checkpoint; the newest by default.
      contexts, narrations: of stories.  native: measure the ceiling of pairs, too.
      inference: settings in place of the run's, as Python spells them.
      weights: sources of frozen weights that moved.

    Raises:
      ConfigError, CheckpointError, DataError: as their messages say.
    """
    if what not in WHAT:
        raise ConfigError(f"unknown {what!r}; known: {', '.join(WHAT)}")
    override(get_config(), inference or {})
    run = load_run(path, step=step, weights=weights)
    override(run.config, inference or {})
    cli.set_compile_cache(run.config)
    common = {"count": count, "seed": seed, "batch_size": batch_size}
    if what == "stories":
        result = judge_stories(run, contexts=contexts, narrations=narrations, **common)
    elif what == "dialogs":
        result = judge_dialogs(run, **common)
    else:
        result = judge_pairs(run, native=native, **common)
    made = {"run": str(path), "name": run.config.run.name, "step": run.step, "seed": seed, "count": count}
    return {**made, "what": what, "inference": run.config.inference.to_dict(), "result": result}


def main() -> None:
    """Command line."""
    path = flags.DEFINE_string("run", None, "A run's --workdir, or its checkpoints folder.", required=True)
    what = flags.DEFINE_enum("what", None, list(WHAT), "What to measure.", required=True)
    count = flags.DEFINE_integer(
        "count", 200, "Stories, dialogues, or captions of each number of objects.", lower_bound=1
    )
    contexts = flags.DEFINE_list("contexts", list(CONTEXTS), "stories: what is put before the last step.")
    narrations = flags.DEFINE_list("narrations", list(NARRATIONS), "stories: which texts are written.")
    native = flags.DEFINE_boolean("native", True, "pairs: measure the native ceiling, too.")
    out = flags.DEFINE_string("out", None, "File to write the line to as well.")
    flags.FLAGS.set_default("batch_size", 32)
    for shared in SHARED:
        flags.declare_key_flag(shared.name)

    def run(_: list[str]) -> None:
        cli.quiet()
        try:
            found = measure(
                path.value,
                what.value,
                count=count.value,
                seed=generate.SEED.value,
                batch_size=generate.BATCH_SIZE.value,
                step=generate.STEP.value,
                contexts=contexts.value,
                narrations=narrations.value,
                native=native.value,
                inference=cli.pairs(generate.INFERENCE.value, "inference"),
                weights=cli.pairs(generate.WEIGHTS.value, "weights"),
            )
        except generate.USER_ERRORS as error:
            cli.fail(str(error))
        line = json.dumps(found)
        print(line)
        if out.value:
            Path(out.value).expanduser().parent.mkdir(parents=True, exist_ok=True)
            Path(out.value).expanduser().write_text(line + "\n")

    app.run(run, flags_parser=cli.parse)


if __name__ == "__main__":
    main()
