"""Captioned scenes, stories and dialogues on disk, in the files of CC3M, VIST and MMDialog.

    python -m minigpt5_jax.shapes.dataset --out DIR [--kind pairs|stories|dialogs] [--max_objects 3]

Nothing that reads them knows about shapes.  Beside each table stands its truth (``shapes_*.jsonl``),
which only the oracle's users read.  Everything is a function of (split, number, seed): images that are
there already are kept, if today's code drew them, and the table appears last, when all it names is there.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from minigpt5_jax.shapes.dialogs import Turn, draw_dialog
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.stories import Story, draw_story
from minigpt5_jax.shapes.wording import caption
from minigpt5_jax.shapes.world import Scene, all_scenes, draw_scene

SPLITS = ("train", "held_out")
OBJECT_SHARES = {1: (1.0,), 2: (0.5, 0.5), 3: (0.3, 0.4, 0.3)}  # most objects -> shares of their numbers
CHUNK = 256  # images rendered together
DRAWN_BY = ("world.py", "render.py", "wording.py", "stories.py", "dialogs.py", "dataset.py")
# Kinds of data, as parts of a generator's seed.
_PAIRS, _STORIES, _DIALOGS = 1, 2, 3


def draw_pairs(
    split: str, count: int, seed: int, max_objects: int = 1
) -> tuple[list[int], list[Scene], list[str]]:
    """``count`` scenes of a split with captions: (number of the image, scene, caption) of each.

    One-object scenes come in random order, and none comes twice before all have come once; their
    images are numbered as in ``all_scenes``.  With more objects, scenes are drawn one by one.

    Raises:
      ValueError: an unknown split, no scene asked for, or a number of objects that has no captions.
    """
    _check(split, count)
    if max_objects not in OBJECT_SHARES:
        raise ValueError(f"max_objects={max_objects}: captions are written for one to three objects")
    if max_objects > 1:
        shares = OBJECT_SHARES[max_objects]
        randoms = [_random(_PAIRS, split, seed, i) for i in range(count)]
        counts = [1 + int(random.choice(max_objects, p=shares)) for random in randoms]
        chosen = [draw_scene(r, split == "held_out", n) for r, n in zip(randoms, counts, strict=True)]
        texts = [caption(scene, random) for scene, random in zip(chosen, randoms, strict=True)]
        return list(range(count)), chosen, texts
    random, scenes = np.random.default_rng((seed, SPLITS.index(split))), list(all_scenes(split == "held_out"))
    rounds = -(-count // len(scenes))
    numbers = np.concatenate([random.permutation(len(scenes)) for _ in range(rounds)])[:count].tolist()
    chosen = [scenes[number] for number in numbers]
    return numbers, chosen, [caption(scene, random) for scene in chosen]


def draw_stories(split: str, count: int, seed: int) -> list[Story]:
    """``count`` stories; a longer list starts with the shorter one."""
    _check(split, count)
    held_out = split == "held_out"
    return [draw_story(_random(_STORIES, split, seed, i), held_out) for i in range(count)]


def draw_dialogs(split: str, count: int, seed: int, wishes: float = 0.0) -> list[tuple[Turn, ...]]:
    """``count`` dialogues, a share of them with ``wishes``; a longer list starts with the shorter one."""
    _check(split, count)
    held_out = split == "held_out"
    return [draw_dialog(_random(_DIALOGS, split, seed, i), held_out, wishes) for i in range(count)]


def write_pairs(
    directory: str | os.PathLike[str], split: str, count: int, seed: int, max_objects: int = 1
) -> Path:
    """Write ``shapes_<split>.tsv`` (caption, image_path), its PNG files and its scenes; returns the table.

    A table that is already there with the same content is left alone, so a resumed run costs nothing.
    """
    directory = Path(directory)
    numbers, scenes, captions = draw_pairs(split, count, seed, max_objects)
    folder = split if max_objects == 1 else f"{split}_{max_objects}"
    files = [f"{folder}/{number:05d}.png" for number in numbers]
    rows = ["caption\timage_path", *(f"{text}\t{file}" for text, file in zip(captions, files, strict=True))]
    pairs = zip(captions, scenes, strict=True)
    truth = [{"caption": text, **scene.to_json()} for text, scene in pairs]
    files_and_scenes = dict(zip(files, scenes, strict=True))
    # One-object images are the same for every seed, so that they are never drawn twice.
    stamp = "one object" if max_objects == 1 else f"{max_objects} objects, seed {seed}"
    return _write(
        directory / f"shapes_{split}.tsv",
        "\n".join(rows) + "\n",
        _truth_file(directory, split, "scenes"),
        truth,
        directory / folder,
        files_and_scenes,
        stamp,
    )


def write_stories(directory: str | os.PathLike[str], split: str, count: int, seed: int) -> Path:
    """Write stories in VIST's files (fidelity 5.3), with their truth; returns ``<split>_cleaned.json``."""
    directory = Path(directory)
    cleaned, mapping, truth, images = {}, {}, [], {}
    for number, story in enumerate(draw_stories(split, count, seed)):
        name, steps = str(number), []
        for index, step in enumerate(story.steps):
            image_id = f"{SPLITS.index(split) + 1}{number:07d}{index}"
            mapping[image_id] = f"{split}_images/{len(story.steps) * number + index:09d}.png"
            images[mapping[image_id]] = step.scene
            steps.append({"caption": step.text, "image_id": image_id, "sequence_index": index})
        cleaned[name] = steps
        told = [
            {"image": mapping[step["image_id"]], **one.to_json()}
            for step, one in zip(steps, story.steps, strict=True)
        ]
        truth.append({"story_id": name, "image_only": story.image_only, "steps": told})
    _replace(directory / f"{split}_image_mapping.json", json.dumps(mapping))
    return _write(
        directory / f"{split}_cleaned.json",
        json.dumps(cleaned),
        _truth_file(directory, split, "stories"),
        truth,
        directory / f"{split}_images",
        images,
        f"stories, seed {seed}",
    )


