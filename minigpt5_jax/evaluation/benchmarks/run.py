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
from minigpt5_jax.data.json_files import form_of, read_json, read_text
from minigpt5_jax.evaluation.benchmarks.contract import Answers, Benchmark, Item, find
from minigpt5_jax.evaluation.benchmarks.judge import Judge
from minigpt5_jax.evaluation.suite.samples import images_beside, read_parts

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
    items = _items(benchmark, task)
    if step == "prompts":
        return _prompts(items, Path(task.output))
    answers = _answers(items, task)
    if step == "layout":
        benchmark.layout(items, answers, Path(task.output))
        return {"items": len(items), "written": task.output}
    instructions = _instructions(task)
    replies, own = _sorted_answers(task)
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
    if own is not None:
        with form_of(own, f"is not what the program of {task.name} writes; run it again"):
            return benchmark.score(items, answers, judge, own)
    if benchmark.requests is None and replies:
        raise ConfigError(f"{task.name} is judged by its own program; give what it wrote as --answers")
    if benchmark.requests is not None:
        _need_judge(task, benchmark.instructions)
        judge.learn(replies)
    return benchmark.score(items, answers, judge, None)


def _items(benchmark: Benchmark, task: Task) -> list[Item]:
    """The items of the benchmark's file; DataError for another file, without any, or with an unsafe id."""
    if not task.file:
        raise ConfigError("give the benchmark's own file of prompts: --references FILE")
    path = Path(task.file)
    with form_of(path, f"is not a file of prompts of {task.name}; get the benchmark's own file"):
        items = benchmark.read(path, images_beside(path, task.allow_outside_images))
        some = (part for item in items for part in (item.id, *item.prompt))
        if odd := [part for part in some if not isinstance(part, str | Path)]:
            raise TypeError(f"{odd[0]!r} is no text")
    if not items:
        raise DataError(f"{path} has no prompts")
    for item in items:  # an id becomes the name of a file or folder
        if not item.id or {*"/\\\0"} & {*item.id}:
            raise DataError(f"{path}: id {item.id!r} is no text without / and \\; get the file again")
    return items


def _need_judge(task: Task, instructions: bool) -> None:
    if not task.judge or (instructions and not task.instructions):
        more = " and --instructions FILE, its instructions to the judge" * instructions
        raise ConfigError(f"give the model that judges, --judge MODEL{more} (docs/evaluation.md)")


def _sorted_answers(task: Task) -> tuple[list[Path], Path | None]:
    """Files of a judge's replies, and what the benchmark's program wrote; one of them is empty.

    Raises:
      ConfigError: files of both kinds, or several of the program.
      DataError: a file of replies is empty.
    """
    replies, own = [], []
    for path in map(Path, task.answers):
        (replies if _is_replies(path) else own).append(path)
    if len(own) > 1 or (own and replies):
        names = ", ".join(map(str, [*own, *replies]))
        raise ConfigError(
            f"--answers takes files of a judge's replies, or one file or folder that the program of "
            f"{task.name} wrote, got {names}; give those of one kind"
        )
    return replies, own[0] if own else None


def _is_replies(path: Path) -> bool:
    """Whether a file has a judge's replies; otherwise it is what a benchmark's program wrote."""
    if path.is_dir() or path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    if not first:
        raise DataError(f"{path} is empty; give the file that the judge's replies were written to")
    return b'"custom_id"' in first


def _instructions(task: Task) -> Any:
    """Text, or the value of a JSON file."""
    if task.instructions is None:
        return ""
    if task.instructions.endswith(".json"):
        return read_json(task.instructions, "give the benchmark's own instructions")
    return read_text(task.instructions)


def _answers(items: Sequence[Item], task: Task) -> Answers:
    """The answer to each item; DataError where one has none, with their names."""
    if not task.predictions:
        raise ConfigError("give the answers to the benchmark's prompts: --predictions DIR")
    answers = read_parts(task.predictions, task.allow_outside_images)
    if missing := [item.id for item in items if item.id not in answers]:
        raise DataError(
            f"{len(missing)} of {len(items)} prompts have no answer in {task.predictions}, {missing[0]} for "
            "one; generate from all prompts that `benchmark prompts` wrote"
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
