"""VIST: stories of five steps, each a text and an image (fidelity 5.3)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import BOM, check_utf8
from minigpt5_jax.data.paths import ImageFolder, image_folder, not_found
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.fields import Fields, RepeatedKeyError, unique_keys
from minigpt5_jax.data.samples.stories import Step, Story, StoryRules
from minigpt5_jax.data.sources.base import Source, check_index

STEPS = 5  # of a story as VIST was published


class VistSource(Source):
    """Stories from the two files of the original (fidelity 5.3), or from VIST as it was published.

    ``cleaned`` holds an object, story id -> list of steps in order, each ``{"caption": text, "image_id":
    text, "sequence_index": number}``; ``mapping`` holds an object, image id -> path.  A story may have any
    number of steps from one on.  A story that breaks the form, or that names an image which is not in the
    mapping, counts as one sample that cannot be fetched.  Image files are looked for when they are read.

    VIST's own file (``train.story-in-sequence.json``) holds ``annotations``, lists of one object with
    ``story_id``, ``photo_flickr_id``, ``text`` and ``worker_arranged_photo_order``.  Its images are the files
    of ``image_root`` that are named by their ``photo_flickr_id``, whatever their ending.

    Args:
      cleaned: the stories.
      mapping: paths of the images; default: beside ``cleaned``, with ``image_mapping`` for ``cleaned`` in
        its name (quirk Q29).
      image_root: folder that paths are relative to; default: the stories' folder.
      rules: how stories become samples.
      allow_outside_images: whether image paths may lead out of their folder.

    Raises:
      DataError: a file or the folder is missing, no JSON, not of this form as a whole, or names a story or
        an image twice; no name for the mapping.
    """

    def __init__(
        self,
        cleaned: str | Path,
        mapping: str | Path | None = None,
        image_root: str | Path | None = None,
        rules: StoryRules = StoryRules(),
        *,
        allow_outside_images: bool = False,
    ):
        self.path = Path(cleaned)
        root, self._rules = image_folder(self.path, image_root, allow_outside_images), rules
        self.image_root = str(root.root)
        values, stories_hash = _read_object(self.path, "stories")
        self.mapping_path = None if mapping is None else Path(mapping)
        if mapping is None and not published(values):
            self.mapping_path = mapping_path(self.path)
        paths, mapping_hash = {}, ""
        if self.mapping_path is not None:
            paths, mapping_hash = _read_object(self.mapping_path, "image paths")
        if published(values):
            values, paths = from_published(self.path, values, paths or None, root.root)
        if not values:
            raise DataError(f"no stories in {self.path}")
        self._hash = f"{stories_hash} {mapping_hash}"
        self._stories = [parse_story(self.path, name, value, paths, root) for name, value in values.items()]
        counts = [1 if isinstance(s, SampleError) else len(self._samples(s)) for s in self._stories]
        self._stops = np.cumsum(counts)

    @property
    def rows(self) -> int:
        """Stories of the file, unusable ones included."""
        return len(self._stories)

    def story(self, row: int) -> Story:
        """A story as it is written; SampleError for one that cannot be used."""
        story = self._stories[row]
        if isinstance(story, SampleError):
            raise story
        return story

    def _samples(self, story: Story) -> list[tuple[int, str]]:
        return self._rules.samples(len(story.steps))

    def _find(self, index: int) -> tuple[Story, int, str]:
        check_index(index, self)
        row = int(np.searchsorted(self._stops, index, side="right"))
        story = self.story(row)
        samples = self._samples(story)
        return story, *samples[index - int(self._stops[row]) + len(samples)]

    def __len__(self) -> int:
        return int(self._stops[-1])

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index`` in its wording of this epoch; SampleError for a story that cannot be used."""
        return self._rules.example(*self._find(index), epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording, its context whole; errors as ``example``."""
        return self._rules.texts(*self._find(index))

    def stories(self) -> Int64[np.ndarray, " n1"]:
        """As :meth:`OfStories.stories`; one that cannot be used is one sample."""
        return np.concatenate([np.zeros(1, np.int64), self._stops])

    def image_fingerprint(self) -> str:
        """Hash of which images each sample has, whatever its wording."""
        return hashlib.sha256(f"vist images {self._hash} {self._rules.tasks}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of both files and of everything that changes the samples made of them."""
        settings = self._rules.settings()
        return hashlib.sha256(f"vist {self._hash} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        usable = [story for story in self._stories if isinstance(story, Story)]
        others = sum(len(story.steps) != STEPS for story in usable)
        bad = self.rows - len(usable)
        notes = f"; {others:,} with more or fewer than {STEPS} steps" if others else ""
        notes += f"; {bad:,} unusable" if bad else ""
        tasks = ", ".join(self._rules.tasks)
        return f"VIST ({tasks}): {len(self):,} samples of {self.rows:,} stories in {self.path}{notes}"


def published(value: dict) -> bool:
    """Whether an object of stories has the form that VIST was published in."""
    return isinstance(value.get("annotations"), list)


def from_published(
    path: Path, value: dict, paths: dict[str, str] | None, root: Path
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """(stories, image paths) of VIST's own file, in the form of the original's two files.

    Args:
      paths: image id -> path; None to look for ``{photo_flickr_id}.*`` in the folder ``root``.

    Raises:
      DataError: an annotation of another form.
    """
    steps: dict[str, list[tuple[int, dict]]] = {}
    for number, item in enumerate(value["annotations"]):
        fields = Fields(f"{path}: annotations[{number}]")
        for part in item if isinstance(item, list) else [item]:
            names = ("story_id", "photo_flickr_id", "text", "worker_arranged_photo_order")
            part = fields.object(part, "", names, optional=None)
            order = fields.integer(part[names[3]], names[3])
            step = {
                "caption": part["text"],
                "image_id": str(part["photo_flickr_id"]),
                "sequence_index": order,
            }
            steps.setdefault(str(part["story_id"]), []).append((order, step))
    stories = {
        name: [step for _, step in sorted(found, key=lambda one: one[0])] for name, found in steps.items()
    }
    if paths is None:
        files = {Path(name).stem: name for name in sorted(os.listdir(root))}
        ids = (step["image_id"] for found in stories.values() for step in found)
        paths = {name: files.get(name, f"{name}.jpg") for name in ids}
    return stories, paths


def mapping_path(cleaned: Path) -> Path:
    """File of the image paths of a file of stories (Q29); DataError where its name does not say."""
    if "cleaned" not in cleaned.name:
        raise DataError(
            f"{cleaned.name} has no 'cleaned' in its name to find its image paths by; give mapping="
        )
    return cleaned.with_name(cleaned.name.replace("cleaned", "image_mapping"))


def _read_object(path: Path, what: str) -> tuple[dict, str]:
    """The object a JSON file holds, and the hash of the file."""
    if not path.is_file():
        raise DataError(not_found(f"file of {what}", path))
    data = path.read_bytes()
    check_utf8(data, path)
    try:
        value = json.loads(data.removeprefix(BOM), object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, nested without end
        raise DataError(f"{path} is no valid JSON ({error}); is the file cut off?") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected one object of {what}, found {type(value).__name__}")
    return value, hashlib.sha256(data).hexdigest()


def parse_story(path: Path, name: str, value: Any, paths: dict, root: ImageFolder) -> Story | SampleError:
    """A story of the file, or what is wrong with it."""
    where = f"{path}: story {name.encode(errors='backslashreplace').decode()}"  # fit for any log
    fields = Fields(where)
    try:
        fields.string(name, "id")
        steps = tuple(_step(fields, step, n, paths, root) for n, step in enumerate(fields.items(value, "")))
        if not steps:
            raise fields.fail("", "no steps")
        for before, after in itertools.pairwise(steps):
            if after.sequence_index <= before.sequence_index:
                numbers = [step.sequence_index for step in steps]
                raise fields.fail("sequence_index", f"must rise from step to step, found {numbers}")
    except SampleError as error:
        return error
    return Story(name, steps, where)


def _step(fields: Fields, value: Any, number: int, paths: dict, root: ImageFolder) -> Step:
    place = f"step {number}"
    value = fields.object(value, place, ("caption", "image_id", "sequence_index"), optional=None)
    image_id = fields.string(value["image_id"], f"{place}.image_id")
    if image_id not in paths:
        raise fields.fail(f"{place}.image_id", f"image {image_id} is not in the mapping")
    fields.words(value["caption"], f"{place}.caption")
    return Step(
        value["caption"],  # as it is written, white space included
        root.path(fields.path(paths[image_id], f"{place}, path of image {image_id}"), fields.where),
        fields.integer(value["sequence_index"], f"{place}.sequence_index"),
    )
