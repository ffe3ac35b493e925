"""DPG-Bench (ELLA, Hu et al. 2024): dense prompts, judged by yes-no questions that depend on each other.

``dpg_bench.csv`` -> ``{item_id}.png``, a grid of 2 x 2 answers.  Its own judge is mPLUG-large; another one
gives other numbers, so say which.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import (
    Answers,
    Benchmark,
    Item,
    first_image,
    images_of,
    mean,
)
from minigpt5_jax.evaluation.benchmarks.judge import Judge, Request

SAMPLES = 4
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
SYSTEM = "Look at the image and answer the question with one word, yes or no."


def read(path: Path, images: ImageFolder) -> list[Item]:
    """Four answers to each prompt, with its questions.

    As in the benchmark's program, the first row of the table is left out.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
            raise DataError(f"{path} has no column {', '.join(missing)}; give dpg_bench.csv")
        rows = list(table)[1:]
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        data = prompts.setdefault(row["item_id"], {"text": row["text"], "questions": {}})
        data["questions"][int(row["proposition_id"])] = {
            "question": row["question_natural_language"],
            "parents": [int(number) for number in row["dependency"].split(",")],
            "category": row["tuple"].split("(")[0].strip(),
        }
    return [
        Item(f"{name}_{k}", (data["text"],), data) for name, data in prompts.items() for k in range(SAMPLES)
    ]


def layout(items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """A grid a prompt, by rows; all images are brought to the size of the first, a square.

    Raises:
      DataError: an answer has no image, or the first one is no square.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(items), SAMPLES):
        four = [first_image(item, answers) for item in items[start : start + SAMPLES]]
        side = four[0].width
        if four[0].size != (side, side):
            raise DataError(f"the image of {items[start].id} is {four[0].size}; the grid takes squares")
        grid = Image.new("RGB", (2 * side, 2 * side))
        for place, image in enumerate(four):
            same = (
                image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
            )
            grid.paste(same, (side * (place % 2), side * (place // 2)))
        grid.save(folder / f"{items[start].id.rpartition('_')[0]}.png")


def requests(items: Sequence[Item], answers: Answers, instructions: Any) -> dict[tuple[str, ...], Request]:
    """(item, question) -> request."""
    return {
        (item.id, str(number)): Request((images_of(answers[item.id])[0], question["question"]), SYSTEM)
        for item in items
        for number, question in item.data["questions"].items()
        if images_of(answers[item.id])
    }


def item_score(right: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> float:
    """Share of questions answered yes, where those below a no count as no (in the order of the table)."""
    values = dict(right)
    for number, above in parents.items():
        if any(parent and not values.get(parent, True) for parent in above):
            values[number] = False
    return mean([float(value) for value in values.values()])


def score(items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None) -> dict[str, float]:
    """DPG-Bench's score, 0 to 100, and the share of yes by first-level category of the last image, as there.

    An answer without an image counts 0.

    Raises:
      DataError: a file of another form than replies, or a request without a reply.
    """
    if results is not None:
        raise DataError(
            f"{results} has no replies of a judge; what DPG-Bench's own program writes is its result already "
            "and is not read here: give the replies of a --judge, in the form of a batch (.jsonl)"
        )
    replies = judge.replies(requests(items, answers, None))
    scores: dict[str, list[float]] = {}
    categories: dict[str, list[float]] = {}
    for item in items:
        name, _, sample = item.id.rpartition("_")
        questions = item.data["questions"]
        right = {n: replies.get((item.id, str(n)), "").strip().lower().startswith("yes") for n in questions}
        value = item_score(right, {n: question["parents"] for n, question in questions.items()})
        scores.setdefault(name, []).append(value)
        if int(sample) == SAMPLES - 1:
            for number, question in questions.items():
                first = question["category"].split("-")[0].strip()
                categories.setdefault(first, []).append(float(right[number]))
    overall = mean([mean(values) for values in scores.values()])
    return {"dpg_bench": 100 * overall, **{name: 100 * mean(values) for name, values in categories.items()}}


BENCHMARK = Benchmark(read, layout, score, requests)
