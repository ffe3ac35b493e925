"""Reading and writing safetensors, and filling a tower from them.

Everything here is numpy: tensors are read one at a time, so importing a tower costs its own size
once, whatever the size of the files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minigpt5_jax.weights.table import Table, WeightTableError

INDEX_FILES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


class WeightFileError(ValueError):
    """A weight file that exists but cannot be used; the message names it and what to do."""


class SafetensorsSource(Mapping[str, np.ndarray]):
    """Tensors of one or more safetensors files by name, read when they are asked for.

    Dtypes are those of the file, tensor by tensor (bfloat16 is ``ml_dtypes.bfloat16``).

    Attributes:
      path: the file or folder that was opened.
      metadata: the strings stored in the header (of the first file, if there are several).
    """

    def __init__(self, path: Path, files: Mapping[str, Sequence[str] | None]):
        """``files``: file -> the tensors wanted from it, or None for all of them."""
        self.path, self.metadata = path, {}
        self._handles: dict[str, Any] = {}
        for file, wanted in files.items():
            handle = _open_file(Path(file))
            present = set(handle.keys())
            if missing := sorted(set(wanted or ()) - present):
                raise WeightFileError(
                    f"{file} lacks {missing[0]!r} and {len(missing) - 1} more tensors that the index of "
                    f"{path} places there; download both again, from the same revision"
                )
            self.metadata = self.metadata or (handle.metadata() or {})
            self._handles.update(dict.fromkeys(present if wanted is None else wanted, handle))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def _open_file(path: Path) -> Any:
    """An open safetensors handle, or one clear error."""
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise WeightFileError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise WeightFileError(
            f"{path} is a torch checkpoint; convert it once, where torch is installed, with "
            "`safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)`"
        )
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise WeightFileError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
            "download it again"
        ) from None


def _indexed_files(index: Path) -> dict[str, list[str]]:
    """Shard path -> its tensor names, from a ``*.safetensors.index.json``."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {name: str(index.parent / shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(
            f"{index} is not a safetensors index ({type(error).__name__}: {error}); download it again"
        ) from None
    files: dict[str, list[str]] = {}
    for name, shard in shards.items():
        files.setdefault(shard, []).append(name)
    if absent := sorted(file for file in files if not Path(file).is_file()):
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, {len(absent)} of them missing: {', '.join(absent)}; "
            "download the missing shards into that folder"
        )
    return files


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsSource:
    """Open a safetensors file, or a folder in Hugging Face layout, without reading any tensor.

    A folder holds an index and its shards, or ``model.safetensors``, or
    ``diffusion_pytorch_model.safetensors``.

    Raises:
      FileNotFoundError: the path, a file of that layout, or a shard is not there.
      WeightFileError: a file is truncated, is of another format, or contradicts the index.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; download them there or correct the path")
    if path.is_file():
        return SafetensorsSource(path, {str(path): None})
    for name in INDEX_FILES:
        if (path / name).is_file():
            return SafetensorsSource(path, _indexed_files(path / name))
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return SafetensorsSource(path, {str(path / name): None})
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds {there}, but none of {', '.join(INDEX_FILES + SINGLE_FILES)}; download the "
        "safetensors files there, or give the path of one file"
    )


def is_floating(dtype: np.dtype) -> bool:
    """Whether a weight of this dtype may be cast (numpy does not count bfloat16 as floating)."""
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16


class _Cast(Mapping[str, np.ndarray]):
    """A source whose floating tensors arrive in ``dtype``: cast before stacking, never twice in memory."""

    def __init__(self, source: Mapping[str, np.ndarray], dtype: Any):
        self.source, self.dtype = source, np.dtype(dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        value = np.asarray(self.source[name])
        return value.astype(self.dtype, copy=False) if is_floating(value.dtype) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def load_tower(table: Table, source: Mapping[str, np.ndarray], shapes: Mapping[str, Any],
               dtype: Any = None) -> dict[str, np.ndarray]:
    """Parameters of one tower from foreign tensors.

    Args:
      table: rules from the source's names to the tower's paths.
      source: tensors by name; every one must be consumed or ignored by the table.
      shapes: the tower's paths -> shape, or anything with ``.shape`` (``Template.shapes``).
      dtype: floating parameters are cast to it; None keeps each tensor's own.

    Raises:
      WeightTableError: naming the source and every tensor that is missing, unexpected or misshapen.
    """
    plain = {path: tuple(getattr(shape, "shape", shape)) for path, shape in shapes.items()}
    try:
        return table.to_params(source if dtype is None else _Cast(source, dtype), plain)
    except WeightTableError as error:
        where = getattr(source, "path", None)
        raise WeightTableError(f"{where}: {error}" if where else str(error)) from None


def save_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray],
                     metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that either exists completely or not at all.

    The file is written beside ``path`` under a temporary name and renamed; folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, temporary, metadata=dict(metadata or {}))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
