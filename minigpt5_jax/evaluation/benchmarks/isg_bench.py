"""ISG-Bench (Chen et al., ICLR 2025): structure, block, image and holistic scores of interleaved answers.

``ISG-Bench.jsonl`` -> ``output.jsonl`` for its program ``ISG-eval.py``, which takes any server of the OpenAI
form and writes ``..._judge.jsonl``.  Structure (the order of texts and images) needs no judge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import Answers, Benchmark, Item, Parts, json_lines, mean
from minigpt5_jax.evaluation.benchmarks.judge import Judge

FILE = "output.jsonl"
LEAST = 1.0
"""What block and holistic scores are where there is none, as in ``calculate_performance.py``."""


def read(path: Path, images: ImageFolder) -> list[Item]:
    """An item a record."""
    found = []
    for row in json_lines(path, "id", "Category", "Query", "Golden"):
        item = Item(row["id"], _parts(row["Query"], images, f"{path}: {row['id']}"), row)
        _order(item)  # what the score needs fails here, where the file is told
        found.append(item)
    return found


def _parts(blocks: Sequence[Mapping[str, str]], images: ImageFolder, where: str) -> Parts:
    return tuple(
        b["content"] if b["type"] == "text" else Path(images.path(b["content"], where)) for b in blocks
    )


def _order(item: Item) -> list[str]:
    """``text`` or ``image`` for each part of the golden answer."""
    return [block["type"] for block in item.data["Golden"]]


def layout(items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """One file of all answers, images copied beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for item in items:
        output = []
        for number, part in enumerate(answers[item.id]):
            if isinstance(part, str):
                output.append({"type": "text", "content": part})
                continue
            copied = (folder / "images" / f"{item.id}_{number}{part.suffix}").absolute()
            shutil.copyfile(part, copied)
            output.append({"type": "image", "content": str(copied)})
        lines.append(json.dumps({**item.data, "output": output}, ensure_ascii=False) + "\n")
    (folder / FILE).write_text("".join(lines), "utf-8")


def structure(item: Item, answer: Parts) -> bool:
    """Whether texts and images come in the order of the golden answer."""
    return ["text" if isinstance(part, str) else "image" for part in answer] == _order(item)


def levels(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a judged record: image 0 to 1, block and holistic 1 to 10; block may be absent."""
    result = row.get("result")
    if result is None:
        return {"structure": 0.0, "block": LEAST, "image": 0.0, "holistic": LEAST}
    found = {"structure": float(bool(result.get("structure")))}
    judged = [
        b["VQA_judge_Score"]["Judge"]
        for b in result.get("block") or ()
        if "Judge" in (b.get("VQA_judge_Score") or {})
    ]
    if result.get("block") or not result.get("structure"):
        found["block"] = (
            mean([float(value) for value in judged]) if judged and result.get("structure") else LEAST
        )
    asked = result.get("image") or ()
    yes = [str((q.get("judge") or {}).get("Judge", "")).lower() == "yes" for q in asked]
    found["image"] = sum(yes) / len(asked) if asked else 0.0
    output = row.get("output")
    empty = not output or output[0]["content"] == ""
    found["holistic"] = LEAST if empty else float((result.get("holistic") or {}).get("overall_score", LEAST))
    return found


def score(items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None) -> dict[str, float]:
    """Means over records: structure alone, or with the file of its program all four levels."""
    if results is None:
        return {"structure": mean([float(structure(item, answers[item.id])) for item in items])}
    rows = [levels(row) for row in json_lines(results, "id")]
    names = ("structure", "block", "image", "holistic")
    return {name: mean([row[name] for row in rows if name in row]) for name in names}


BENCHMARK = Benchmark(read, layout, score)
