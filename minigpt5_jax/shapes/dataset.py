"""The small world on disk, in CC3M's format: a tsv of captions and picture paths, PNG files beside it.

    python -m minigpt5_jax.shapes.dataset --out DIR

Nothing that reads the files knows about shapes; only the oracle reads the sidecar with the scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import Scene, all_scenes, caption

SPLITS = {"train": False, "held_out": True}


def write_pairs(directory: str | Path, split: str, count: int, seed: int) -> Path:
    """Write ``shapes_<split>.tsv``, its pictures and ``shapes_<split>_scenes.jsonl``; returns the tsv.

    Scenes are dealt like cards: each of the split's scenes once before any comes again.  Files of the
    same split, count and seed are left as they are.

    Raises:
      ValueError: an unknown split or a count below one.
    """
    if split not in SPLITS or count < 1:
        raise ValueError(f"split is one of {', '.join(SPLITS)} and count at least 1; got {split!r}, {count}")
    directory = Path(directory)
    tsv, made = directory / f"shapes_{split}.tsv", directory / f"shapes_{split}.json"
    recipe = {"split": split, "count": count, "seed": seed}
    if tsv.is_file() and made.is_file() and json.loads(made.read_text()) == recipe:
        return tsv
    random = np.random.default_rng([seed, SPLITS[split]])
    every = list(all_scenes(SPLITS[split]))
    dealt = np.concatenate([random.permutation(len(every)) for _ in range(-(-count // len(every)))])
    scenes = [every[i] for i in dealt[:count]]
    (directory / split).mkdir(parents=True, exist_ok=True)
    rows = ["caption\timage_path"]
    for number, (scene, picture) in enumerate(zip(scenes, render(scenes), strict=True)):
        name = f"{split}/{number:09d}.png"
        Image.fromarray(picture).save(directory / name, compress_level=1)
        rows.append(f"{caption(scene, random)}\t{name}")
    sidecar = "".join(json.dumps(scene.to_json()) + "\n" for scene in scenes)
    (directory / f"shapes_{split}_scenes.jsonl").write_text(sidecar)
    tsv.write_text("\n".join(rows) + "\n")
    made.write_text(json.dumps(recipe))  # last: only complete files count as made
    return tsv


def read_scenes(directory: str | Path, split: str) -> list[Scene]:
    """Scenes of a split, in the order of its tsv."""
    lines = (Path(directory) / f"shapes_{split}_scenes.jsonl").read_text().splitlines()
    return [Scene.from_json(json.loads(line)) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=4096, help="training pairs")
    parser.add_argument("--held_out", type=int, default=320, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    for name in SPLITS:
        print(write_pairs(given.out, name, getattr(given, name), given.seed))
