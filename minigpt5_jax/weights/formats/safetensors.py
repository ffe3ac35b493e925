"""Safetensors files as numpy views of the mapped file.

A tensor that is asked for costs no memory of its own: it is a view of pages that the system reads from disk
when they are touched and drops when it likes.  Slicing and transposing it therefore read only what is kept.
"""

from __future__ import annotations

import functools
import json
import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.view import View

DTYPES = {
    f"{dtype.kind.upper()}{8 * dtype.itemsize}": dtype
    for dtype in map(
        np.dtype,
        "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 complex64".split(),
    )
} | {"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(np.bool_)}
"""Names in a header; what is missing (8-bit floats and below) is a clear error when it is read."""


def open_safetensors(path: Path) -> View:
    """Tensors of one file by name: read-only views in the dtype of the file.

    Raises:
      WeightFileError: the file is truncated or of another kind.
    """
    try:
        with safe_open(path, framework="np") as handle:  # checks sizes, overlaps and gaps
            metadata = handle.metadata()
    except SafetensorError as error:
        raise WeightFileError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
            "download it again"
        ) from None
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)

    def read(name: str) -> np.ndarray:
        about = header[name]
        dtype = DTYPES.get(about["dtype"])
        if dtype is None:
            raise WeightFileError(
                f"{path}: {name!r} is {about['dtype']}, which is not supported; take the files in "
                "float32, float16 or bfloat16"
            )
        offset = start + about["data_offsets"][0]
        return np.ndarray(tuple(about["shape"]), dtype, buffer=data, offset=offset)

    return View(path, {name: functools.partial(read, name) for name in header}, metadata)
