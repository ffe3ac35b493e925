"""Data sets written by ``python -m minigpt5_jax.prepare``, read without TensorFlow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import TextLines
from minigpt5_jax.data.paths import not_found
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.stories import Story, StoryRules
from minigpt5_jax.data.sources.base import Source, check_index
from minigpt5_jax.data.sources.kinds import KINDS, Fields, Rules, StoryKind, make_rules

METADATA, UNITS_FILE, VERSION = "minigpt5", "units.jsonl", "1.0.0"


class PreparedSource(Source):
    """Samples of a prepared data set: the same, image for image, as those of its raw files.

    Words come from the units' file, images from the ArrayRecord files, which are opened when first
    asked for; so the source is small to send to a worker process, and no image is read for a text.

    Args:
      folder: the ``--output`` of the preparation, or a folder below it.
      split: ``train``, ``validation`` or ``test``; None where the folder holds just one.
      rules: name of the data set -> how its records become samples.
      count_tokens: dialogues: length of a text in tokens; needed in training with ``head``, and not kept.

    Raises:
      DataError: there is no finished data set, it lacks files, or as ``rules``.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        rules: Callable[[str], Rules] = make_rules,
        *,
        count_tokens: Callable[[str], int] | None = None,
    ):
        self.folder = find_prepared(folder, split)
        self.metadata = _metadata(self.folder)
        self.split = self.metadata["split"]
        self._lines = TextLines(self.folder / UNITS_FILE)
        self._check_shards()
        self._kind = KINDS[self.dataset](rules(self.dataset))
        self.ends_in_vokens = isinstance(self._kind.rules, PairRules)
        lines = (self._lines[number] for number in range(len(self._lines)))
        counts = self._kind.counts(lines, self.kept_units(), count_tokens)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._records = None
        self._last: tuple[int, list[bytes]] = (-1, [])

    def _check_shards(self) -> None:
        """DataError where files of records are missing or do not fit the units' file."""
        info = json.loads((self.folder / "dataset_info.json").read_bytes())
        split = next(part for part in info["splits"] if part["name"] == self.split)
        lengths = [int(length) for length in split["shardLengths"]]
        names = [
            f"{info['name']}-{self.split}.array_record-{i:05d}-of-{len(lengths):05d}"
            for i in range(len(lengths))
        ]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing or sum(lengths) != len(self._lines):
            what = f"lacks {missing[0]}" if missing else "holds another number of records than units"
            raise DataError(f"{self.folder} {what}; copy it again or prepare it again")

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.metadata["dataset"]

    def kept_units(self) -> Int[np.ndarray, " n"]:
        """Number in the raw files of each record."""
        skipped = [unit for unit, _, _ in self.metadata["tally"]["skipped"]]
        return np.setdiff1d(np.arange(self.metadata["count"]), np.asarray(skipped, np.int64))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None, "_last": (-1, [])}  # open files stay in their process

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, index: int) -> tuple[int, int]:
        """Record of a sample, and which of the record's samples it is."""
        check_index(index, self)
        record = int(np.searchsorted(self._starts, index, side="right")) - 1
        return record, index - int(self._starts[record])

    def fields(self, record: int) -> Fields:
        """What a record says besides the images."""
        return json.loads(self._lines[record])

    def images(self, record: int) -> list[bytes]:
        """Encoded images of a record; the last one's are kept, as its samples follow each other."""
        if self._last[0] != record:
            self._last = (record, self._read(record))
        return self._last[1]

    def _read(self, record: int) -> list[bytes]:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        if self._records is None:
            builder = tfds.builder_from_directory(self.folder)
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._records = builder.as_data_source(self.split, deserialize_method=raw)
        where = f"{self.folder}: record {record}"
        try:
            features = tf_example_pb2.Example.FromString(self._records[record]).features.feature
        except Exception as error:  # whatever the C++ reader makes of broken bytes
            raise SampleError(where, f"cannot be read ({error}); copy or prepare the data again") from None
        if "image" not in features:
            raise SampleError(where, "cannot be read (it is empty); copy or prepare the data again")
        return list(features["image"].bytes_list.value)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``, its images as encoded bytes; SampleError where the record is broken."""
        record, place = self.find(index)
        return self._kind.example(self.fields(record), self.images(record), place, epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording, its context whole; no image is read."""
        record, place = self.find(index)
        return self._kind.texts(self.fields(record), place)

    @property
    def rows(self) -> int:
        """Records of the data set."""
        return len(self._lines)

    def story(self, row: int) -> Story:
        """A story with its images as encoded bytes; of a data set of stories.

        Raises:
          DataError: the records are no stories.  SampleError: the record is broken.
        """
        if not isinstance(self._kind, StoryKind):
            raise DataError(f"{self.folder} holds {self.dataset}, and no stories")
        return self._kind.story(self.fields(row), self.images(row))

    def stories(self) -> Int64[np.ndarray, " n1"] | None:
        """As :meth:`OfStories.stories`."""
        return self._starts if isinstance(self._kind.rules, StoryRules) else None

    def fingerprint(self) -> str:
        """Hash of the words, of the images' size and of everything that changes the samples."""
        return self._hash(self._kind.rules.settings())

    def image_fingerprint(self) -> str:
        """Hash of which images each sample has, whatever its wording."""
        return self._hash(self._kind.layout())

    def _hash(self, settings: tuple) -> str:
        content = (self._lines.sha256, self.metadata["letterbox"], self.metadata["tally"]["bytes"])
        return hashlib.sha256(f"prepared {self.dataset} {content} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._kind.rules.training else "test"
        notes = ", ".join(f"{count:,} {what}" for what, count in sorted(self._kind.left_out.items()))
        return (
            f"prepared {self.dataset}, {self.split} as {kind}: {len(self):,} samples of "
            f"{len(self._lines):,} records in {self.folder}{'; left out: ' * bool(notes)}{notes}"
        )


def find_prepared(folder: str | Path, split: str | None = None) -> Path:
    """Folder of a finished split at or below ``folder``; any split where None.

    Raises:
      DataError: there is none, more than one, or its preparation was interrupted.
    """
    folder, wanted = Path(folder), split or "*"
    if not folder.is_dir():
        raise DataError(not_found("prepared data set", folder))
    places = [folder, *(path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + VERSION))]
    found = {path: _metadata(path)["split"] for path in sorted(places) if (path / UNITS_FILE).is_file()}
    fitting = [path for path, name in found.items() if split in (None, name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(f"{folder} holds several data sets ({', '.join(map(str, fitting))}); name one")
    if any(any(folder.glob(f"{depth}parts/plan.json")) for depth in ("", f"{wanted}/", f"*/{wanted}/")):
        raise DataError(
            f"the preparation of {split or 'a split'} in {folder} was interrupted; give the same command "
            "again, it continues"
        )
    others = f" (but {', '.join(sorted(set(found.values())))})" if found else ""
    raise DataError(
        f"{folder} holds no prepared split {wanted}{others}; python -m minigpt5_jax.prepare makes one"
    )


def current_tally(tally: dict[str, Any]) -> dict[str, Any]:
    """What a preparation counted, under today's names: earlier versions wrote ``pictures`` for images."""
    return {"images" if name == "pictures" else name: value for name, value in tally.items()}


def _metadata(folder: Path) -> dict:
    """What the preparation wrote about itself."""
    try:
        made = json.loads((folder / "metadata.json").read_bytes())[METADATA]
        return {**made, "tally": current_tally(made["tally"])}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / 'metadata.json'} is broken ({error!r}); prepare the data again") from None
