"""Measure a trained run of the small world on data that no training has seen.

    python -m minigpt5_jax.evaluation.shapes --run runs/shapes_story --what stories --count 200
    python -m minigpt5_jax.evaluation.shapes --run runs/shapes_story --what stories --contexts none,image+text
    python -m minigpt5_jax.evaluation.shapes --run runs/shapes_dialog --what dialogs --count 200
    python -m minigpt5_jax.evaluation.shapes --run runs/shapes_full --what pairs --count 200

Prints one JSON line: what was measured with which checkpoint and ``inference`` settings, and its numbers
(``stories.py``, ``dialogs.py``, ``pairs.py`` say what they mean).  A stage-1 run is
measured as it is (zero-shot).  ``--inference KEY=VALUE`` and ``--weights NAME=PATH`` as in
``minigpt5_jax.generate``, and ``--step``, ``--seed``, ``--batch_size``; for stories and dialogues, where a
image is forced, how many there may be and how long a prompt may be is the judges' own choice.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import get_config
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.shapes.judge import WHAT, measure
from minigpt5_jax.evaluation.shapes.stories import NARRATIONS


def main() -> None:
    """Command line."""
    path = cli.define_path("run", None, "A run's --workdir, or its checkpoints folder.", required=True)
    what = flags.DEFINE_enum("what", None, list(WHAT), "What to measure.", required=True)
    options = (
        flags.DEFINE_integer(
            "count", 200, "Stories, dialogues, or captions of each number of objects.", lower_bound=1
        ),
        flags.DEFINE_list("contexts", list(CONTEXTS), "stories: what is put before the last step."),
        flags.DEFINE_list("narrations", list(NARRATIONS), "stories: which texts are written."),
        flags.DEFINE_boolean("native", True, "pairs: measure the native ceiling, too."),
        flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default."),
        flags.DEFINE_integer("seed", 0, "Of the data and of the first answer.", lower_bound=0),
        flags.DEFINE_integer("batch_size", 32, "Answers made together at most.", lower_bound=1),
    )
    out = cli.define_path("out", None, "File to write the line to as well.")
    inference = flags.DEFINE_multi_string("inference", [], "KEY=VALUE in place of the run's inference.KEY.")
    weights = flags.DEFINE_multi_string("weights", [], "NAME=PATH where a source of frozen weights moved.")

    def command() -> None:
        if out.value:
            cli.check_writable(out.value, "out")
        cli.set_compile_cache(get_config())
        found = measure(
            path.value,
            what.value,
            **{option.name: option.value for option in options},
            inference=cli.pairs(inference.value, "inference"),
            weights=cli.sources(weights.value),
        )
        line = json.dumps(found)
        print(line)
        if out.value:
            Path(out.value).parent.mkdir(parents=True, exist_ok=True)
            Path(out.value).write_text(line + "\n")

    cli.start(lambda _: cli.guarded(command))


if __name__ == "__main__":
    main()
