"""What a benchmark is for the commands: four functions, in the one file that knows it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.json_files import read_json, read_jsonl
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.judge import Judge, Request
from minigpt5_jax.evaluation.suite.samples import Scene

Parts = Scene
"""Texts and images of an answer, in order."""
Answers = Mapping[str, Parts]
"""Item -> what was answered."""
NAMES = ("geneval", "dpg_bench", "opening", "isg_bench", "mmie", *(f"comm_task{n}" for n in (1, 2, 3, 4)))


@dataclasses.dataclass(frozen=True)
class Item:
    """One answer that is wanted.

    Attributes:
      id: of the record to generate from, and of its answer.
      prompt: texts and images that are read.
      data: the benchmark's own record.
    """

    id: str
    prompt: Parts
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      read: its own file of prompts, and the folder that images are in -> items, in order.  Fails in any way
        where it is another file (:func:`minigpt5_jax.data.json_files.form_of` tells it).
      layout: writes answers into a folder as its program reads them.
      requests: what a judge is asked, in chat form; None where its own program must judge.  Takes items,
        answers
        and the benchmark's instructions for the judge.
      score: items, answers, and the judge's replies or the file that its program wrote -> name -> score.
      instructions: whether ``requests`` needs them.
    """

    read: Callable[[Path, ImageFolder], list[Item]]
    layout: Callable[[Sequence[Item], Answers, Path], None]
    score: Callable[[Sequence[Item], Answers, Judge, Path | None], dict[str, float]]
    requests: Callable[[Sequence[Item], Answers, Any], dict[tuple[str, ...], Request]] | None = None
    instructions: bool = False


def find(name: str | None) -> Benchmark:
    """A benchmark by its name.

    Raises:
      ConfigError: there is none of this name.
    """
    if name not in NAMES:
        raise ConfigError(f"--benchmark={name} is none of {', '.join(NAMES)}")
    file, _, variant = name.partition("_task")
    module = importlib.import_module(f"{__package__}.{file}")
    return module.BENCHMARKS[f"task{variant}"] if variant else module.BENCHMARK


def json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a file, JSON lines or one list; DataError where one lacks a key."""
    remedy = "get the file again"
    whole = (read_json if path.read_bytes().lstrip().startswith(b"[") else read_jsonl)(path, remedy)
    for number, value in enumerate(whole):
        if missing := [key for key in needed if not isinstance(value, dict) or key not in value]:
            raise DataError(
                f"{path}: record {number} has no {', '.join(missing)}; is it the benchmark's file?"
            )
    return whole


def images_of(parts: Parts) -> list[Path]:
    """The images of an answer."""
    return [part for part in parts if isinstance(part, Path)]


def first_image(item: Item, answers: Answers) -> Image.Image:
    """The image of an answer that is to be one.

    Raises:
      DataError: nobody drew one, or it cannot be read.
    """
    images = images_of(answers[item.id])
    if not images:
        raise DataError(f"the answer to {item.id} has no image; generate it again")
    return load_image(images[0])


def steps(parts: Parts) -> list[tuple[str, Path | None]]:
    """An answer as steps of a text and at most one image; '' where an image follows an image."""
    found: list[tuple[str, Path | None]] = []
    for part in parts:
        if isinstance(part, str):
            found.append((part, None))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0], part)
        else:
            found.append(("", part))
    return found


def mean(values: Sequence[float | int]) -> float:
    """Their mean; DataError without any."""
    if not values:
        raise DataError("there is nothing to score")
    return sum(values) / len(values)
