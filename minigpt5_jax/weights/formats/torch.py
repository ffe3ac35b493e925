"""PyTorch's ``.pth``, ``.pt``, ``.bin`` and ``.ckpt`` files, without PyTorch and without running a pickle.

A checkpoint is a pickle that says how tensors lie in raw storages.  Here that pickle can only name what is
listed in :func:`_known`: plain containers, paths and the descriptions of tensors.  A name of another package
(hyper-parameters and callbacks are full of them) gives an object that does nothing (:class:`_Inert`); one of
Python itself or of PyTorch is refused before anything is made of it, as ``torch.load(weights_only=True)``
does.  Tensors are views of the mapped file, in the zip format (PyTorch 1.6 and later) and in the older one.
"""

from __future__ import annotations

import collections
import io
import mmap
import pickle
import pickletools
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from minigpt5_jax.weights.errors import WeightFileError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    name: np.dtype(name)
    for name in """float64 float32 float16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64
    complex128""".split()
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


SAVE_TENSORS = (
    "save its tensors alone where it comes from (`torch.save(model.state_dict(), path)`, or safetensors)"
)
"""The remedy for a file that holds what is not read."""
OPCODES = frozenset(
    """PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE LIST DICT TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
    SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING
    SHORT_BINSTRING GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET""".split()
)
"""What ``torch.save`` writes: protocol 2.  Later ones may ask for any amount of memory in a few bytes."""


PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
STRICT = ("torch", "__builtin__")
"""Packages besides Python's own of which nothing is made but what is known."""


class _Refused(Exception):
    """The pickle names something that is no plain data."""


class _Inert:
    """Stands for an object of an unknown package: made of anything, it does and keeps nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Kept nowhere."""

    def extend(self, values: Any) -> None:
        """Kept nowhere."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class _Storage:
    """Raw bytes, and the name of their dtype; '' for an untyped one."""

    def __init__(self, dtype: str):
        self.dtype, self.data = dtype, memoryview(b"")


class _Tensor:
    """A tensor as the pickle describes it."""

    def __init__(self, storage, offset, size, stride, dtype=""):
        self.storage, self.offset, self.size, self.stride, self.dtype = storage, offset, size, stride, dtype

    def array(self) -> np.ndarray:
        """A view of the storage; numpy refuses one that reaches beyond it."""
        dtype = DTYPES[self.dtype or self.storage.dtype]
        strides = tuple(step * dtype.itemsize for step in self.stride)
        offset, shape = self.offset * dtype.itemsize, tuple(self.size)
        return np.ndarray(shape, dtype, buffer=self.storage.data, offset=offset, strides=strides)


class _StorageType:
    """``torch.FloatStorage`` and so on, which are named but never called."""

    def __init__(self, dtype: str):
        self.dtype = dtype


def _plain(metadata: tuple) -> None:
    """Refuse views that PyTorch negates or conjugates when they are read; the storage holds other values."""
    if any(metadata):
        raise _Refused("a tensor that is negated or conjugated")


def _as_posix(*parts: str) -> str:
    """What a path pickles as."""
    return str(PurePosixPath(*parts))


def _known() -> dict[str, Any]:
    """Everything a pickle may name, and what stands for it here.

    Made for every file, since a pickle can set attributes of what it names.
    """
    return {
        "collections.OrderedDict": collections.OrderedDict,
        "builtins.set": set,
        "__builtin__.set": set,
        "argparse.Namespace": types.SimpleNamespace,
        "collections.defaultdict": lambda *_: {},
        **{f"{home}.{kind.__name__}": kind for home in ("builtins", "__builtin__") for kind in (list, dict)},
        **{f"pathlib.{name}": _as_posix for name in PATHS},
        **{f"pathlib._local.{name}": _as_posix for name in PATHS},
        "_codecs.encode": lambda text, *_: text.encode("latin1"),  # how protocol 2 writes bytes
        "torch._utils._rebuild_tensor": lambda *args: _Tensor(*args[:4]),
        "torch._utils._rebuild_tensor_v2": lambda *args: _plain(args[6:]) or _Tensor(*args[:4]),
        "torch._utils._rebuild_tensor_v3": lambda *args: _plain(args[7:]) or _Tensor(*args[:4], args[6]),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.Size": tuple,
        "torch.device": lambda *args: ":".join(map(str, args)),
        "torch.storage.UntypedStorage": _StorageType(""),
        **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
        **{f"torch.{name}": name for name in DTYPES},
    }


class _Unpickler(pickle.Unpickler):
    """Makes plain containers and :class:`_Tensor`; ``storage(key, dtype)`` gives the storages."""

    def __init__(self, file: io.BytesIO | mmap.mmap, storage: Callable[[str, str], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._file, self._storage, self._known = file, storage, _known()

    def load(self) -> Any:
        """The pickle at the file's position, after a look at its instructions."""
        start = self._file.tell()
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self._file)):
            if opcode.name not in OPCODES:
                raise ValueError(f"a pickle with {opcode.name}, which torch.save does not write")
            if opcode.name == "LONG_BINPUT" and argument > number:
                raise ValueError("a pickle that stores more than it makes")
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        known, package = f"{module}.{name}", module.partition(".")[0]
        if known not in self._known:
            if package in STRICT or package in sys.stdlib_module_names or package in sys.builtin_module_names:
                raise _Refused(known)
            self._known[known] = type(known, (_Inert,), {})
        return self._known[known]

    def persistent_load(self, saved: Any) -> _Storage:
        kind, storage_type, key, *rest = saved
        if kind not in ("storage", b"storage") or not isinstance(storage_type, _StorageType):
            raise _Refused(f"a persistent {kind!r}")
        if len(rest) > 2 and rest[2] is not None:
            raise _Refused("a view of a storage")
        return self._storage(str(key), storage_type.dtype)


