"""What one record holds: a pair, a story or a dialogue as the raw files spell it, and its images."""

from __future__ import annotations

import abc
import dataclasses
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource, image_name, load_image, pad_square, read_image
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import Cc3mSource, Cc3mTarSource, JsonlSource, MMDialogSource, VistSource

JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of a data set.

    Attributes:
      fields: what its record says besides the images, as plain JSON values.
      images: paths or encoded bytes, in the order its fields count them.
      where: place in the raw files (``train.tsv:18``).
      whole: whether the unit is unusable without one of its images.  A dialogue is not: it ends there.
    """

    fields: dict[str, Any]
    images: tuple[ImageSource, ...]
    where: str
    whole: bool = True


class Units(abc.ABC):
    """Raw files as units, the unusable ones among them: ``units[i]`` raises SampleError for these.

    Args:
      source: reads the files.

    Attributes:
      fingerprint: hash of the files.
    """

    def __init__(self, source: Any, fingerprint: str):
        self._source, self.fingerprint = source, fingerprint

    def __len__(self) -> int:
        return self._source.rows

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Unit: ...


@dataclasses.dataclass(frozen=True)
class Raw:
    """The raw files of a data set: what to open, small enough to send anywhere.

    Attributes:
      dataset: one of :data:`UNITS`.
      path: the annotations; for ``cc3m`` a table, or tar shards (a folder, a pattern or one file).
      image_root: folder that image paths are relative to; None for the annotations' own.
      mapping: VIST's image paths; None for the file beside the stories.
      allow_outside_images: whether image paths may lead out of their folder.
    """

    dataset: str
    path: str
    image_root: str | None = None
    mapping: str | None = None
    allow_outside_images: bool = False

    def open(self) -> Units:
        """Its units, opened once in each process unless a file changes.

        Raises:
          DataError: an unknown data set, or as its source.
        """
        if self.dataset not in UNITS:
            raise DataError(f"unknown data set {self.dataset!r}; known: {', '.join(UNITS)}")
        if self.mapping is not None and self.dataset != "vist":
            raise DataError(f"{self.dataset} has no mapping of image paths")
        paths = [path for path in (self.path, self.mapping) if path and os.path.exists(path)]
        return _open(self, tuple((os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths))

    def root(self) -> Path:
        """Folder that image paths are relative to."""
        return Path(self.path).parent if self.image_root is None else Path(self.image_root)

    def place(self, where: str) -> str:
        """A place without the folder of the files, which may lie elsewhere tomorrow."""
        folder = Path(self.path) if os.path.isdir(self.path) else Path(self.path).parent
        return where.removeprefix(f"{folder}{os.sep}")

    def name(self, image: ImageSource) -> str:
        """Path of an image as the files give it; nothing for one in a tar shard."""
        return "" if isinstance(image, bytes) else os.path.relpath(image, self.root())


@functools.lru_cache(maxsize=1)
def _open(raw: Raw, stamps: tuple[tuple[int, int], ...]) -> Units:
    return UNITS[raw.dataset](raw)


class Cc3mUnits(Units):
    """Rows of a table, or samples of tar shards."""

    def __init__(self, raw: Raw):
        self._raw = raw
        if Path(raw.path).is_dir() or "*" in raw.path or raw.path.endswith(".tar"):
            source = Cc3mTarSource(raw.path, PairRules(training=False))
        else:
            source = Cc3mSource(
                raw.path,
                raw.image_root,
                PairRules(training=False),
                allow_outside_images=raw.allow_outside_images,
            )
        super().__init__(source, source.fingerprint())

    def __getitem__(self, index: int) -> Unit:
        pair = self._source.pair(index)
        self._source.texts(index)  # refuses an empty caption
        name = self._raw.name(pair.image)
        fields = {"row": pair.row, "caption": pair.caption, "image_path": name}
        return Unit(fields, (pair.image,), pair.where)


class VistUnits(Units):
    """Stories."""

    def __init__(self, raw: Raw):
        self._raw = raw
        source = VistSource(
            raw.path,
            raw.mapping,
            raw.image_root,
            StoryRules(training=False),
            allow_outside_images=raw.allow_outside_images,
        )
        super().__init__(source, source.fingerprint())

    def __getitem__(self, index: int) -> Unit:
        story = self._source.story(index)
        steps = [
            {
                "caption": step.text,
                "image_path": self._raw.name(step.image),
                "sequence_index": step.sequence_index,
            }
            for step in story.steps
        ]
        fields = {"id": story.id, "steps": steps}
        return Unit(fields, tuple(step.image for step in story.steps), story.where)


class MMDialogUnits(Units):
    """Dialogues with all their turns; which of them are used is decided when they are read."""

    def __init__(self, raw: Raw):
        source = MMDialogSource(raw.path, raw.image_root, DialogRules("release", training=False))
        super().__init__(source, source.lines.sha256)

    def __getitem__(self, index: int) -> Unit:
        dialog = self._source.dialog(index)
        images, turns = [], []
        for turn in dialog.turns:
            turns.append({"text": turn.text, "media": "/".join(turn.media), "picture": -1})
            if turn.image is not None:
                turns[-1]["picture"] = len(images)
                images.append(turn.image)
        return Unit({"id": dialog.id, "turns": turns}, tuple(images), dialog.where, whole=False)


class JsonlUnits(Units):
    """Lines of the user's own JSONL."""

    def __init__(self, raw: Raw):
        self._root = raw.root()
        source = JsonlSource(raw.path, raw.image_root, allow_outside_images=raw.allow_outside_images)
        super().__init__(source, source.fingerprint())

    def __getitem__(self, index: int) -> Unit:
        record, lines = self._source.record(index), self._source.lines
        images = tuple(str(self._root / image.path) for turn in record.turns for image in turn.images())
        return Unit({"name": self._source.name(index), "record": lines[index]}, images, lines.where(index))


UNITS: Mapping[str, type[Units]] = {
    "cc3m": Cc3mUnits,
    "vist": VistUnits,
    "mmdialog": MMDialogUnits,
    "jsonl": JsonlUnits,
}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An image as it is stored: encoded bytes, width and height in pixels."""

    data: bytes
    width: int
    height: int


def encode_image(source: ImageSource, letterbox: int | None = None) -> Encoded:
    """Bytes of an image as they are, decoded once to see that they can be.

    Args:
      letterbox: side of a white square that the image is fitted into, kept whole (fidelity 5.5); a
        image that has that size already keeps its bytes, another is stored as JPEG.

    Raises:
      SampleError: missing or broken.
    """
    data = read_image(source)
    try:
        image = load_image(data)
    except SampleError as error:
        raise SampleError(image_name(source), error.reason) from None
    if letterbox is None or image.size == (letterbox, letterbox):
        return Encoded(data, *image.size)
    longer = max(image.size)
    width, height = (max(1, round(side * letterbox / longer)) for side in image.size)
    image = pad_square(image.resize((width, height), Image.Resampling.LANCZOS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Encoded(buffer.getvalue(), *image.size)


def keep_images(fields: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A dialogue's fields with images ``kept`` alone; a turn that has lost its own has media and image -1."""
    place = {number: new for new, number in enumerate(kept)}
    turns = [{**turn, "picture": place.get(turn["picture"], -1)} for turn in fields["turns"]]
    return {**fields, "turns": turns}
