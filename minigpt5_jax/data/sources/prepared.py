"""Data sets written by ``python -m minigpt5_jax.prepare``, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.example import Example
from minigpt5_jax.data.pairs import Pair, PairRules
from minigpt5_jax.data.sources.base import TextLines

METADATA, UNITS_FILE, VERSION = "minigpt5", "units.jsonl", "1.0.0"

Fields = dict[str, Any]


@runtime_checkable
class Kind(Protocol):
    """How the records of a data set become samples.

    ``counts(source)`` gives the samples of each record, ``example`` and ``texts`` sample ``place`` of one,
    and ``settings`` everything they depend on.
    """

    def counts(self, source: PreparedSource) -> Int[np.ndarray, " n"]: ...

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example: ...

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]: ...

    def settings(self) -> tuple: ...


class PairKind:
    """CC3M: a pair, and its instruction sample for rows 0, 100, 200, ... of the raw table."""

    def __init__(self, rules: PairRules):
        self._rules = rules

    def counts(self, source: PreparedSource) -> Int[np.ndarray, " n"]:
        rows = source.kept_units()
        return 1 + (rows % self._rules.every == 0) if self._rules.every else np.ones_like(rows)

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example:
        return self._rules.example(self._pair(fields, pictures[0]), place == 1, epoch)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return self._rules.texts(self._pair(fields, ""), place == 1)

    def settings(self) -> tuple:
        return dataclasses.astuple(self._rules)

    def _pair(self, fields: Fields, picture: str | bytes) -> Pair:
        return Pair(fields["row"], fields["caption"], picture, fields["where"])


class PreparedSource:
    """Samples of a prepared data set: the same, picture for picture, as those of its raw files.

    Words come from the units' file, pictures from the ArrayRecord files, which are opened when first
    asked for; so the source is small to send to a worker process, and no picture is read for a text.

    Args:
      folder: the ``--output`` of the preparation, or a folder below it.
      split: ``train``, ``validation`` or ``test``.
      training: with the samples that only training has.
      instruction_every: CC3M's rows from one instruction sample to the next; 0 for none.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      seed: of the wording.
      resample_prompts: draw the wording anew each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one picture.

    Raises:
      DataError: there is no finished data set, it lacks files, or a setting is unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        training: bool = True,
        instruction_every: int = 100,
        prompt_set: str = "head",
        seed: int = 0,
        resample_prompts: bool = True,
        num_vokens: int = 8,
    ):
        self.folder, self.split = find_prepared(folder, split), split
        self.metadata = json.loads((self.folder / "metadata.json").read_bytes())[METADATA]
        self._lines = TextLines(self.folder / UNITS_FILE)
        self._check_shards()
        self._training = training
        every = instruction_every if training else 0
        self._kind: Kind = PairKind(PairRules(every, prompt_set, seed, resample_prompts, num_vokens))
        self._starts = np.concatenate([[0], np.cumsum(self._kind.counts(self))])
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

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def _find(self, index: int) -> tuple[int, int]:
        """Record of a sample, and which of the record's samples it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = int(np.searchsorted(self._starts, index, side="right")) - 1
        return record, index - int(self._starts[record])

    def fields(self, record: int) -> Fields:
        """What a record says besides the pictures."""
        return json.loads(self._lines[record])

    def pictures(self, record: int) -> list[bytes]:
        """Encoded pictures of a record; those of the last one asked for are kept, as its samples follow
        each other."""
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
        try:
            example = tf_example_pb2.Example.FromString(self._records[record])
        except Exception as error:  # whatever the C++ reader makes of broken bytes
            where = f"{self.folder}: record {record}"
            raise SampleError(where, f"cannot be read ({error})") from None
        return list(example.features.feature["image"].bytes_list.value)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``, its pictures as encoded bytes; SampleError where the record is broken."""
        record, place = self._find(index)
        return self._kind.example(self.fields(record), self.pictures(record), place, epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording it may have; no picture is read."""
        record, place = self._find(index)
        return self._kind.texts(self.fields(record), place)

    def fingerprint(self) -> str:
        """Hash of the words, of the sizes of the pictures and of everything that changes the samples."""
        content = (self._lines.sha256, self.metadata["letterbox"], self.metadata["tally"]["bytes"])
        text = f"prepared {self.dataset} {content} {self._kind.settings()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._training else "test"
        return (
            f"prepared {self.dataset} {kind}: {len(self):,} samples of {len(self._lines):,} records "
            f"in {self.folder}"
        )


def find_prepared(folder: str | Path, split: str) -> Path:
    """Folder of a finished split below ``folder``.

    Raises:
      DataError: there is none, more than one, or its preparation was interrupted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"prepared data set not found: {folder}")
    patterns = (VERSION, f"{split}/{VERSION}", f"*/{split}/{VERSION}")
    places = [folder, *(path for pattern in patterns for path in folder.glob(pattern))]
    found = sorted(path for path in places if (path / UNITS_FILE).is_file())
    if len(found) == 1:
        stored = json.loads((found[0] / "metadata.json").read_bytes())[METADATA]["split"]
        if stored != split:
            raise DataError(f"{found[0]} holds split {stored!r}, asked for {split!r}")
        return found[0]
    if found:
        raise DataError(f"{folder} holds several data sets ({', '.join(map(str, found))}); name one")
    if any(folder.glob(f"**/{split}/parts/plan.json")):
        raise DataError(
            f"the preparation of {split!r} in {folder} was interrupted; give the same command again, it "
            "continues"
        )
    raise DataError(f"{folder} holds no prepared split {split!r}; python -m minigpt5_jax.prepare makes one")