def read_torch(path: Path) -> Any:
    """What a PyTorch file holds, tensors as read-only numpy views of it.

    Dictionaries stay dictionaries, tuples tuples, ``argparse.Namespace`` becomes a ``SimpleNamespace``.

    Raises:
      WeightFileError: not a file of PyTorch, truncated, or one that would have to run code.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            if data[:4] == b"PK\x03\x04":
                return _arrays(_read_zip(path, memoryview(data)))
            return _arrays(_read_legacy(data))
        except _Refused as error:
            raise WeightFileError(
                f"{path} is refused: to load it, its pickle would have to make {error}, and a weight file is "
                f"never let run code; {SAVE_TENSORS}"
            ) from None
        except Exception as error:  # a damaged pickle or zip file fails in any way
            raise WeightFileError(
                f"{path} ({len(data)} bytes) is truncated or no file of PyTorch ({error}); download it again"
            ) from None


def _read_zip(path: Path, data: memoryview) -> Any:
    """The format since PyTorch 1.6: ``NAME/data.pkl`` and ``NAME/data/KEY``, not compressed."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    main = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if main is None:
        raise ValueError("a zip file without data.pkl")
    folder = main.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
        raise _Refused("a TorchScript program")
    order = f"{folder}byteorder"
    if order in names and archive.read(order) != b"little":
        raise ValueError("written on a big-endian machine")
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: str) -> _Storage:
        if key not in storages:
            storages[key] = _Storage(dtype)
            storages[key].data = _member(archive.getinfo(f"{folder}data/{key}"), data)
        return storages[key]

    return _Unpickler(io.BytesIO(_member(archive.getinfo(main), data)), storage).load()


def _member(info: zipfile.ZipInfo, data: memoryview) -> memoryview:
    """Bytes of an uncompressed member, where they lie in the file."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    head = info.header_offset
    name, extra = (int.from_bytes(data[head + at : head + at + 2], "little") for at in (26, 28))
    start = head + 30 + name + extra
    if start + info.file_size > len(data):
        raise ValueError(f"{info.filename} ends beyond the file")
    return data[start : start + info.file_size]


def _read_legacy(file: mmap.mmap) -> Any:
    """The older format: four pickles, the list of storages, and each with its length before it."""
    data, storages = memoryview(file), {}

    def load() -> Any:
        return _Unpickler(file, lambda key, dtype: storages.setdefault(key, _Storage(dtype))).load()

    if load() != LEGACY_MAGIC:
        raise ValueError("a pickle, but not one of PyTorch")
    load()  # version of the format
    if not load().get("little_endian", True):
        raise ValueError("written on a big-endian machine")
    content, keys = load(), load()
    start = file.tell()
    for key in keys:
        storage = storages[str(key)]
        size = int.from_bytes(data[start : start + 8], "little") * DTYPES[storage.dtype].itemsize
        if start + 8 + size > len(data):
            raise ValueError(f"storage {key} ends beyond the file")
        storage.data = data[start + 8 : start + 8 + size]
        start += 8 + size
    return content


def _arrays(value: Any) -> Any:
    """``value`` with every described tensor as an array."""
    if isinstance(value, _Tensor):
        return value.array()
    if isinstance(value, Mapping):
        return {name: _arrays(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_arrays(item) for item in value)
    if isinstance(value, types.SimpleNamespace):
        return types.SimpleNamespace(**_arrays(vars(value)))
    return value
