"""Small files beside weights, and what is said of a path where nothing can be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from minigpt5_jax.weights.errors import WeightFileError

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS left in the place of one that it has not brought."""


def why_missing(path: Path) -> str:
    """What is the matter with a path that does not exist: itself, or a link in it that leads nowhere."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            return f"{part} is a link to {os.readlink(part)}, where nothing is; download it again"
    return f"{path} does not exist"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raises WeightFileError where a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(LFS_POINTER):
        raise WeightFileError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its folder")


def read_small(path: Path) -> bytes:
    """Content of a small file.

    Raises:
      WeightFileError: it is not there, is a link to nothing, or is a Git LFS pointer.
    """
    if not path.is_file():
        raise WeightFileError(why_missing(path) if not path.exists() else f"{path} is no file")
    content = path.read_bytes()
    refuse_pointer(path, content)
    return content


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
      WeightFileError: as :func:`read_small`, or it is no JSON.
    """
    try:
        return json.loads(read_small(path))
    except ValueError as error:
        if isinstance(error, WeightFileError):
            raise
        raise WeightFileError(f"{path}: no valid JSON ({error}); download it again") from None
