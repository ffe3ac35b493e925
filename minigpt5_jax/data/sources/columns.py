"""Pairs of caption and image in columns: parquet files, or what Hugging Face ``datasets`` saved on disk."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.cc3m import PairSource

PARQUET, ARROW = ".parquet", ".arrow"
CAPTIONS, IMAGES = ("caption", "text"), ("image", "image_path", "jpg")
"""Names of columns, the first that is there counts."""
SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing"}
"""How names of files and folders of a split begin."""


def find_tables(path: Path) -> list[Path]:
    """The files of a path: itself, or those of a folder (and of the folders in it), by name.

    Of a folder that ``datasets`` saved these are the files that its ``state.json`` names.  What ``datasets``
    keeps of computations (``cache-*``) is no data.

    Raises:
      DataError: there are none, or a folder holds several splits.
    """
    if path.is_file():
        return [path]
    if (splits := path / "dataset_dict.json").is_file():
        names = sorted(inner.name for inner in path.iterdir() if inner.is_dir())
        raise DataError(f"{splits.parent} holds several splits; name the folder of one: {', '.join(names)}")
    saved = {state.parent: _saved(state) for state in path.rglob("state.json")}
    found = sorted(
        file
        for kind in (PARQUET, ARROW)
        for file in path.rglob(f"*{kind}")
        if not file.name.startswith("cache-") and file.name in saved.get(file.parent, {file.name})
    )
    if not found:
        raise DataError(f"no {PARQUET} or {ARROW} file at {path}")
    _check_one_split(path, found)
    return found


def _saved(state: Path) -> set[str]:
    """Names of the files of data that a ``state.json`` of ``datasets`` lists."""
    try:
        names = {file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state} does not list the files of data ({type(error).__name__} {error}); save the dataset "
            "again (save_to_disk)"
        ) from None
    if missing := sorted(name for name in names if not (state.parent / name).is_file()):
        raise DataError(f"{state} lists {missing[0]}, which is not there; save the dataset again")
    return names


def _check_one_split(folder: Path, files: list[Path]) -> None:
    """DataError where names of files, or of folders above them, are those of several splits."""
    by_split: dict[str, Path] = {}
    for file in files:
        for name in file.relative_to(folder).parts:
            for split, pattern in SPLITS.items():
                if re.match(rf"(?:{pattern})(?![a-z])", name, re.IGNORECASE):
                    by_split.setdefault(split, file)
    if len(by_split) > 1:
        told = ", ".join(f"{split} ({file.relative_to(folder)})" for split, file in by_split.items())
        raise DataError(
            f"{folder} holds several splits: {told}; move the files of each into a folder of its own, and "
            "name one of these (data.train, data.validation)"
        )


class ColumnSource(PairSource):
    """Pairs from a column of captions and one of images (:data:`CAPTIONS`, :data:`IMAGES`).

    An image is its encoded bytes, as ``datasets`` keeps them (``{"bytes", "path"}``), or its path.  Files of
    ``datasets`` (``save_to_disk``) are mapped; of parquet the group of rows is read that a sample is in and
    the last one kept, so large shuffled data is read quicker from the former.

    Args:
      path: a ``.parquet`` or ``.arrow`` file, or a folder with some.
      image_root: folder that paths are relative to; default: the folder of the files.
      rules: how its pairs become samples.
      allow_outside_images: whether paths may lead out of that folder.

    Raises:
      DataError: nothing there, a file that cannot be read, no such column, or no row.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        rules: PairRules = PairRules(),
        *,
        allow_outside_images: bool = False,
    ):
        path = Path(path).expanduser()
        self._files = find_tables(path)
        folder = path if path.is_dir() else path.parent
        self._images = ImageFolder(Path(image_root) if image_root else folder, allow_outside_images)
        self.image_root = str(self._images.root)
        tables = [_Table(file) for file in self._files]
        names = tables[0].columns
        self._caption, self._image = (_column(self._files[0], names, known) for known in (CAPTIONS, IMAGES))
        digest = hashlib.sha256()
        for table in tables:
            if missing := {self._caption, self._image} - set(table.columns):
                raise DataError(f"{table.file}: no column {' and '.join(sorted(missing))}, unlike others")
            digest.update(f"{table.file.name} {table.rows} {table.file.stat().st_size} ".encode())
            for group in range(len(table.starts) - 1):
                for caption in table.group(group, (self._caption,))[self._caption].to_pylist():
                    digest.update(str(caption).encode("utf-8", "surrogatepass"))
        self._starts = [0, *itertools.accumulate(table.rows for table in tables)]
        if not self._starts[-1]:
            raise DataError(f"{path} has columns and no rows")
        super().__init__(
            rules, self._starts[-1], f"columns {digest.hexdigest()}", f"rows in {len(tables)} files at {path}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each worker opens its own."""
        return {name: value for name, value in vars(self).items() if name != "_tables"}

    @functools.cached_property
    def _tables(self) -> list[_Table]:
        return [_Table(file) for file in self._files]

    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A row as it is written; SampleError for one that lacks its caption or image."""
        number = bisect.bisect_right(self._starts, row) - 1
        table, inner = self._tables[number], row - self._starts[number]
        where = f"{table.file}:{inner + 1}"
        caption = table.value(inner, self._caption)
        if not isinstance(caption, str):
            raise SampleError(where, f"{self._caption} is {type(caption).__name__}, not a text")
        return Pair(row, caption, self._source(table, inner, where) if image else b"", where)

    def _source(self, table: _Table, row: int, where: str) -> ImageSource:
        value = table.value(row, self._image)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not value or not isinstance(value, str):
            raise SampleError(where, f"{self._image} is {type(value).__name__}: neither bytes nor a path")
        return self._images.path(value, where)


class _Table:
    """One file, in groups of rows; ``starts`` are the first rows of the groups, and the number of rows."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self._opened = self._open()
        except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
            raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        self.starts = [0, *itertools.accumulate(self._sizes())]
        self.rows = self.starts[-1]
        self._last: dict[tuple[str, ...], tuple[int, Any]] = {}

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        if self.file.suffix == PARQUET:
            return pyarrow.parquet.ParquetFile(self.file)
        mapped = pyarrow.memory_map(str(self.file))
        try:
            return pyarrow.ipc.open_stream(mapped).read_all()
        except pyarrow.ArrowInvalid:  # the other form of such files
            return pyarrow.ipc.open_file(mapped).read_all()

    def _sizes(self) -> list[int]:
        if self.file.suffix == PARQUET:
            about = self._opened.metadata
            return [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        return [self._opened.num_rows]

    @property
    def columns(self) -> list[str]:
        names = self._opened.schema_arrow if self.file.suffix == PARQUET else self._opened.schema
        return list(names.names)

    def group(self, number: int, columns: tuple[str, ...]) -> Any:
        """A group of rows with these columns."""
        if self.file.suffix != PARQUET:
            return self._opened
        if self._last.get(columns, (None,))[0] != number:
            self._last[columns] = number, self._opened.read_row_group(number, columns=list(columns))
        return self._last[columns][1]

    def value(self, row: int, column: str) -> Any:
        """One cell, as Python has it."""
        number = bisect.bisect_right(self.starts, row) - 1
        return self.group(number, (column,))[column][row - self.starts[number]].as_py()


def _column(file: Path, names: list[str], known: tuple[str, ...]) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise DataError(f"{file}: no column {' or '.join(known)}; columns found: {names}")
    return found
