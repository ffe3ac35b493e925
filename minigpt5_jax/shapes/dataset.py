"""Captioned scenes on disk, in the files of CC3M.

    python -m minigpt5_jax.shapes.dataset --out DIR

Nothing that reads them knows about shapes.  Beside each table stands ``shapes_<split>_scenes.jsonl``,
which only the oracle reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import Scene, all_scenes, caption

SPLITS = ("train", "held_out")


def draw_pairs(split: str, count: int, seed: int) -> tuple[list[int], list[Scene], list[str]]:
    """``count`` scenes of a split with captions: (number within ``all_scenes``, scene, caption) of each.

    Scenes come in random order, and none comes twice before all have come once.

    Raises:
      ValueError: an unknown split, or no scene asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count={count}: at least one scene is needed")
    random, scenes = np.random.default_rng((seed, SPLITS.index(split))), list(all_scenes(split == "held_out"))
    rounds = -(-count // len(scenes))
    numbers = np.concatenate([random.permutation(len(scenes)) for _ in range(rounds)])[:count].tolist()
    chosen = [scenes[number] for number in numbers]
    return numbers, chosen, [caption(scene, random) for scene in chosen]


def write_pairs(directory: str | os.PathLike[str], split: str, count: int, seed: int) -> Path:
    """Write ``shapes_<split>.tsv`` (caption, image_path), its PNG files and its scenes; returns the table.

    A table that is already there with the same content is left alone, so a resumed run costs nothing.
    """
    directory = Path(directory)
    numbers, scenes, captions = draw_pairs(split, count, seed)
    files = [f"{split}/{number:05d}.png" for number in numbers]
    rows = ["caption\timage_path", *(f"{text}\t{file}" for text, file in zip(captions, files, strict=True))]
    table, content = directory / f"shapes_{split}.tsv", "\n".join(rows) + "\n"
    if table.is_file() and table.read_text() == content:
        return table
    (directory / split).mkdir(parents=True, exist_ok=True)
    once = dict(zip(files, scenes, strict=True))
    for file, picture in zip(once, render(list(once.values())), strict=True):
        Image.fromarray(picture).save(directory / file, compress_level=1)
    pairs = zip(captions, scenes, strict=True)
    lines = [json.dumps({"caption": text, **scene.to_json()}) for text, scene in pairs]
    _scenes_file(directory, split).write_text("\n".join(lines) + "\n")
    partial = table.with_suffix(".partial")  # the table appears when everything it names is there
    partial.write_text(content)
    partial.replace(table)
    return table


def read_scenes(directory: str | os.PathLike[str], split: str) -> list[Scene]:
    """Scene of every row of a table that :func:`write_pairs` wrote.

    Raises:
      FileNotFoundError: the table was not written by it.
    """
    path = _scenes_file(Path(directory), split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: only minigpt5_jax.shapes.dataset knows its scenes")
    return [Scene.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def _scenes_file(directory: Path, split: str) -> Path:
    return directory / f"shapes_{split}_scenes.jsonl"


def main() -> None:
    """Command line."""
    from absl import app, flags

    out = flags.DEFINE_string("out", None, "folder to write to", required=True)
    train = flags.DEFINE_integer("train", 4096, "training pairs", lower_bound=1)
    held_out = flags.DEFINE_integer("held_out", 320, "held-out pairs", lower_bound=1)
    seed = flags.DEFINE_integer("seed", 0, "of scenes and wordings", lower_bound=0)

    def run(_: list[str]) -> None:
        for split, size in (("train", train.value), ("held_out", held_out.value)):
            print(write_pairs(out.value, split, size, seed.value))

    app.run(run)


if __name__ == "__main__":
    main()
