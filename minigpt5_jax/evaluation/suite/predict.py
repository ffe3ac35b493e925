"""Answers of a run to the samples of an evaluation, kept as they are made, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.lines import TextLines
from minigpt5_jax.evaluation.suite.features import content_hash
from minigpt5_jax.evaluation.suite.progress import Progress, Report
from minigpt5_jax.evaluation.suite.samples import FILE
from minigpt5_jax.inference.session import Generation, Prompt
from minigpt5_jax.wiring.restore import OpenedRun

MADE = "made.json"
SHOWN = 5


def made_by(run: OpenedRun, prompts: Mapping[str, Prompt], **settings: Any) -> dict[str, Any]:
    """What the answers of a run depend on, as plain JSON.

    The hash of the step tells a run from another one that was trained in its folder; those of the prompts
    tell edited data.
    """
    return {
        "checkpoint": str(run.checkpoints.resolve()),
        "step": run.step,
        "step_hash": run.reader.fingerprint(run.step),
        "frozen": dict(run.meta.get("frozen", {})),
        "inference": json.loads(json.dumps(run.config.inference.to_dict())),
        **settings,
        "prompts": {name: _prompt_hash(prompt) for name, prompt in prompts.items()},
    }


def _prompt_hash(prompt: Prompt) -> str:
    """sha256 of a prompt's text, images and seed."""
    parts = [prompt.source, *map(content_hash, prompt.images), str(prompt.seed)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def predict(
    run: OpenedRun,
    prompts: Mapping[str, Prompt],
    folder: Path,
    *,
    settings: dict[str, Any],
    batch_size: int,
    report: Report,
) -> None:
    """Answers every prompt that has no answer in ``folder`` yet, and adds the answers there.

    Args:
      settings: of the evaluation, that answers depend on besides the run.

    Raises:
      ConfigError: the folder holds answers of another run, of other settings, or to other prompts.
      DataError, CheckpointError, WeightFileError: as for generation.
    """
    made = made_by(run, prompts, **settings)
    _claim(folder, made)
    path = folder / FILE
    done = _answered(path)
    waiting = {name: prompt for name, prompt in prompts.items() if name not in done}
    if done:
        report(f"predictions: {len(prompts) - len(waiting)} of {len(prompts)} are there from before")
    if not waiting:
        return
    run.check()
    report(f"reading the weights of step {run.step} of {run.checkpoints}")
    batch_size = min(batch_size, len(waiting))
    session = run.session(batch_size=batch_size)
    progress = Progress("predictions", report, time.monotonic)
    progress.start(len(waiting))
    # Prompts of like length share a compiled program, so they follow each other.
    names = sorted(waiting, key=lambda name: (len(waiting[name].images), len(waiting[name].source)))
    for start in range(0, len(names), batch_size):
        some = names[start : start + batch_size]
        answers = session.generate([waiting[name] for name in some])
        with path.open("a", encoding="utf-8") as file:
            for name, answer in zip(some, answers, strict=True):
                record = _record(name, waiting[name], answer, folder)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        progress.done(len(some))


def _claim(folder: Path, made: dict[str, Any]) -> None:
    """Makes the folder, or checks that its answers were made in the same way; notes the prompts."""
    path, prompts = folder / MADE, made["prompts"]
    if path.is_file():
        before = json.loads(path.read_text())
        if told := _differences(before, made):
            raise ConfigError(
                f"{folder} holds predictions that were made otherwise: {told[:600]}; choose another "
                "--output, or delete that folder"
            )
        prompts = before["prompts"] | prompts
    elif (folder / FILE).exists():
        raise ConfigError(f"{folder} holds predictions of another program; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**made, "prompts": prompts}, indent=1))
    partial.replace(path)


def _differences(before: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """What answers were made by before and what they would be now, where they differ; '' for nothing.

    Prompts are compared where both have them: a larger ``--count`` asks more of them.
    """
    names = sorted((made.keys() | before.keys()) - {"prompts"})
    told = [
        f"{name} (was {before.get(name)!r}, is {made.get(name)!r})"
        for name in names
        if made.get(name) != before.get(name)
    ]
    then, now = before.get("prompts", {}), made["prompts"]
    if other := [name for name in now if name in then and then[name] != now[name]]:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        told.append(f"texts or images of the prompts {', '.join(other[:SHOWN])}{more}: the data were changed")
    return ", ".join(told)


def _answered(path: Path) -> set[str]:
    """Samples with an answer; a last line that was cut off in writing is removed."""
    if not path.is_file():
        return set()
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    if not path.stat().st_size:
        return set()
    lines = TextLines(path)
    return {json.loads(lines[number])["id"] for number in range(len(lines))}


def _record(name: str, prompt: Prompt, answer: Generation, folder: Path) -> dict[str, Any]:
    """The answer in the schema, its images beside it under a name of the sample."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": prompt.source}]
    content: list[dict[str, str]] = []
    for number, part in enumerate(answer.parts):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        content.append({"type": "image", "path": _save(name, number, part, folder)})
        turns.append({"role": "assistant", "content": content})  # a turn ends with its image
        content = []
    if content or len(turns) == 1:
        turns.append({"role": "assistant", "content": content or ""})
    return {"id": name, "turns": turns}


def _save(name: str, number: int, image: np.ndarray, folder: Path) -> str:
    (folder / "images").mkdir(exist_ok=True)
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in name)
    path = f"images/{safe[:80]}-{zlib.crc32(name.encode()):08x}-{number}.png"
    Image.fromarray(image).save(folder / path)
    return path
