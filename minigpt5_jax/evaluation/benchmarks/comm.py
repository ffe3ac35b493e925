"""CoMM (Chen et al. 2024): step-by-step documents in four tasks; its repository has a fine-tuned MiniGPT-5.

Its documents as JSON (``data_id``, ``title``, ``step_info``; ``torch.load`` and ``json.dump`` of its ``.pt``)
-> ``{data_id}_task3/results.json`` with images, as its MiniGPT-5 writes them.  Texts of task 1 are scored
here; scores of images need networks, so use ``evaluate``; its program asks GPT-4o and writes
``evaluation_results.json``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.json_files import read_json, write_json
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.evaluation.benchmarks.contract import (
    Answers,
    Benchmark,
    Item,
    Parts,
    images_of,
    json_lines,
    mean,
)
from minigpt5_jax.evaluation.benchmarks.judge import Judge
from minigpt5_jax.evaluation.metrics.text import cider_d

WORDING = {
    1: (
        "Here are step-by-step instructions images sequence about {}:",
        "According to the above images, can you generate text for each step?",
    ),
    2: (
        "Here are step-by-step instructions without images about {}:",
        "According to the above steps, can you generate images for each step?",
    ),
    3: (
        "Here are step-by-step instructions with images about {}:",
        "According to the above steps, can you generate the rest steps?",
    ),
    4: ("Can you generate step-by-step instructions with images about {}?", ""),
}
"""Images to texts, texts to images, the rest of both, both from a title."""
JUDGED = ("evaluation_results.json", "completeness_and_text_fidelity.json")


def read(task: int, path: Path, images: ImageFolder) -> list[Item]:
    """An item a document."""
    found = []
    for row in json_lines(path, "data_id", "title", "step_info"):
        opening, ending = WORDING[task]
        steps = [_step(step, images, f"{path}: {row['data_id']}") for step in row["step_info"]]
        given = {1: len(steps), 2: len(steps), 3: len(steps) // 2, 4: 0}[task]
        parts: list[str | Path] = [opening.format(row["title"] or "")]
        for number, step in enumerate(steps[:given], 1):
            parts.append(f"({number})")
            parts += [p for p in step if task == 3 or isinstance(p, Path) == (task == 1)]
        data = {**row, "steps": steps, "wanted": steps[given:] if task > 2 else steps}
        found.append(Item(row["data_id"], (*parts, *([ending] if ending else [])), data))
    return found


def _step(blocks: Sequence[Mapping[str, str]], images: ImageFolder, where: str) -> Parts:
    return tuple(
        b["content"].strip() if b["type"] == "text" else Path(images.path(b["content"], where))
        for b in blocks
    )


def _spelled(parts: Parts) -> str:
    return " ".join("<IMAGE>" if isinstance(part, Path) else part for part in parts)


def layout(task: int, items: Sequence[Item], answers: Answers, folder: Path) -> None:
    """A folder an item: ``results.json``, drawn images, and those of the document in ``origin``."""
    for item in items:
        here = folder / f"{item.id}_task{task}"
        (here / "origin").mkdir(parents=True, exist_ok=True)
        number, names = 0, {"input": [], "output_gt": [], "predict": []}
        wanted = [image for step in item.data["wanted"] for image in images_of(step)] if task > 1 else []
        for kind, images in (("input", images_of(item.prompt)), ("output_gt", wanted)):
            for image in images:
                number += 1
                names[kind].append(f"{kind}_{number}.jpg")
                _save(image, here / "origin" / names[kind][-1])
        number = len(names["input"])
        for image in images_of(answers[item.id]):
            number += 1
            names["predict"].append(f"predict_{number}.jpg")
            _save(image, here / names["predict"][-1])
        result = {"model_input": _spelled(item.prompt), "model_output": _spelled(answers[item.id])}
        lists = {"input_image_list": names["input"], "output_gt_image_list": names["output_gt"]}
        write_json(here / "results.json", {**result, **lists, "prediction_image_list": names["predict"]})


def _save(image: Path, path: Path) -> None:
    load_image(image).save(path, "JPEG", quality=95)


def text_steps(text: str) -> list[str]:
    """The texts behind ``(1)``, ``(2)`` and so on."""
    return re.findall(r"\(\d+\)\s(.*?)\s*(?=\(\d+\)|$)", text, re.DOTALL)


def _texts(items: Sequence[Item], answers: Answers) -> dict[str, float]:
    """CIDEr-D of steps and of whole texts, 0 to 10; words are split as in our metric, not by Java."""
    got, want, whole_got, whole_want = [], [], [], []
    for item in items:
        true = [" ".join(p for p in step if isinstance(p, str)) for step in item.data["wanted"]]
        said = text_steps(_spelled(answers[item.id]))[: len(true)]
        got += said
        want += true[: len(said)]
        whole_got.append(" ".join(said))
        whole_want.append(" ".join(true[: len(said)]))
    if not got:
        raise DataError("no answer has steps, (1) ... (2) ...; there is nothing to score")
    return {
        "cider_d_steps": mean(list(cider_d(got, want))),
        "cider_d_texts": mean(list(cider_d(whole_got, whole_want))),
    }


def judged(folder: Path, task: int) -> dict[str, float]:
    """Means of what its program asked GPT-4o, over items; NA counts 0, as there.

    Raises:
      DataError: the folder has no such results.
    """
    found: dict[str, list[float]] = {}
    for here in sorted(folder.glob(f"*_task{task}")):
        path = next((here / name for name in JUDGED if (here / name).is_file()), None)
        value = read_json(path, "run its program again") if path else None
        for name, entry in value.items() if isinstance(value, dict) else ():
            for key, number in _points(name, entry).items():
                found.setdefault(key, []).append(float(number) if isinstance(number, int | float) else 0.0)
    if not found:
        raise DataError(
            f"{folder} has no *_task{task}/{JUDGED[0]}; give the folder that CoMM's program wrote"
        )
    return {name: mean(values) for name, values in found.items()}


def _points(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if name == "coherence_score":
        return {key: entry[key] for key in entry if key.endswith("_consistency")}
    return {name: entry.get("Score", entry.get("overall_score"))}


def score(
    task: int, items: Sequence[Item], answers: Answers, judge: Judge, results: Path | None
) -> dict[str, float]:
    """Texts of task 1, or with the folder of its program what its judge gave."""
    if results is not None:
        return judged(results, task)
    if task != 1:
        raise DataError(
            f"task {task} of CoMM is judged by its own program (--answers FOLDER of its results); FID and "
            "IS come from "
            "`evaluate --predictions --references`"
        )
    return _texts(items, answers)


BENCHMARKS = {
    f"task{task}": Benchmark(
        functools.partial(read, task), functools.partial(layout, task), functools.partial(score, task)
    )
    for task in WORDING
}
