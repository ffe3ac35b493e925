"""Writing safetensors: complete or not at all, one tensor in memory at a time.

Files are written beside their name under a temporary one and renamed.  What a killed process left there is
removed by the next one that writes the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from minigpt5_jax.weights.formats.safetensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_SIZE = 5 * 10**9


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write; it appears under ``path`` once complete and on disk.  Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # while it is held, the file is not abandoned
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Delete temporary files of ``path`` whose writer is gone."""
    for file in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError), file.open("rb") as open_file:
            fcntl.flock(open_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


class _Writer:
    """Tensors into an open file, one after the other.

    The header comes first but is known last: its place is kept free and filled with blanks.  Readers want
    tensors aligned to their dtype, so those of odd sizes (small ones, ever) go behind all others.
    """

    def __init__(self, file: IO[bytes], names: Iterable[str], metadata: Mapping[str, str]):
        """``names``: of all tensors that may come."""
        self.file = file
        self.header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        room = sum(len(json.dumps(name)) + 256 for name in names) + len(json.dumps(self.header))
        self.start, self.size = 8 + -(-room // 8) * 8, 0
        self._odd: list[tuple[str, np.ndarray]] = []
        file.seek(self.start)

    def add(self, name: str, value: np.ndarray) -> None:
        """Write a tensor, or keep it for the end."""
        if value.dtype not in NAMES:
            raise TypeError(f"{name!r} has dtype {value.dtype}, which safetensors files do not hold")
        if value.nbytes % 8:
            self._odd.append((name, value.copy()))
        else:
            self._append(name, value)

    def finish(self) -> None:
        """Write what was kept, and the header."""
        for name, value in sorted(self._odd, key=lambda item: -item[1].dtype.itemsize):
            self._append(name, value)
        text = json.dumps(self.header, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write((self.start - 8).to_bytes(8, "little") + text.ljust(self.start - 8))

    def _append(self, name: str, value: np.ndarray) -> None:
        end = self.size + value.nbytes
        shape, dtype = list(value.shape), NAMES[value.dtype]
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.size, end]}
        self.file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        self.size = end


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that either exists completely or not at all.

    Args:
      path: file; folders are made.
      tensors: by name; each is asked for once and dropped when it is written, so a lazy mapping is never
        in memory as a whole.
      metadata: strings for the header.

    Raises:
      TypeError: a dtype the format does not have; nothing is left behind.
    """
    with new_file(path) as file:
        writer = _Writer(file, tensors, metadata or {})
        for name in tensors:
            writer.add(name, np.asarray(tensors[name]))
        writer.finish()


def save_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    stem: str = "model",
    max_shard_size: int = SHARD_SIZE,
) -> list[Path]:
    """Write ``STEM.safetensors`` in Hugging Face's form: one file, or shards and their index.

    Args:
      folder: made if need be; files of that stem that are in it are replaced.
      tensors: by name; each is asked for once and dropped when it is written.
      max_shard_size: bytes; a tensor that is larger has a shard of its own.

    Returns:
      the files, the index last.  They get their names when all are complete.

    Raises:
      TypeError: a dtype the format does not have; nothing is changed.
    """
    folder = Path(folder)
    for left in folder.glob(f".{stem}.*.part"):  # by a process that was killed
        left.unlink()
    shards, total = [], 0
    try:
        items = ((name, np.asarray(tensors[name])) for name in tensors)
        item = next(items, None)
        while item is not None or not shards:
            names, used = [], 0
            with new_file(_part(folder, stem, len(shards))) as file:
                writer = _Writer(file, tensors, metadata or {})
                while item is not None and (not names or used + item[1].nbytes <= max_shard_size):
                    writer.add(*item)
                    names, used = [*names, item[0]], used + item[1].nbytes
                    item = next(items, None)
                writer.finish()
            shards, total = [*shards, names], total + used
        return _name_shards(folder, stem, shards, total)
    finally:
        for left in folder.glob(f".{stem}.*.part"):
            left.unlink()


def _part(folder: Path, stem: str, number: int) -> Path:
    """A complete shard whose name, which has the count in it, is not known yet."""
    return folder / f".{stem}.{number}.part"


def _name_shards(folder: Path, stem: str, shards: list[list[str]], total: int) -> list[Path]:
    """Give the shards their names, older files of the stem go; then write the index."""
    index, count = folder / f"{stem}.safetensors.index.json", len(shards)
    for old in (index, folder / f"{stem}.safetensors", *folder.glob(f"{stem}-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    files = [folder / f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [folder / f"{stem}.safetensors"]
    for number, file in enumerate(files):
        _part(folder, stem, number).rename(file)
    if count == 1:
        return files
    weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    with new_file(index) as file:
        file.write(text.encode() + b"\n")
    return [*files, index]


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write indented JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
