"""The TFDS builders.  The one module that imports TFDS at its top, so it is itself imported late.

They are shard based: TFDS asks for the records of each shard on its own, in order, and with a Beam runner
each shard becomes an element of the pipeline.  So one code path, and one result, serves one process and a
cluster; nothing passes through TFDS's shuffling, which would hold the data set on disk twice and could
not be continued.  Order while training is the pipeline's matter.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from minigpt5_jax.data.prepare.builders.shards import Job, ShardWork, Tally, check_budget, link_or_copy
from minigpt5_jax.data.sources.prepared import METADATA, UNITS_FILE

TEXT, NUMBER = tfds.features.Text(), tfds.features.Scalar(dtype=np.int64)


class PartsWriter(tfds.core.writer.ExampleWriter):
    """Writes a shard as a part that outlives the run, and links it to where TFDS wants it."""

    def __init__(self, file_format: Any, parts: Path):
        super().__init__(file_format=file_format)
        self._parts = parts

    def write(self, path: Any, examples: Iterable[Any]) -> None:
        index = int(re.search(r"-(\d+)-of-\d+$", Path(path).name)[1])
        part = self._parts / f"{index:05d}.array_record"
        if not part.is_file():
            temporary = self._parts / f".{part.name}-{uuid.uuid4().hex}"
            super().write(temporary, ((key, _same_bytes(example)) for key, example in examples))
            temporary.replace(part)
        link_or_copy(part, Path(path))


def _same_bytes(example: bytes) -> bytes:
    """A serialised record with its features in a fixed order, which protobuf else draws in each process."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


class PreparedBuilder(tfds.core.ShardBasedBuilder):
    """A split of a data set, a TFDS configuration of its own: ``OUTPUT/NAME/SPLIT/1.0.0``."""

    VERSION = tfds.core.Version("1.0.0")
    FIELDS: ClassVar[dict[str, Any]]
    DESCRIPTION: ClassVar[str]

    def __init__(self, *, job: Job, progress: Callable[[int], None] | None = None, **kwargs: Any):
        self._job, self._progress = job, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        images = tfds.features.Sequence(tfds.features.Image())
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict({**self.FIELDS, "image": images}),
            metadata=tfds.core.MetadataDict({METADATA: self._job.settings()}),
            disable_shuffling=True,
        )

    def _works(self) -> list[ShardWork]:
        return [self._job.shard(index, self._progress) for index in range(self._job.num_shards)]

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[ShardWork]]:
        return {self._job.split: self._works()}

    def _example_writer(self) -> PartsWriter:
        return PartsWriter(self.info.file_format, self._job.parts)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        tally, lengths, folder = Tally(), [], Path(self.data_dir)
        with (folder / UNITS_FILE).open("w", encoding="utf-8") as units:
            for work in self._works():
                part = Tally.read(work.file("json"))
                lengths.append(part.kept)
                tally.add(part)
                units.write(work.file("jsonl").read_text(encoding="utf-8"))
        check_budget(self._job, len(tally.skipped), tally.skipped)
        self.info.metadata[METADATA]["tally"] = vars(tally)
        # With Beam, TFDS 4.9 puts the lengths of more than ten shards in the order "0", "1", "10", "2".
        split = self.info.splits[self._job.split].replace(shard_lengths=lengths)
        self.info.set_splits(tfds.core.splits.SplitDict([split]))
        for file in folder.glob("*.shard_infos.json"):
            file.unlink()


class Cc3m(PreparedBuilder):
    """Pairs of caption and image."""

    DESCRIPTION = "Pairs of caption and image, the caption as written."
    FIELDS: ClassVar = {"row": NUMBER, "caption": TEXT, "image_path": TEXT}


class Vist(PreparedBuilder):
    """Stories; image k is that of step k."""

    DESCRIPTION = "Stories of texts and images, step by step."
    FIELDS: ClassVar = {
        "id": TEXT,
        "steps": tfds.features.Sequence({"caption": TEXT, "image_path": TEXT, "sequence_index": NUMBER}),
    }


class Mmdialog(PreparedBuilder):
    """Dialogues.

    A turn's ``picture`` (its name on disk since version 1) counts in ``image``, -1 for none, or a lost
    one if it has ``media``: ids with ``/`` between, as TFDS needs TensorFlow to write lists within lists.
    """

    DESCRIPTION = "Dialogues with images, turn by turn, the first turn a human's."
    FIELDS: ClassVar = {
        "id": TEXT,
        "turns": tfds.features.Sequence({"text": TEXT, "media": TEXT, "picture": NUMBER}),
    }


class Jsonl(PreparedBuilder):
    """A line of the user's own JSONL, unchanged, with its images in the order in which it names them."""

    DESCRIPTION = "Pairs, stories and dialogues of one's own, one JSON object each."
    FIELDS: ClassVar = {"name": TEXT, "record": TEXT}


BUILDERS: dict[str, type[PreparedBuilder]] = {
    "cc3m": Cc3m,
    "vist": Vist,
    "mmdialog": Mmdialog,
    "jsonl": Jsonl,
}


def make_builder(job: Job, progress: Callable[[int], None] | None = None) -> PreparedBuilder:
    """The builder of a job."""
    config = tfds.core.BuilderConfig(name=job.split)
    return BUILDERS[job.raw.dataset](
        job=job, progress=progress, data_dir=str(job.output), config=config, file_format="array_record"
    )
