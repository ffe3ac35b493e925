"""Answers of raters, from files of the page or exports of platforms, and the judgements that they are."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.json_files import form_of, read_json
from minigpt5_jax.evaluation.human.make import KEY
from minigpt5_jax.evaluation.human.questions import CHOICES, LEFT, TIE

JUDGEMENTS = "judgements.jsonl"


@dataclasses.dataclass(frozen=True)
class Answered:
    """What somebody said on one screen.

    Attributes:
      where: file, for messages.  study: hash of the study.  token: of the rater whose screen it is.
      place: number of the screen, from 0.
      worker: name at a platform, '' for the rater with the token.
      answers: question -> choice, or None.  item: as the page names it; None where only the place is known.
    """

    where: str
    study: str
    token: str
    place: int
    answers: Mapping[str, str | None]
    seconds: float = 0.0
    comment: str = ""
    worker: str = ""
    item: str | None = None


def read_key(study: str | Path) -> dict[str, Any]:
    """The key of a study's folder.

    Raises:
      ConfigError: the folder holds no study.
      DataError: its key is damaged.
    """
    path = Path(study) / KEY
    if not path.is_file():
        raise ConfigError(f"--study={study} holds no {KEY}; give the --output of `human make`")
    key = read_json(path, "restore it from a copy; without it the answers tell nothing")
    if not isinstance(key, dict) or "study_sha256" not in key:
        raise DataError(f"{path} is no key of a study; restore it from a copy")
    return key


def read_answers(paths: Sequence[str | Path]) -> list[Answered]:
    """What is in files of answers; of folders all ``.json`` and ``.csv``.

    Files are those that the page saves, the JSON that Label Studio exports, and the table of results of
    Mechanical Turk.

    Raises:
      DataError: there is none, one is cut off or of none of these forms.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = (
            sorted(p for p in path.iterdir() if p.suffix in (".json", ".csv")) if path.is_dir() else [path]
        )
        files += inside
    if not files:
        raise DataError("there are no files of answers; give --answers FILE or a folder of them")
    return [answered for file in files for answered in _read(file)]


def _read(path: Path) -> list[Answered]:
    wanted = (
        "holds no answers; give files that the page saved, or exports of Label Studio (.json) or Mechanical "
        "Turk (.csv)"
    )
    if path.suffix == ".csv":
        with form_of(path, wanted):
            return list(_mturk(path))
    remedy = (
        "have the answers saved once more on the page where they were given (it still knows them), or leave "
        "the file out"
    )
    value = read_json(path, remedy)
    with form_of(path, wanted):
        return list(_label_studio(path, value) if isinstance(value, list) else _page(path, value))


def _seconds(value: Any) -> float:
    """A time; ValueError where it is none, as NaN is."""
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} is no time in seconds")
    return seconds


def _page(path: Path, value: Mapping[str, Any]) -> Iterator[Answered]:
    for place, item in enumerate(value["items"]):
        yield Answered(
            where=str(path),
            study=str(value["study_sha256"]),
            token=str(value["rater"]),
            place=place,
            answers=dict(item["answers"]),
            seconds=_seconds(item["seconds"]),
            comment=str(item["comment"]),
            item=item["id"],
        )


def _label_studio(path: Path, tasks: Sequence[Mapping[str, Any]]) -> Iterator[Answered]:
    for task in tasks:
        for annotation in task["annotations"]:
            if annotation.get("was_cancelled"):
                continue
            chosen = {
                result["from_name"]: result["value"]["choices"][0]
                for result in annotation["result"]
                if result["type"] == "choices"
            }
            yield Answered(
                where=str(path),
                study=str(task["data"]["study"]),
                token=str(task["data"]["rater"]),
                place=int(task["data"]["place"]),
                answers={name: _choice(value) for name, value in chosen.items()},
                seconds=_seconds(annotation.get("lead_time") or 0),
                worker=f"label studio {annotation['completed_by']}",
            )


def _choice(said: str) -> str:
    """A choice by its stored or its shown form."""
    return {shown: value for value, shown in CHOICES.items()}.get(said, said)


def _mturk(path: Path) -> Iterator[Answered]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        needed = ("Input.study", "Input.rater", "Input.place", "WorkerId")
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}; give the table of results that Mechanical Turk "
                "makes of a batch of this study"
            )
        for row in rows:
            yield Answered(
                where=f"{path}:{rows.line_num}",
                study=row["Input.study"],
                token=row["Input.rater"],
                place=int(row["Input.place"]),
                answers=_mturk_answers(row),
                seconds=_seconds(row.get("WorkTimeInSeconds") or 0),
                worker=f"mturk {row['WorkerId']}",
            )


