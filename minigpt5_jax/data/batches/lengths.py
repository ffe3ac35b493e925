"""How long every sample is: the index that length buckets and packing are planned from.

It is made once from the samples' words (images are not opened), of the longest wording a sample may
have, and kept in a file named by what it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.text.tokenizer import LanguageTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class LengthIndex:
    """Sizes of the n samples of a source, before anything is cut.

    Attributes:
      lengths: i32[n] positions, BOS and the slots of images included; 0 for a sample that cannot be read.
      images: i32[n] input images.
    """

    lengths: Int32[np.ndarray, " n"]
    images: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.lengths)


def measure(source: Source, tokenizer: LanguageTokenizer, image_tokens: int) -> LengthIndex:
    """Tokenises every text a sample may have and keeps the longest.

    Args:
      image_tokens: positions of an input image.
    """
    lengths, images = np.zeros((2, len(source)), np.int32)
    for index in tqdm(range(len(source)), desc="measuring samples", delay=2, unit="sample"):
        try:
            texts = source.texts(index)
        except SampleError:
            continue  # found again, named and counted when the sample is read
        lengths[index], images[index] = longest(texts, tokenizer, image_tokens)
    return LengthIndex(lengths, images)


def longest(
    texts: Iterable[tuple[str, str]], tokenizer: LanguageTokenizer, image_tokens: int
) -> tuple[int, int]:
    """Positions and input images of the longest of a sample's (source, target) wordings."""
    length = images = 0
    for words, answer in texts:
        ids = tokenizer.encode(words)
        count = ids.count(tokenizer.image_id)
        size = 1 + len(ids) + count * (image_tokens - 1) + len(tokenizer.encode(answer))
        length, images = max(length, size), max(images, count)
    return length, images


def length_index(
    source: Source, tokenizer: LanguageTokenizer, image_tokens: int, folder: str | Path
) -> LengthIndex:
    """The index of a source, from its file in ``folder`` or made and left there.

    Several processes may make it at once: each writes its own file and moves it into place whole.

    Raises:
      DataError: the file is there and not readable.
    """
    depends = [source.fingerprint(), tokenizer.identity(), image_tokens, len(source)]
    return kept_index(
        LengthIndex, "lengths", depends, folder, lambda: measure(source, tokenizer, image_tokens)
    )


Index = TypeVar("Index")


def kept_index(
    kind: type[Index], name: str, depends: list[Any], folder: str | Path, make: Callable[[], Index]
) -> Index:
    """An index (a dataclass of arrays) from its file in ``folder``, or made and left there.

    Args:
      name: start of the file's name.
      depends: what the index depends on; the file is named by it.

    Raises:
      DataError: the file is there and not readable.
    """
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(folder).expanduser() / f"{name}-{digest}.npz"
    fields = [field.name for field in dataclasses.fields(kind)]
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return kind(**{field: stored[field] for field in fields})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"length index {path} is broken ({error}); delete it, it is made again") from None
    index = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".npz")
    with os.fdopen(handle, "wb") as file:
        np.savez(file, **{field: getattr(index, field) for field in fields})
    os.replace(temporary, path)
    return index
