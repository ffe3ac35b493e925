"""Opening weight files of every form, and filling a tower from them.

Everything here is numpy: a tensor is a view of the mapped file, so opening a file and importing a tower cost
no memory beyond what is made of it, whatever the size of the files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json, refuse_pointer, why_missing
from minigpt5_jax.weights.formats.safetensors import open_safetensors
from minigpt5_jax.weights.formats.torch import SAVE_TENSORS, read_torch
from minigpt5_jax.weights.table import Table, WeightTableError
from minigpt5_jax.weights.view import Tensors, View, made

STEMS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Files of a Hugging Face folder, the first that is there counts; each may be split, with an index."""
PLACES = ("state_dict", "model", "module")
"""Where in a file of PyTorch its tensors may be, if they are not all that it holds."""
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "language_model.")
"""What wrappers put before every name (data parallelism, ``torch.compile``, Fabric, multimodal models)."""


def open_weights(path: str | os.PathLike[str], key: str | None = None) -> View:
    """Open a weight file, or a folder in Hugging Face layout; no tensor is read before it is used.

    Tensors are read-only views of their files, in the dtype each has there (bfloat16 is
    ``ml_dtypes.bfloat16``); ``path`` is what was opened, ``metadata`` the first file's strings.

    A file is safetensors or one of PyTorch (``.bin``, ``.pth``, ``.pt``, ``.ckpt``), told by its content.  A
    folder holds one of ``STEMS``, or its index and shards; safetensors come first, and copies in half
    precision (``model.fp16.safetensors``) where there is nothing else.

    Tensors are found wherever a file has them: in a dictionary under ``key`` or one of ``PLACES``, or alone.
    A wrapper's prefix (``WRAPPERS``) that every name has is left out.

    Args:
      key: where in a PyTorch file its tensors are looked for first.

    Raises:
      FileNotFoundError: the path, a file of that layout, or a shard is not there.
      WeightFileError: a file is truncated, is of another format, would have to run code, or has no tensors;
        or, when it is read, a tensor about which a shard and the index contradict each other.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights: {why_missing(path)}; download them there or correct the path")
    if path.is_file():
        return _single(path, path, key)
    for variant in ("", ".fp16"):
        for name in STEMS:
            stem, _, ending = name.rpartition(".")
            if (path / f"{name}.index{variant}.json").is_file():
                return _sharded(path, path / f"{name}.index{variant}.json", key)
            if (path / f"{stem}{variant}.{ending}").is_file():
                return _single(path, path / f"{stem}{variant}.{ending}", key)
    for file in path.iterdir():
        if not file.exists():
            raise FileNotFoundError(f"no weights in {path}: {why_missing(file)}")
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds {there}, but none of {', '.join(STEMS)}, nor the index of one; download the weights "
        "there, or give the path of one file"
    )


def open_container(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything a PyTorch file holds: ``state_dict``, ``epoch``, ``hyper_parameters`` ...; arrays are views.

    Raises:
      WeightFileError: it is no dictionary, or as :func:`open_weights`.
    """
    path = Path(path)
    if not is_torch(path):
        raise WeightFileError(f"{path} is no file of PyTorch")
    content = read_torch(path)
    if not isinstance(content, dict):
        raise WeightFileError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors; {SAVE_TENSORS}"
        )
    return content


def _joined(path: Path, owners: Mapping[str, Tensors], metadata: Mapping[str, str]) -> View:
    """Tensors of some files, without a wrapper's prefix; ``owners``: name -> the tensors it is among."""

    def read(name: str) -> np.ndarray:
        view = owners[name][name]
        return view if view.flags.aligned else view.copy()  # old PyTorch files put tensors anywhere

    prefix = ""
    while more := [word for word in WRAPPERS if owners and all(n.startswith(prefix + word) for n in owners)]:
        prefix += more[0]
    readers = {name.removeprefix(prefix): functools.partial(read, name) for name in owners}
    return View(path, readers, metadata)


def _single(path: Path, file: Path, key: str | None) -> View:
    tensors = _open_file(file, key)
    return _joined(path, dict.fromkeys(tensors, tensors), getattr(tensors, "metadata", {}))


