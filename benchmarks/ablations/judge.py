"""Judge one trained run, in a process of its own; one JSON object.

    python -m benchmarks.ablations.judge --run runs/ablations/plain_seed0 --out scores.json \
        --settings '{"seed": 0, "pairs": 200, "native": true, "guidance": 7.5}'

``settings`` holds ``seed`` and either ``pairs`` (captions of each number of objects), ``native`` (the ceiling
too) and perhaps ``guidance`` (in place of the run's scale), or ``stories``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CONTEXTS = ("none", "text", "image", "image+text")


def judge(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """``scores`` of the run in ``folder``, its ``step`` and the ``device``."""
    import jax

    from minigpt5_jax.cli import set_compile_cache
    from minigpt5_jax.restore import load_run

    run = load_run(folder)
    set_compile_cache(run.config)
    if "pairs" in settings:
        from minigpt5_jax.shapes.judge_pairs import judge_pairs

        scores = judge_pairs(
            run, count=settings["pairs"], seed=settings["seed"], guidance=settings.get("guidance"),
            native=settings["native"],
        )  # fmt: skip
    else:
        from minigpt5_jax.shapes.judge_stories import judge_stories

        scores = judge_stories(run, count=settings["stories"], contexts=CONTEXTS, seed=settings["seed"])
    device = jax.devices()[0]
    return {"scores": scores, "step": run.step, "device": f"{jax.device_count()} x {device.device_kind}"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="workdir of the run")
    parser.add_argument("--settings", type=json.loads, required=True, help="how to judge, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="file of the result")
    flags = parser.parse_args()
    flags.out.write_text(json.dumps(judge(flags.run, flags.settings)) + "\n")


if __name__ == "__main__":
    main()
