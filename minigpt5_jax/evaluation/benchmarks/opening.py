"""OpenING (Zhou et al., CVPR 2025): open-ended interleaved answers, scored on seven criteria or in pairs.

``dev_data.jsonl`` or ``test_data.jsonl`` -> ``{uid}.json`` and ``{uid}-o-{k}.jpg`` in ``NAME_output``.
Instructions for the judge are its ``prompts/detailed_score_system.txt``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.json_files import write_json
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import (
    Answers,
    Benchmark,
    Item,
    json_lines,
    mean,
    steps,
)
from minigpt5_jax.evaluation.benchmarks.judge import Judge, Request

CRITERIA = (
    "Correctness",
    "Image-Text Coherency",
    "Multi-step Consistency",
    "Content Quality",
    "Human Preference Alignment",
    "Completeness",
    "Content Richness",
)
ENDING = "\nPlease only output the json result: "


def read(path: Path, images: ImageFolder) -> list[Item]:
    """An item a record."""
    found = []
    for row in json_lines(path, "conversations"):
        uid = row.get("total_uid") or (
            f"{int(row['meta_task_id']):02}{int(row['subtask_id']):02}{int(row['data_id']):03}"
        )
        prompt: list[str | Path] = []
        for step in row["conversations"][0]["input"]:
            text = step["text"].replace("<BEGIN>", "").replace("<image>", "").strip()
            prompt += [text] * bool(text)
            prompt += [Path(images.path(step["image"], f"{path}: {uid}"))] if step["image"] else []
        found.append(Item(uid, tuple(prompt), row))
    return found


def layout(items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """A JSON file an item, with its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        output = []
        for number, (text, image) in enumerate(steps(answers[item.id])):
            name = None
            if image is not None:
                name = f"{item.id}-o-{number}.jpg"
                load_image(image).save(folder / name, "JPEG", quality=95)
            output.append({"text": text, "image": name})
        asked = item.data["conversations"][0]
        write_json(folder / f"{item.id}.json", {**item.data, "conversations": [asked, {"output": output}]})


def requests(items: Sequence[Item], answers: Answers, instructions: str) -> dict[tuple[str, ...], Request]:
    """(item,) -> request, with images numbered as the instructions say."""
    found = {}
    for item in items:
        parts: list[str | Path] = []
        images = 0
        for opening, some in (("INPUT: ", item.prompt), ("\nOUTPUT: ", answers[item.id] or ("None",))):
            for place, (text, image) in enumerate(steps(some)):
                mark = ""
                if image is not None:
                    mark, images = f" <IMG_{images}></IMG_{images}>", images + 1
                parts.append(f"{opening if place == 0 else ''}{text}{mark}")
                parts += [image] if image is not None else []
        found[(item.id,)] = Request((*parts, ENDING), instructions)
    return found


def criteria(reply: str, where: str) -> dict[str, float]:
    """The seven scores of a reply.

    Raises:
      DataError: one of them is missing.
    """
    try:
        value = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])
        value = value.get("scores", value)
        return {name: float(value[name]["Score"]) for name in CRITERIA}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the judge's reply to {where} does not have the seven scores ({type(error).__name__} {error}); "
            "delete its line from the replies and from the cache, and ask again"
        ) from None


def win_rates(battles: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``MODEL RULE`` -> win rate, by the benchmark's four rules for ties.

    ``forced``: a tie counts for whom it leans to (``Tie(A)``).  ``no_tie``: ties are left out.  ``tie_0`` and
    ``tie_half``: a tie counts 0 or a half for both.
    """
    wins: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    matches: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for battle in battles:
        winner = battle["winner"]
        for side in "AB":
            model, tie = battle[f"model_{side}"]["name"], "Tie" in winner
            gains = {
                "forced": float(winner in (side, f"Tie({side})")),
                "tie_0": float(winner == side),
                "tie_half": 0.5 if tie else float(winner == side),
            }
            for rule, gain in gains.items() if tie else {**gains, "no_tie": float(winner == side)}.items():
                wins[model][rule] += gain
                matches[model][rule] += 1
    return {f"{m} {rule}": wins[m][rule] / n for m, rules in matches.items() for rule, n in rules.items()}


def score(items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None) -> dict[str, float]:
    """Mean of each criterion and of these means, 0 to 10; of a file of battles, win rates."""
    if results is not None:
        return win_rates(json_lines(results, "model_A", "model_B", "winner"))
    asked = requests(items, answers, judge.instructions)
    scored = [criteria(reply, key[0]) for key, reply in judge.replies(asked).items()]
    found = {name: mean([row[name] for row in scored]) for name in CRITERIA}
    return {"overall": mean(list(found.values())), **found}


BENCHMARK = Benchmark(read, layout, score, requests, instructions=True)