def write_dialogs(
    directory: str | os.PathLike[str], split: str, count: int, seed: int, wishes: float = 0.0
) -> Path:
    """Write dialogues in MMDialog's files (fidelity 5.4), with their truth; returns the conversations."""
    directory = Path(directory)
    lines, truth, images = [], [], {}
    for number, turns in enumerate(draw_dialogs(split, count, seed, wishes)):
        conversation, told = [], []
        for place, turn in enumerate(turns):
            pieces, file = [{"__TEXT__": turn.text}], None
            if turn.scene is not None:
                media = f"{SPLITS.index(split) + 1}{number:07d}{place:02d}"
                pieces.append({"__MEDIA__": media})
                file = f"{split}/{media}.jpg"
                images[file] = turn.scene
            conversation.append({"turn": pieces})
            told.append({"image": file, **turn.to_json()})
        lines.append(json.dumps({"conversation_id": number, "conversation": conversation}))
        truth.append({"conversation_id": number, "turns": told})
    return _write(
        directory / split / "conversations.json",
        "\n".join(lines) + "\n",
        _truth_file(directory, split, "dialogs"),
        truth,
        directory / split,
        images,
        f"dialogues, seed {seed}" + (f", wishes {wishes}" if wishes else ""),
    )


def read_scenes(directory: str | os.PathLike[str], split: str) -> list[Scene]:
    """Scene of every row of a table that :func:`write_pairs` wrote; FileNotFoundError if it did not."""
    return [Scene.from_json(line) for line in read_truth(directory, split, "scenes")]


def read_truth(directory: str | os.PathLike[str], split: str, kind: str) -> list[dict]:
    """Truth beside a table, one dict for each pair (``scenes``), story or dialogue (``kind``).

    Raises:
      FileNotFoundError: the table was not written by this module.
    """
    path = _truth_file(Path(directory), split, kind)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: only minigpt5_jax.shapes.dataset knows its scenes")
    return [json.loads(line) for line in path.read_text().splitlines()]


