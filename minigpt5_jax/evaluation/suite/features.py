"""Features of images and texts, computed once and kept: by weights, preprocessing and content."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource, load_image, prepare_image, resize_shorter
from minigpt5_jax.evaluation.metrics.networks import (
    INCEPTION_FILES,
    ClipNetwork,
    InceptionNetwork,
    SentenceNetwork,
    file_in,
)
from minigpt5_jax.evaluation.suite.progress import Progress, Report
from minigpt5_jax.evaluation.suite.protocols import Switches

PUBLISHED = {
    "inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid (or the same file of torch-fidelity)",
    "clip_l14": "the folder of openai/clip-vit-large-patch14",
    "clip_b32": "the folder of openai/clip-vit-base-patch32",
    "clip_l14_336": "the folder of openai/clip-vit-large-patch14-336",
    "sbert": "the folder of sentence-transformers/all-MiniLM-L6-v2",
    "wordnet": "the folder of WordNet 3 for synonyms of METEOR (nltk's wordnet.zip, unpacked)",
}
"""What ``--weights NAME=PATH`` takes."""
INCEPTION_SHA = "6726825d"
"""First digits of the sha256 of FID's network, which its file's name ends in."""
CHUNK = 256
"""Images that are in memory at once."""
TARGET_SIDE = 512
"""Side of targets in the papers' test, whatever the images are."""


class Skipped(Exception):
    """A metric cannot be computed; the message says why, and what would help."""


def weights_hash(path: str | Path) -> str:
    """sha256 of a file, or of all weight, JSON and WordNet files of a folder."""
    path, digest = Path(path), hashlib.sha256()
    ends = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".noun", ".verb", ".adj", ".adv", ".exc")
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in ends):
        with file.open("rb") as content:
            if path.is_file():
                return hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Cache:
    """Rows of features by the hash of what they are of, in one file for one network and preprocessing.

    Args:
      folder: of such files.  network, weights, preprocessing: what made the rows; the hash of the weights is
        in the name of the file and in it.

    Raises:
      DataError: the file is damaged, or holds features of other weights than its name says.
    """

    def __init__(self, folder: Path, network: str, weights: str, preprocessing: str):
        self.path = folder / f"{network}-{weights[:12]}-{preprocessing}.npz"
        self._made_by = f"{weights} {preprocessing}"
        self._rows: dict[str, np.ndarray] = {}
        if self.path.is_file():
            try:
                with np.load(self.path, allow_pickle=False) as kept:
                    made_by, keys, rows = str(kept["made_by"]), kept["keys"], kept["rows"]
            except Exception as error:  # whatever zip and numpy make of damaged bytes
                raise DataError(f"{self.path} is damaged ({error}); delete it") from None
            if made_by != self._made_by:
                raise DataError(
                    f"{self.path} holds features of other weights ({made_by[:12]}... instead of "
                    f"{weights[:12]}...); delete it"
                )
            self._rows = dict(zip(keys.tolist(), rows))

    def rows(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Float[np.ndarray, "n d"]],
        progress: Progress,
    ) -> Float[np.ndarray, "n d"]:
        """A row for each key; those that are not kept are computed by their places, and kept."""
        missing = list({key: place for place, key in enumerate(keys) if key not in self._rows}.values())
        progress.start(len(missing))
        unsaved = 0
        for start in range(0, len(missing), CHUNK):
            places = missing[start : start + CHUNK]
            self._rows.update(zip((keys[place] for place in places), compute(places), strict=True))
            unsaved += len(places)
            if 4 * unsaved >= len(self._rows) or start + CHUNK >= len(missing):  # the whole file is written
                self._save()
                unsaved = 0
            progress.done(len(places))
        return np.stack([self._rows[key] for key in keys])

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                made_by=self._made_by,
                keys=np.array(list(self._rows)),
                rows=np.stack(list(self._rows.values())),
            )
        partial.replace(self.path)


