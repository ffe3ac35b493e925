"""Paths of images as files name them, the folder that they stay in, and files that are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import os
import re
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError

FETCH = (
    "fetch the images first, for example with img2dataset (--input_format tsv --url_col url --caption_col "
    "caption --output_format webdataset), and read the folder of tar shards that it writes "
    "(data.format=cc3m_tar)"
)


LOOKED_AT = 10_000  # names of a folder at most, when one that is spelled alike is looked for


def not_found(what: str, path: str | Path) -> str:
    """``what not found: path``, and what is probably meant: names beside it, or where a dead link leads."""
    path = Path(path)
    message = f"{what} not found: {path}"
    if path.is_symlink() and not path.exists():
        return f"{message}, a link to {os.readlink(path)}, where nothing is; fetch it again"
    while not path.parent.is_dir() and path.parent != path.parent.parent:  # the first folder that is missing
        path = path.parent
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [entry.name for entry in itertools.islice(path.parent.iterdir(), LOOKED_AT)]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    return f"{message}; did you mean {' or '.join(near)}?" if near else message


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
      allow_outside: whether paths may lead out of it; a file from elsewhere could then name any file.
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
        raise DataError(not_found("image folder", root))
    return ImageFolder(root, allow_outside)
