"""Safetensors files as numpy views of the mapped file.

A tensor that is asked for costs no memory of its own: it is a view of pages that the system reads from disk
when they are touched and drops when it likes.  Slicing and transposing it therefore read only what is kept.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from minigpt5_jax.weights.errors import WeightFileError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
"""Names in a header; what is missing (8-bit floats and below) is a clear error when it is read."""


class SafetensorsFile(Mapping[str, np.ndarray]):
    """Tensors of one file by name: read-only views in the dtype of the file.

    Attributes:
      path: the file.  metadata: the strings stored in its header.
    """

    def __init__(self, path: Path):
        """Raises WeightFileError if the file is truncated or of another kind."""
        self.path = path
        try:
            with safe_open(path, framework="np") as handle:  # checks sizes, overlaps and gaps
                self.metadata: dict[str, str] = handle.metadata() or {}
        except SafetensorError as error:
            raise WeightFileError(
                f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
                "download it again"
            ) from None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._header.pop("__metadata__", None)
        self._start = 8 + size

    def __getitem__(self, name: str) -> np.ndarray:
        about = self._header[name]
        dtype = DTYPES.get(about["dtype"])
        if dtype is None:
            raise WeightFileError(
                f"{self.path}: {name!r} is {about['dtype']}, which is not supported; take the files in "
                "float32, float16 or bfloat16"
            )
        offset = self._start + about["data_offsets"][0]
        return np.ndarray(tuple(about["shape"]), dtype, buffer=self._map, offset=offset)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