def scenes_of_images(directory: str | os.PathLike[str], split: str, kind: str) -> dict[str, Scene]:
    """Scene of every image of written stories or dialogues, by the path a reader gives it."""
    steps = "steps" if kind == "stories" else "turns"
    return {
        str(Path(directory) / part["image"]): Scene.from_json(part["scene"])
        for record in read_truth(directory, split, kind)
        for part in record[steps]
        if part["scene"] is not None
    }


def _check(split: str, count: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count={count}: at least one is needed")


def _random(kind: int, split: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, SPLITS.index(split), kind, number))


def _truth_file(directory: Path, split: str, kind: str) -> Path:
    return directory / f"shapes_{split}_{kind}.jsonl"


def _write(
    table: Path,
    content: str,
    truth_file: Path,
    truth: Sequence[dict],
    folder: Path,
    images: dict[str, Scene],
    stamp: str,
) -> Path:
    """Images, then the truth, then the table, unless the very table is there and today's code drew it."""
    mark, stamp = folder / ".made_of", f"{stamp}, code {_code()}"
    same = mark.is_file() and mark.read_text() == stamp
    if same and table.is_file() and table.read_text() == content and truth_file.is_file():
        return table
    table.unlink(missing_ok=True)  # it may name images that are about to change
    root = truth_file.parent
    if not same:
        _begin(folder, mark, stamp)
    _draw(root, images)
    _replace(truth_file, "".join(json.dumps(line) + "\n" for line in truth))
    _replace(table, content)
    return table


@functools.cache
def _code() -> str:
    """Hash of everything that an image, or the scene behind its name, depends on."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in DRAWN_BY)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def _begin(folder: Path, mark: Path, stamp: str) -> None:
    """A folder for images of one kind, seed and code; others are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("*.jpg")):
        path.unlink()
    _replace(mark, stamp)


def _draw(root: Path, images: dict[str, Scene]) -> None:
    """Draw what is missing."""
    missing = [name for name in images if not (root / name).is_file()]
    starts: Iterable[int] = range(0, len(missing), CHUNK)
    for start in tqdm(starts, desc="drawing", unit=f"x{CHUNK} images", delay=2.0):
        names = missing[start : start + CHUNK]
        for name, image in zip(names, render([images[name] for name in names]), strict=True):
            _replace(root / name, _encoded(image, Path(name).suffix))


def _encoded(image: np.ndarray, suffix: str) -> bytes:
    file = io.BytesIO()
    if suffix == ".png":
        Image.fromarray(image).save(file, "PNG", compress_level=1)
    else:  # as good as JPEG can: the oracle reads it like the original
        Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _replace(path: Path, content: str | bytes) -> None:
    """A file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def main() -> None:
    """Command line."""
    from absl import flags

    from minigpt5_jax import cli

    out = cli.define_path("out", None, "folder to write to", required=True)
    kind = flags.DEFINE_enum("kind", "pairs", ["pairs", "stories", "dialogs"], "what to write")
    objects = flags.DEFINE_integer("max_objects", 1, "of pairs: objects at most", 1, 3)
    train = flags.DEFINE_integer("train", 4096, "training records", lower_bound=1)
    held_out = flags.DEFINE_integer("held_out", 320, "held-out records", lower_bound=1)
    seed = flags.DEFINE_integer("seed", 0, "of scenes and wordings", lower_bound=0)

    def run() -> None:
        folder = Path(cli.check_writable(out.value, "out"))
        for split, size in (("train", train.value), ("held_out", held_out.value)):
            if kind.value == "pairs":
                print(write_pairs(folder, split, size, seed.value, objects.value))
            else:
                write = write_stories if kind.value == "stories" else write_dialogs
                print(write(folder, split, size, seed.value))

    cli.start(lambda _: cli.guarded(run))


if __name__ == "__main__":
    main()
