"""Paths of images as files name them, and the folder that they stay in."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError

FETCH = (
    "fetch the images first, for example with img2dataset (--input_format tsv --url_col url --caption_col "
    "caption --output_format webdataset), and read the folder of tar shards that it writes "
    "(data.format=cc3m_tar)"
)


def is_url(text: str) -> bool:
    """Whether a path is in truth an address."""
    return re.match(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


OUTSIDE = (
    "name a folder above both as the image root, or allow it: data.allow_outside_images=True (prepare: "
    "--allow_outside_images)"
)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The folder that the image paths of a file are relative to.

    Attributes:
      root: the folder.
      allow_outside: whether paths may lead out of it; a file from elsewhere could name any file else.
      remedy: what to do about a path that does.
    """

    root: Path
    allow_outside: bool = False
    remedy: str = OUTSIDE

    def path(self, name: str, where: str) -> str:
        """Path of an image as a file names it; SampleError for a URL and for one outside of the folder."""
        if is_url(name):
            raise SampleError(where, f"{name} is a URL, and images are read from files; {FETCH}")
        root = os.path.abspath(self.root)
        full = os.path.normpath(os.path.join(root, name))
        if not (self.allow_outside or full.startswith(root.rstrip(os.sep) + os.sep)):
            raise SampleError(
                where,
                f"image path {name} leads out of the image folder {self.root}; {self.remedy}",
            )
        return os.path.join(self.root, name)


def image_folder(path: str | Path, image_root: str | Path | None, allow_outside: bool = False) -> ImageFolder:
    """Folder that a file's image paths are relative to, the file's own where None; DataError if missing."""
    root = Path(path).parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise DataError(f"image folder not found: {root}")
    return ImageFolder(root, allow_outside)
