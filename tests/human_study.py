"""Predictions and answers for tests of the study with people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_jax.evaluation.human.make import Plan, make

SYSTEMS = ("ours", "other")


def picture(path: Path, seed: int) -> str:
    """A scene of two plain colours, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 230, (3, 3, 3), np.uint8))
    small.resize((96, 96), Image.Resampling.BICUBIC).save(path)
    return path.name


def jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turn(role: str, text: str, image: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}, {"type": "image", "path": image}]}


def materials(folder: Path, count: int = 8) -> dict:
    """A story of three steps for each sample, and two systems' last steps."""
    stories, answers = [], {name: [] for name in SYSTEMS}
    for i in range(count):
        seen = [picture(folder / f"data/{i}_{step}.png", 10 * i + step) for step in range(3)]
        turns = [turn("user", f"Step {step + 1} of walk {i} <b>&amp;</b>.", seen[step]) for step in range(2)]
        stories.append(
            {"id": f"s{i}", "turns": [*turns, turn("assistant", f"The true end of {i}.", seen[2])]}
        )
        for place, name in enumerate(SYSTEMS):
            image = picture(folder / f"{name}/{i}.png", 1000 * (place + 1) + i)
            said = turn("assistant", f"An end of {i} by {'AB'[place]} ###", image)
            answers[name].append({"id": f"s{i}_2", "turns": [said]})
    for name, records in answers.items():
        jsonl(folder / name / "conversations.jsonl", records)
    references = jsonl(folder / "data/references.jsonl", stories)
    return {
        "references": str(references),
        "systems": {name: str(folder / name) for name in SYSTEMS},
    }


def study_in(folder: Path, count: int = 8, **more) -> tuple[Path, dict]:
    """(folder of a study, its key)."""
    output = folder / "study"
    make(
        Plan(
            **materials(folder / "given", count),
            output=str(output),
            **{"judgements": 2, "per_rater": 4, "seed": 0, **more},
        )
    )
    return output, json.loads((output / "key.json").read_text())


def answer_file(folder: Path, key: dict, token: str, choose, seconds: float = 10.0) -> Path:
    """What the page saves for a rater; ``choose(left, right, item, question)`` gives 1, 2 or tie."""
    items = []
    for order, screen in enumerate(key["raters"][token]):
        item = key["items"][screen["item"]]
        sides = item["options"][::-1] if screen["exchanged"] else item["options"]
        answers = {name: choose(*sides, item, name) for name in key["questions"]}
        entry = {"id": screen["item"], "order": order, "left_is": None, "answers": answers}
        items.append({**entry, "seconds": seconds, "comment": ""})
    value = {"study": "", "study_sha256": key["study_sha256"], "rater": token, "started": "", "items": items}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"answers_{token}.json"
    path.write_text(json.dumps(value))
    return path


def honest(left: str, right: str, item: dict, question: str) -> str:
    """Right answers to controls; of two systems the first one's."""
    expected = item["expected"].get(question, SYSTEMS[0])
    return "tie" if expected == "tie" or expected not in (left, right) else "12"[expected == right]