def _mturk_answers(row: Mapping[str, str]) -> dict[str, str | None]:
    """Answers in any form that a table of results has: one JSON cell, a cell a question, or one a choice."""
    given: dict[str, Any] = {
        name.removeprefix("Answer."): cell
        for name, cell in row.items()
        if name.startswith("Answer.") and cell
    }
    for forms in json.loads(given.pop("taskAnswers", "[]")):
        given |= forms
    found: dict[str, str | None] = {}
    for name, value in given.items():
        question, dot, choice = name.partition(".")
        if isinstance(value, dict):
            found[name] = next((choice for choice, on in value.items() if on), None)
        elif not dot:
            found[name] = str(value)
        elif str(value).lower() in ("true", "on", "1"):
            found[question] = choice
    return found


def merge(study: str | Path, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Writes a judgement a line, sides resolved, and returns counts.

    A judgement names the system that was chosen, or a tie.  Counts are ``judgements``, ``raters``,
    ``missing`` (questions without an answer, on screens of the raters that are there) and ``twice``: workers
    of platforms who judged an item again on another rater's screen, where only the first counts.

    Raises:
      ConfigError: no study.
      DataError: answers of another study or of raters that it does not have, two files of one rater, or what
        :func:`read_answers` says.
    """
    key = read_key(study)
    answered = read_answers(paths)
    _check(answered, key)
    rows, seen, twice = [], set(), 0
    for one in answered:
        screen = key["raters"][one.token][one.place]
        rater = _rater(one, key["salt"])
        name = (rater, screen["item"], screen["repeat"])
        if name in seen:
            twice += 1
            continue
        seen.add(name)
        rows.append(_judgement(one, screen, rater, key))
    given = sum(value is not None for row in rows for value in row["answers"].values())
    unseen = _screens(answered, key) - {(one.token, one.place) for one in answered}
    path = Path(study) / JUDGEMENTS
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return {
        "judgements": given,
        "raters": len({row["rater"] for row in rows}),
        "missing": (len(rows) + len(unseen)) * len(key["questions"]) - given,
        "twice": twice,
        "written": str(path),
    }


def _screens(answered: Sequence[Answered], key: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Screens that the raters who are there should have judged; those of platforms judge what they like."""
    return {
        (one.token, n) for one in answered if not one.worker for n in range(len(key["raters"][one.token]))
    }


def _check(answered: Sequence[Answered], key: Mapping[str, Any]) -> None:
    """DataError where answers are not of the study, or two people had one token."""
    files: dict[str, str] = {}
    for one in answered:
        if one.study != key["study_sha256"]:
            raise DataError(
                f"{one.where} answers another study ({one.study[:12]}... instead of "
                f"{key['study_sha256'][:12]}...); give the --study that these answers are of, or leave the "
                "file out"
            )
        if one.token not in key["raters"] or not 0 <= one.place < len(key["raters"][one.token]):
            raise DataError(
                f"{one.where}: rater {one.token}, screen {one.place} is not in the study; leave it out"
            )
        if bad := {
            n: v for n, v in one.answers.items() if n in key["questions"] and v not in (*CHOICES, None)
        }:
            raise DataError(f"{one.where}: {bad} is none of {', '.join(CHOICES)}; leave the file out")
        if one.item not in (None, key["raters"][one.token][one.place]["item"]):
            raise DataError(
                f"{one.where}: screen {one.place} is not item {one.item}; the file was edited, leave it out"
            )
        other = one.where if one.worker else files.setdefault(one.token, one.where)
        if other != one.where:
            raise DataError(
                f"{other} and {one.where} have the same rater, {one.token}; keep one of them, or, if two "
                "people had the same link, only the first (raters.csv has a token for each)"
            )


def _rater(one: Answered, salt: str) -> str:
    """A name that tells nothing: the token, or the salted hash of a platform's."""
    return hashlib.sha256(f"{salt} {one.worker}".encode()).hexdigest()[:12] if one.worker else one.token


def _judgement(
    one: Answered, screen: Mapping[str, Any], rater: str, key: Mapping[str, Any]
) -> dict[str, Any]:
    item = key["items"][screen["item"]]
    left, right = item["options"][::-1] if screen["exchanged"] else item["options"]

    def resolved(choice: str | None) -> str | None:
        return choice if choice in (None, TIE) else left if choice == LEFT else right

    return {
        "rater": rater,
        "item": screen["item"],
        "kind": item["kind"],
        "sample": item["sample"],
        "repeat": screen["repeat"],
        "left": left,
        "answers": {name: resolved(one.answers.get(name)) for name in key["questions"]},
        # Both sides of a control may have one name: which side was chosen is kept beside.
        "sides": {name: one.answers.get(name) for name in key["questions"]},
        "seconds": one.seconds,
        "comment": one.comment,
    }