class Features:
    """Features by the networks whose weights are given.

    Args:
      weights: name in :data:`PUBLISHED` -> path.
      folder: of the cache.
      switches: of the protocol.
      report: is told about progress.

    Attributes:
      notes: what to say beside scores, by network.

    Raises:
      ConfigError: an unknown name.  FileNotFoundError: a path where nothing is.
    """

    def __init__(self, weights: Mapping[str, str], folder: Path, switches: Switches, report: Report):
        if unknown := sorted(weights.keys() - PUBLISHED.keys()):
            raise ConfigError(f"unknown weights {', '.join(unknown)}; known: {', '.join(PUBLISHED)}")
        for name, path in weights.items():
            if not Path(path).exists():
                raise FileNotFoundError(f"--weights {name}={path}: nothing is there; give {PUBLISHED[name]}")
        self.weights, self.switches = dict(weights), switches
        self.notes: dict[str, list[str]] = {}
        self._folder, self._report = folder, report
        self._networks: dict[str, Any] = {}
        self._caches: dict[tuple[str, str], Cache] = {}
        self._hashes: dict[str, str] = {}

    def require(self, name: str) -> str:
        """Path of weights.

        Raises:
          Skipped: they are not given.
        """
        if name not in self.weights:
            raise Skipped(f"no weights: give --weights {name}=PATH, {PUBLISHED[name]}")
        return self.weights[name]

    def hash(self, name: str) -> str:
        """Of the weights of a network, sha256."""
        if name not in self._hashes:
            path = self.require(name)
            names = INCEPTION_FILES if name == "inception" else ()
            self._hashes[name] = weights_hash(file_in(path, *names))
        return self._hashes[name]

    @property
    def used(self) -> dict[str, str]:
        """Hash of all weights that were read."""
        return dict(self._hashes)

    @property
    def published_inception(self) -> bool:
        """Whether the given Inception file is that of FID.

        Raises:
          Skipped: none is given.
          ConfigError: it is another one, and the switch does not allow that.
        """
        same = self.hash("inception").startswith(INCEPTION_SHA)
        if not same and self.switches.inception_weights == "published":
            raise ConfigError(
                f"--weights inception={self.weights['inception']} is not the network of FID: its "
                f"sha256 begins with {self.hash('inception')[:8]}, the published one with {INCEPTION_SHA}; "
                f"give {PUBLISHED['inception']}, or choose --switch inception_weights=other, whose scores "
                "have names of their own"
            )
        return same

    # -- images ---------------------------------------------------------------------------------

    def inception(self, images: Sequence[Path], resize: str, target: str) -> Float[np.ndarray, "n 3056"]:
        """pool3 (2048) and logits (1008) of images.

        Args:
          resize: shorter side before the network's own resize, or ``none``.
          target: ``stored`` or ``white_square``.
        """
        _ = self.published_inception

        def compute(places: list[int]) -> np.ndarray:
            pixels = [np.asarray(_opened(images[i], target, resize)) for i in places]
            return np.concatenate(self._network("inception")(pixels), axis=1)

        how = f"{self.switches.inception_resize}-{target}-{resize}"
        return self._rows("inception", how, [_file_hash(path) for path in images], compute)

    def clip_images(self, name: str, images: Sequence[Path], target: str = "stored") -> np.ndarray:
        """CLIP's features f32[n d] of images, of unit length."""

        def compute(places: list[int]) -> np.ndarray:
            return self._network(name).images([_opened(images[i], target, "none") for i in places])

        how = f"{self.switches.clip_activation}-{target}"
        return self._rows(name, how, [_file_hash(path) for path in images], compute)

    # -- texts ----------------------------------------------------------------------------------

    def clip_texts(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """CLIP's features f32[n d] of texts, of unit length; the number of cut ones goes to ``notes``."""
        cut = int(self._network(name).tokens(list(texts))[2].sum()) if texts else 0
        if cut:
            self.notes.setdefault(name, []).append(
                f"{cut} of {len(texts)} texts had over 77 tokens and were cut"
            )

        def compute(places: list[int]) -> np.ndarray:
            return self._network(name).texts([texts[i] for i in places]).features

        how = f"{self.switches.clip_activation}-text-{self.switches.clip_tokenizer}"
        return self._rows(name, how, [_text_hash(text) for text in texts], compute)

    def sentences(self, texts: Sequence[str]) -> np.ndarray:
        """S-BERT's features f32[n d] of texts, of unit length."""
        compute = lambda places: self._network("sbert")([texts[i] for i in places])  # noqa: E731
        return self._rows("sbert", "text", [_text_hash(text) for text in texts], compute)

    # -- both -----------------------------------------------------------------------------------

    def _network(self, name: str) -> Any:
        if name not in self._networks:
            path, switches = self.require(name), self.switches
            self._report(f"reading the weights of {name}")
            if name == "inception":
                self._networks[name] = InceptionNetwork(path, switches.inception_resize)
            elif name == "sbert":
                self._networks[name] = SentenceNetwork(path)
            else:
                self._networks[name] = ClipNetwork(
                    path, clean_up=switches.clip_tokenizer, hidden_act=switches.clip_activation
                )
        return self._networks[name]

    def _rows(self, name: str, how: str, keys: Sequence[str], compute: Callable) -> np.ndarray:
        if not keys:
            raise Skipped("there is nothing to compare")
        if (name, how) not in self._caches:
            self._caches[name, how] = Cache(self._folder, name, self.hash(name), how)
        progress = Progress(f"features by {name} ({how})", self._report, time.monotonic)
        return self._caches[name, how].rows(keys, compute, progress)


def content_hash(image: ImageSource) -> str:
    """sha256 of an image as it is stored.

    Raises:
      SampleError: its file cannot be read.
    """
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else _file_hash(Path(image))


def _file_hash(path: Path) -> str:
    try:
        status = path.stat()
        return _hash_of(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise SampleError(str(path), f"image cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=2**17)
def _hash_of(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _opened(path: Path, target: str, resize: str) -> Image.Image:
    """An image in RGB, as a protocol reads it."""
    if target == "white_square":
        image = Image.fromarray(prepare_image(path, TARGET_SIDE, square=True, flip=False))
    else:
        image = load_image(path)
    return image if resize == "none" else resize_shorter(image, int(resize))