def _sharded(path: Path, index: Path, key: str | None) -> View:
    """Tensors of shards.

    Where a shard and the index differ, this is said when such a tensor is read: some (``inv_freq``) are in
    one of them only, and no model reads them.
    """
    owners: dict[str, Tensors] = {}
    metadata: Mapping[str, str] = {}
    files = _indexed_files(index)
    placed = {name for wanted in files.values() for name in wanted}
    for file, wanted in files.items():
        tensors = _open_file(Path(file), key)
        absent = sorted(set(wanted) - set(tensors))
        surplus = sorted(set(tensors) - set(wanted))
        if twice := [name for name in surplus if name in placed]:
            raise WeightFileError(
                f"{file} holds {twice[0]!r}, which {index} places in another shard; download both again, "
                "from the same revision"
            )
        problem = {name: f"{file} lacks {name!r}, which {index} places there" for name in absent}
        problem |= {name: f"{file} holds {name!r}, which {index} does not name" for name in surplus}
        owners.update(dict.fromkeys(wanted, tensors))
        if problem:
            owners.update(
                dict.fromkeys(problem, View(path, {n: _refusal(why) for n, why in problem.items()}))
            )
        metadata = metadata or getattr(tensors, "metadata", {})
    return _joined(path, owners, metadata)


def _refusal(why: str) -> Callable[[], np.ndarray]:
    """A reader of a tensor that cannot be read."""

    def refuse() -> np.ndarray:
        raise WeightFileError(f"{why}; download both again, from the same revision")

    return refuse


def is_torch(path: Path) -> bool:
    """Whether a file is PyTorch's, by its first bytes.

    Raises:
      WeightFileError: it is empty, or a Git LFS pointer.
    """
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        raise WeightFileError(f"{path} is empty; download it again")
    refuse_pointer(path, start)
    # A safetensors file starts with its header's length in 8 bytes, whose first may be any.
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"


def _open_file(path: Path, key: str | None) -> Tensors:
    """Tensors of one file, wherever they are in it."""
    if not is_torch(path):
        return open_safetensors(path)
    content = open_container(path)
    inside = [place for place in dict.fromkeys((key, *PLACES)) if isinstance(content.get(place), dict)]
    for tensors in [content[place] for place in inside] + [content]:
        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            return tensors
    where = f"under {inside[0]!r}" if inside else "and has none alone"
    other = content[inside[0]] if inside else content
    strange = sorted({type(value).__name__ for value in other.values() if not isinstance(value, np.ndarray)})
    raise WeightFileError(
        f"{path} holds more than tensors {where} ({', '.join(strange)}): {_names(other)}; {SAVE_TENSORS}"
    )


def _names(content: Mapping[str, Any]) -> str:
    """Names in a dictionary, for a message."""
    names = [repr(name) for name in content]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _indexed_files(index: Path) -> dict[str, list[str]]:
    """Shard path -> its tensor names, from an index in Hugging Face's form."""
    try:
        weight_map = read_json(index)["weight_map"]
        shards = {name: str(index.parent / shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(
            f"{index} is not an index of weights ({type(error).__name__}: {error}); download it again"
        ) from None
    files: dict[str, list[str]] = {}
    for name, shard in shards.items():
        files.setdefault(shard, []).append(name)
    if absent := sorted(file for file in files if not Path(file).is_file()):
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, {len(absent)} of them missing: {', '.join(absent)} "
            f"({why_missing(Path(absent[0]))}); download the missing shards into that folder"
        )
    return files


def is_floating(dtype: np.dtype) -> bool:
    """Whether a weight of this dtype may be cast (numpy does not count bfloat16 as floating)."""
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16


def count_non_finite(value: np.ndarray) -> int:
    """How many values are NaN or infinite, at about the speed of reading them once.

    Looks at the bits, a few MB at a time: for a number, without its sign, they order as the numbers do.
    """
    if not is_floating(value.dtype):
        return 0
    bits = value.ravel(order="K").view(f"u{value.dtype.itemsize}")
    infinite = np.array(np.inf, value.dtype).view(bits.dtype)
    magnitude = np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)
    step, bad = 1 << 20, 0
    for start in range(0, bits.size, step):
        part = bits[start : start + step] & magnitude
        if part.max(initial=0) >= infinite:
            bad += int(np.count_nonzero(part >= infinite))
    return bad


def cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    """Floating values in ``dtype``; others, and everything for None, as they are."""
    return value.astype(dtype, copy=False) if dtype is not None and is_floating(value.dtype) else value


def load_tower(
    table: Table, source: Mapping[str, np.ndarray], shapes: Mapping[str, Any], dtype: Any = None
) -> dict[str, np.ndarray]:
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
        # Cast before stacking: never twice in memory.
        return table.to_params(made(source, source, lambda k: cast(np.asarray(source[k]), dtype)), plain)
    except WeightTableError as error:
        where = getattr(source, "path", None)
        raise WeightTableError(f"{where}: {error}" if where else str(error)) from None
