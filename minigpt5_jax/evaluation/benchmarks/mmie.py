"""MMIE (Xia et al., ICLR 2025): interleaved answers, scored 0 to 6 by its own InternVL.

Its questions in its JSON form -> ``data.json`` and ``images/``; its program writes ``eval_result.json``.
The judge may also be served: instructions are a JSON object of the texts in its ``prompts.py`` by task
(``SA``, ``PBL``, ``MSR``).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.json_files import form_of, write_json
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import (
    Answers,
    Benchmark,
    Item,
    Parts,
    json_lines,
    mean,
    steps,
)
from minigpt5_jax.evaluation.benchmarks.judge import Judge, Request

TASKS = ("SA", "PBL", "MSR")
"""Situational analysis, project-based learning, multi-step reasoning; part of each id."""
MOST_IMAGES = 3
"""Images of question and answer that its judge is shown, but for those of long questions."""


def read(path: Path, images: ImageFolder) -> list[Item]:
    """An item a question."""
    rows = json_lines(path, "id", "question")
    return [Item(row["id"], _parts(row["question"], images, f"{path}: {row['id']}"), row) for row in rows]


def _parts(some: Sequence[Mapping[str, Any]], images: ImageFolder, where: str) -> Parts:
    found: list[str | Path] = []
    for part in some:
        found += [part["text"]] * bool(part["text"])
        found += [Path(images.path(part["image"], where))] if part["image"] else []
    return tuple(found)


def layout(items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """``data.json`` with questions and answers, all images copied."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    copied: dict[Path, str] = {}

    def stored(some: Parts) -> list[dict[str, str | None]]:
        found = []
        for text, image in steps(some):
            if image is not None and image not in copied:
                copied[image] = f"images/{len(copied)}{image.suffix}"
                shutil.copyfile(image, folder / copied[image])
            found.append({"text": text or None, "image": copied[image] if image is not None else None})
        return found

    rows = [
        {
            "id": item.id,
            "question": stored(item.prompt),
            "answer": stored(answers[item.id]),
            "model": "minigpt5_jax",
            "gt_answer": item.data.get("gt_answer") or [{"text": None, "image": None}],
        }
        for item in items
    ]
    write_json(folder / "data.json", rows)


def task_of(name: str) -> str:
    """The task of a question by its id; DataError for another id."""
    found = next((task for task in TASKS if task in name), None)
    if found is None:
        raise DataError(f"{name} names none of the tasks {', '.join(TASKS)}; is it MMIE's file?")
    return found


def requests(items: Sequence[Item], answers: Answers, instructions: Any) -> dict[tuple[str, ...], Request]:
    """(item,) -> request: instructions, question and answer as text with its images.

    Raises:
      ConfigError: the instructions are no texts by task.
    """
    if not isinstance(instructions, dict) or not set(TASKS) <= instructions.keys():
        raise ConfigError(f"--instructions of MMIE is a JSON object with the keys {', '.join(TASKS)}")
    found = {}
    for item in items:
        task, images, texts = task_of(item.id), [], {}
        for side, some in (("Question", item.prompt), ("Answer", answers[item.id])):
            told = ""
            for part in some:
                if isinstance(part, str):
                    told += part + "\n"
                elif side == "Question" or len(images) < MOST_IMAGES:
                    told += f"Image-{len(images)}: <image>\n"
                    images.append(part)
            texts[side] = told
        body = f"{instructions[task]}### Question\n{texts['Question']}\n### Answer\n{texts['Answer']}\n"
        if task == "MSR":
            with form_of(
                item.id, "has no gt_answer with a text, which the judge is told; get the file again"
            ):
                right = item.data["gt_answer"][0]["text"]
            body += f"### Correct Answer\nThe correct answer to this question should be: {right}\n"
        found[(item.id,)] = Request((*images, body + "### Feedback\n"))
    return found


def points(reply: str) -> int | None:
    """The score in a reply, 0 to 6; None where there is none, which the benchmark leaves out."""
    match = re.search(r"### Score.*?(-?\d+(\.\d+)?)", reply, re.DOTALL)
    value = round(float(match[1])) if match else None
    return value if value is not None and 0 <= value <= 6 else None


def score(items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None) -> dict[str, float]:
    """Means over all and by task, 0 to 6, and how many replies had a score."""
    if results is not None:
        replies = {row["id"]: row["gpt_feedback"] for row in json_lines(results, "id", "gpt_feedback")}
    else:
        asked = requests(items, answers, judge.instructions)
        replies = {key[0]: reply for key, reply in judge.replies(asked).items()}
    scored = {name: value for name, reply in replies.items() if (value := points(reply)) is not None}
    by_task = {task: [value for name, value in scored.items() if task_of(name) == task] for task in TASKS}
    found = {task: mean(values) for task, values in by_task.items() if values}
    return {"average": mean(list(scored.values())), **found, "n": float(len(scored))}


BENCHMARK = Benchmark(read, layout, score, requests, instructions=True)
