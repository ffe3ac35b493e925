"""GenEval (Ghosh et al. 2023): objects, counts, colours and positions, judged by its own detector.

``evaluation_metadata.jsonl`` -> ``00000/metadata.jsonl`` and ``00000/samples/00000.png``; its program writes
``results.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import (
    Answers,
    Benchmark,
    Item,
    first_image,
    json_lines,
    mean,
)
from minigpt5_jax.evaluation.benchmarks.judge import Judge

SAMPLES = 4


def read(path: Path, images: ImageFolder) -> list[Item]:
    """Four answers to each prompt."""
    rows = json_lines(path, "tag", "prompt")
    return [Item(f"{n:05}_{k}", (row["prompt"],), row) for n, row in enumerate(rows) for k in range(SAMPLES)]


def layout(items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """A folder a prompt."""
    for item in items:
        number, _, sample = item.id.partition("_")
        samples = folder / number / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (folder / number / "metadata.jsonl").write_text(json.dumps(item.data), "utf-8")
        first_image(item, answers).save(samples / f"{int(sample):05}.png")


def score(items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None) -> dict[str, float]:
    """Share of right images of each tag, and their mean, which is the benchmark's score.

    Raises:
      DataError: no file of its program, or one of other images.
    """
    if results is None:
        raise DataError(
            "GenEval is judged by its own program; give the results.jsonl that it wrote: --answers FILE"
        )
    rows = json_lines(results, "tag", "correct", "metadata")
    if len(rows) != len(items):
        raise DataError(
            f"{results} has {len(rows)} images, the benchmark {len(items)}; run its program on all of them"
        )
    tags: dict[str, list[float]] = {}
    prompts: dict[str, bool] = {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(float(row["correct"]))
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or bool(row["correct"])
    found = {tag: mean(values) for tag, values in tags.items()}
    images = [float(row["correct"]) for row in rows]
    shares = {"images": mean(images), "prompts": mean([float(right) for right in prompts.values()])}
    return {"overall": mean(list(found.values())), **found, **shares}


BENCHMARK = Benchmark(read, layout, score)
