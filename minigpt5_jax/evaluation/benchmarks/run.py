"""The steps of a benchmark: prompts to generate from, its layout, requests to a judge, scores."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.evaluation.benchmarks.contract import Answers, Item, find
from minigpt5_jax.evaluation.benchmarks.judge import Judge
from minigpt5_jax.evaluation.suite.samples import read_parts

STEPS = ("prompts", "layout", "requests", "score")
CACHE = "judge_cache.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark and its files.

    Attributes:
      name: of the benchmark.  file: of its prompts.  output: file or folder that a step writes.
      predictions: folder of answers to its prompts, as ``generate chat`` writes them.
      answers: replies of a judge, or what the benchmark's program wrote.
      judge: the model that judges.  instructions: the benchmark's file of them.
    """

    name: str | None
    file: str | None
    output: str
    predictions: str | None = None
    answers: Sequence[str] = ()
    judge: str = ""
    instructions: str | None = None
    allow_outside_images: bool = False


def run(step: str, task: Task) -> dict[str, Any]:
    """Takes one step; what it wrote or found.

    Raises:
      ConfigError, DataError, OSError: as their messages say.
    """
    benchmark = find(task.name)
    if not task.file:
        raise ConfigError("give the benchmark's own file of prompts: --references FILE")
    items = benchmark.read(Path(task.file))
    if not items:
        raise DataError(f"{task.file} has no prompts")
    if step == "prompts":
        return _prompts(items, Path(task.output))
    answers = _answers(items, task)
    if step == "layout":
        benchmark.layout(items, answers, Path(task.output))
        return {"items": len(items), "written": task.output}
    instructions = _instructions(task)
    files = [Path(path) for path in task.answers]
    replies = benchmark.requests is not None and all(_is_replies(path) for path in files)
    judge = Judge(task.judge, Path(task.predictions or "") / CACHE, instructions)
    if step == "requests":
        if benchmark.requests is None:
            raise ConfigError(
                f"{task.name} is judged by its own program: write its files with `benchmark layout`"
            )
        _need_judge(task, benchmark.instructions)
        asked = benchmark.requests(items, answers, instructions)
        written, known = judge.write(asked.values(), Path(task.output))
        return {"requests": written, "answered": known, "written": task.output}
    if replies:
        _need_judge(task, benchmark.instructions)
        judge.learn(files)
    own = files[0] if files and not replies else None
    return benchmark.score(items, answers, judge, own)


def _need_judge(task: Task, instructions: bool) -> None:
    if not task.judge or (instructions and not task.instructions):
        more = " and --instructions FILE, its instructions to the judge" * instructions
        raise ConfigError(f"give the model that judges, --judge MODEL{more} (docs/evaluation.md)")


def _is_replies(path: Path) -> bool:
    """Whether a file has a judge's replies; otherwise it is what a benchmark's program wrote."""
    if path.is_dir() or path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8") as file:
        return '"custom_id"' in file.readline()


def _instructions(task: Task) -> Any:
    """Text, or the value of a JSON file."""
    if task.instructions is None:
        return ""
    text = Path(task.instructions).read_text("utf-8")
    return json.loads(text) if task.instructions.endswith(".json") else text


def _answers(items: Sequence[Item], task: Task) -> Answers:
    """The answer to each item; DataError where one has none, with their names."""
    if not task.predictions:
        raise ConfigError("give the answers to the benchmark's prompts: --predictions DIR")
    answers = read_parts(task.predictions, task.allow_outside_images)
    if missing := [item.id for item in items if item.id not in answers]:
        raise DataError(
            f"{len(missing)} of {len(items)} prompts have no answer in {task.predictions}, {missing[0]} for "
            "one; "
            "generate from all prompts that `benchmark prompts` wrote"
        )
    return answers


def _prompts(items: Sequence[Item], path: Path) -> dict[str, Any]:
    """A record an item, in the schema that ``generate`` reads; images relative to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            content = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "path": os.path.relpath(part, path.parent)}
                for part in item.prompt
            ]
            record = {"id": item.id, "turns": [{"role": "user", "content": content}]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    images = sum(isinstance(part, Path) for item in items for part in item.prompt)
    return {"items": len(items), "images": images, "written": str(path)}
