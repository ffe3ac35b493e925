"""Precomputed features: images that went through their frozen towers once, for every later step and run.

A store is a folder that ``prepare features`` makes for one source and one set of towers::

    manifest.json      what was stored, of which images, by which towers (hashes)
    00000.index.npz    rows of the shard's samples, and why a sample has none; written last
    00000.target.npy   posterior moments of target images [rows h w 2c]
    00000.image.npy    Q-Former states of input images [rows q c]

Arrays are memory-mapped when read.  Images are stored once a shard, as pixels in [-1, 1] see them (the
original's script left that step out, quirk Q9) and never mirrored, so ``flip_mode`` is off with them.
:class:`FeatureSource` puts them into the samples of a source.  Fidelity 5.6.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int64

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.example import Example, Ready
from minigpt5_jax.data.sources.base import Source, stories_of

FORMAT = 1
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MANIFEST = "manifest.json"
FORMER_NAME = "pictures"  # of ``image_fingerprint`` in stores of earlier versions


@runtime_checkable
class FixedImages(Protocol):
    """A source that can say which images its samples have apart from how they are worded."""

    def image_fingerprint(self) -> str: ...


def image_fingerprint(source: Source) -> str:
    """Hash of which images each sample has; of everything where a source does not know that apart."""
    return source.image_fingerprint() if isinstance(source, FixedImages) else source.fingerprint()


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What a store holds.

    Attributes:
      image_fingerprint: of the source (:func:`image_fingerprint`).  samples: its length.
      towers: tower -> hash of its weights, for the towers that made the features.
      target: (h, w, 2c) of a target's moments, None where only input images are stored.
      image: (q, c) of an input image's states, None where only targets are stored.
      target_size, image_size: sides of the images in pixels.
      images_as_shown: whether images were turned by EXIF and put on white where transparent.
      pad_input_square: whether input images were padded (quirk Q30).
      dtype: of the stored numbers, ``bfloat16`` or ``float32``.
      pixel_range: what the target's tower saw black and white as (quirk Q9).
      shard_samples: samples of a shard.
    """

    image_fingerprint: str
    samples: int
    towers: dict[str, str]
    target: tuple[int, ...] | None
    image: tuple[int, ...] | None
    target_size: int
    image_size: int
    pad_input_square: bool = False
    images_as_shown: bool = True
    dtype: str = "bfloat16"
    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    shard_samples: int = 2048

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise DataError(f"features are stored as {' or '.join(DTYPES)}, not {self.dtype!r}")
        if self.target is None and self.image is None:
            raise DataError("a feature store holds targets, input images or both")

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Kind of image -> shape of its features."""
        given = {"target": self.target, "image": self.image}
        return {kind: shape for kind, shape in given.items() if shape is not None}

    def differences(self, stored: FeatureSpec) -> list[str]:
        """``name: stored ..., now ...`` for everything in which a stored spec is another one."""
        then, now = dataclasses.asdict(stored), dataclasses.asdict(self)
        return [
            f"{name}: stored {then[name]!r}, now {now[name]!r}" for name in now if then[name] != now[name]
        ]


def index_file(folder: Path, number: int) -> Path:
    """Which samples of a shard have which rows; its presence says that the shard is whole."""
    return folder / f"{number:05d}.index.npz"


def array_file(folder: Path, number: int, kind: str) -> Path:
    """Features of one kind in a shard."""
    return folder / f"{number:05d}.{kind}.npy"


def read_reasons(file: Path) -> dict[int, tuple[str, str]]:
    """Sample -> (where, why) for those of a shard without features."""
    with np.load(file, allow_pickle=False) as index:
        return {int(sample): (where, reason) for sample, where, reason in json.loads(str(index["reasons"]))}


def read_spec(folder: str | Path) -> FeatureSpec:
    """The manifest of a store; DataError where there is none, or of another format."""
    file = Path(folder) / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if content.pop("format") != FORMAT:
            raise DataError(f"{file} is of another version; prepare the features again")
        content = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        content.setdefault("images_as_shown", False)  # before there was a choice
        if FORMER_NAME in content:
            content["image_fingerprint"] = content.pop(FORMER_NAME)
        return FeatureSpec(**content)
    except FileNotFoundError:
        raise DataError(f"no feature store in {folder}: {MANIFEST} is missing") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); prepare the features again") from None


class FeatureStore:
    """Features of a whole source, by sample.

    Args:
      folder: of the store.

    Attributes:
      spec: what it holds.

    Raises:
      DataError: no store, another format, or shards that are not made yet.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.spec = read_spec(folder)
        files = [index_file(self.folder, number) for number in range(self.spec.shards)]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise DataError(
                f"feature store {folder} is not finished: {missing} of {len(files)} shards are missing; give "
                "the command that makes it once more, and it continues"
            )
        self._reasons: dict[int, tuple[str, str]] = {}
        columns: dict[str, list[np.ndarray]] = {"target": [], "image": [], "counts": []}
        for file in files:
            self._reasons |= read_reasons(file)
            with np.load(file, allow_pickle=False) as index:
                for name, parts in columns.items():
                    if name in index:
                        parts.append(index[name])
        self._rows = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
        if "counts" in self._rows:
            self._starts = np.concatenate([[0], np.cumsum(self._rows["counts"])])
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # mapped memory stays in its process

    def check(self, wanted: FeatureSpec) -> None:
        """Whether these are features of the images, sizes and towers of a run.

        Args:
          wanted: what the run would store.  Number format and shards may be others, and a store of targets
            alone leaves the input images to be read as such.

        Raises:
          DataError: they are not, with both fingerprints.
        """
        spec = self.spec
        same = {"dtype", "shard_samples"} | (
            set() if spec.image else {"image", "image_size", "pad_input_square"}
        )
        towers = {name: digest for name, digest in wanted.towers.items() if spec.image or name in spec.towers}
        wanted = dataclasses.replace(wanted, towers=towers, **{name: getattr(spec, name) for name in same})
        if differ := wanted.differences(spec):
            lines = "\n  ".join(differ)
            raise DataError(
                f"feature store {self.folder} does not belong to this run; prepare it again:\n  {lines}"
            )

    def _values(self, kind: str, sample: int, row: int) -> np.ndarray:
        number = sample // self.spec.shard_samples
        if (kind, number) not in self._maps:
            file = array_file(self.folder, number, kind)
            try:
                mapped = np.load(file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{file} cannot be read ({error}); prepare the features again") from None
            self._maps[kind, number] = np.asarray(mapped).view(DTYPES[self.spec.dtype])
        return self._maps[kind, number][row]

    def explain(self, sample: int) -> None:
        """SampleError where a sample's images could not be used when the features were made."""
        if sample in self._reasons:
            raise SampleError(*self._reasons[sample])

    def target(self, sample: int) -> Float[np.ndarray, "h w c2"] | None:
        """Moments of the image a sample draws; None where it draws none."""
        row = int(self._rows["target"][sample])
        return None if row < 0 else self._values("target", sample, row)

    def images(self, sample: int) -> list[Float[np.ndarray, "q c"]]:
        """States of a sample's input images, in their order."""
        start, stop = self._starts[sample : sample + 2].tolist()
        return [self._values("image", sample, int(row)) for row in self._rows["image"][start:stop]]


class FeatureSource(Source):
    """The samples of a source with precomputed features in the place of images.

    Args:
      source: the samples.
      store: their features; :meth:`FeatureStore.check` has been asked.
    """

    def __init__(self, source: Source, store: FeatureStore):
        self._source, self._store = source, store
        self.ends_in_vokens = source.ends_in_vokens

    def __len__(self) -> int:
        return len(self._source)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError as the source's, or where its images were unusable."""
        self._store.explain(index)
        example, shapes = self._source.example(index, epoch), self._store.spec.shapes()
        changes: dict[str, Any] = {}
        if "target" in shapes and (moments := self._store.target(index)) is not None:
            changes["target_image"] = Ready(moments)
        if "image" in shapes:
            changes["images"] = tuple(map(Ready, self._store.images(index)))
        return dataclasses.replace(example, **changes)

    @property
    def features(self) -> FeatureSpec:
        """What the features are."""
        return self._store.spec

    def texts(self, index: int) -> list[tuple[str, str]]:
        """As the source's."""
        return self._source.texts(index)

    def stories(self) -> Int64[np.ndarray, " n1"] | None:
        """As the source's."""
        return stories_of(self._source)

    def fingerprint(self) -> str:
        """Hash of the source's fingerprint and of what the store holds."""
        spec = dataclasses.asdict(self._store.spec)
        spec[FORMER_NAME] = spec.pop("image_fingerprint")  # so that runs of earlier versions can resume
        if not spec["images_as_shown"]:
            del spec["images_as_shown"]
        stored = json.dumps(spec, sort_keys=True)
        return hashlib.sha256(f"features {self._source.fingerprint()} {stored}".encode()).hexdigest()

    def describe(self) -> str:
        kinds = " and ".join(
            f"{kind} {'x'.join(map(str, s))}" for kind, s in self._store.spec.shapes().items()
        )
        return f"{self._source.describe()}, with precomputed features ({kinds}) of {self._store.folder}"
