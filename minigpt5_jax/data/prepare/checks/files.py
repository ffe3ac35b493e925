"""Data that is read as a whole: VIST's stories, tar shards, prepared data; and which format a path has."""

from __future__ import annotations

import bisect
import collections
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import BOM
from minigpt5_jax.data.paths import not_found
from minigpt5_jax.data.prepare.checks.entries import Entry, Options, Reader
from minigpt5_jax.data.prepare.checks.lines import Dialogues, Lines, Records, Table
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import Cc3mTarSource, ColumnSource, PreparedSource
from minigpt5_jax.data.sources.cc3m import PairSource
from minigpt5_jax.data.sources.columns import ARROW, PARQUET
from minigpt5_jax.data.sources.kinds import make_rules
from minigpt5_jax.data.sources.tar import find_shards
from minigpt5_jax.data.sources.vist import STEPS, from_published, mapping_path, parse_story, published


class Stories:
    """VIST's two files.  A story's line is that of its id in the file."""

    def __init__(self, path: Path, options: Options):
        self._path, self._root, self._rules = path, options.folder(path), StoryRules()
        self._problems: list[Entry] = []
        self._text, self._stories = self._read(path)
        self._mapping_path, self._mapping = options.mapping or path, {}
        if published(self._stories):
            mapping = self._read(self._mapping_path)[1] if options.mapping else None
            self._stories, self._mapping = from_published(path, self._stories, mapping, self._root.root)
        else:
            self._mapping_path = options.mapping or mapping_path(path)
            _, self._mapping = self._read(self._mapping_path)

    def _read(self, path: Path) -> tuple[str, dict[str, Any]]:
        """The text of a JSON file and the object in it, empty where it cannot be read."""
        if not path.is_file():
            raise DataError(not_found("data file", path))
        data, repeated = path.read_bytes().removeprefix(BOM), []
        text = data.decode("utf-8", "replace")

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            counts = collections.Counter(name for name, _ in pairs)
            repeated.extend(name for name, count in counts.items() if count > 1)
            return dict(pairs)

        try:
            value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
            if not isinstance(value, dict):
                raise ValueError(f"one object is expected, found {type(value).__name__}")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problem = f"not UTF-8 (byte 0x{data[error.start]:02x}); nothing can be read"
        except json.JSONDecodeError as error:
            line, found = error.lineno, f"{error.msg} at column {error.colno}"
            problem = f"no valid JSON ({found}); is the file cut off?  Nothing can be read"
        except (ValueError, RecursionError) as error:  # RecursionError: nested without end
            line, problem = 1, str(error)
        else:
            lines = _line_finder(text)
            self._problems += [
                Entry(f"{path}:{lines(name)}", [f"key {name!r} occurs twice"], of_file=True)
                for name in repeated
            ]
            return text, value
        self._problems.append(Entry(f"{path}:{line}", [problem], of_file=True))
        return text, {}

    def __len__(self) -> int:
        return len(self._stories)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._problems
        lines, used = _line_finder(self._text), set()
        for name, value in self._stories.items():
            entry = Entry(f"{self._path}:{lines(name)}")
            story = parse_story(self._path, name, value, self._mapping, self._root)
            if isinstance(story, SampleError):
                entry.problems.append(f"story {name}: {story.reason}")
            else:
                if len(story.steps) != STEPS:
                    entry.notes.append((f"stories without {STEPS} steps", f"{len(story.steps)} steps"))
                entry.images += [step.image for step in story.steps]
                samples = self._rules.samples(len(story.steps))
                entry.samples += [self._rules.texts(story, *sample) for sample in samples]
                used.update(entry.images)
            yield entry
        idle = [name for name, path in self._mapping.items() if str(self._root.root / str(path)) not in used]
        if idle and self._stories:
            notes = [("images of the mapping that no usable story shows", name) for name in idle]
            yield Entry(str(self._mapping_path), notes=notes, of_file=True)


def _line_finder(text: str) -> Callable[[str], int]:
    """The line in which a key of the text's outer object stands, 1 for one that is not found."""
    ends = [match.start() for match in re.finditer("\n", text)]
    places: dict[str, int] = {}
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', text):
        places.setdefault(match[1], match.start())
    return lambda name: bisect.bisect_left(ends, places.get(name, 0)) + 1


class Shards:
    """CC3M in tar shards, each opened on its own, so that a bad one does not hide the others."""

    def __init__(self, path: Path, options: Options):
        self._shards, self._rules = find_shards(path), PairRules()

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Entry]:
        with tempfile.TemporaryDirectory() as cache:  # a check leaves nothing in the user's folder
            bad: dict[Path, str] = {}
            for shard in self._shards:
                try:
                    Cc3mTarSource(shard, cache_dir=cache)
                except DataError as error:
                    bad[shard] = str(error)
                except OSError as error:
                    bad[shard] = f"tar shard cannot be read ({error.strerror})"
            good = [shard for shard in self._shards if shard not in bad]
            source, row = Cc3mTarSource(good, cache_dir=cache) if good else None, 0
            for shard in self._shards:
                if shard in bad:
                    yield Entry(str(shard), [bad[shard]], of_file=True)
                    continue
                notes = [
                    ("members that belong to no sample", name)
                    for file, name in source.unused
                    if file == shard
                ]
                while row < source.rows and source.shard(row) == shard:
                    entry = _pair_entry(source, row, self._rules)
                    entry.notes, notes = entry.notes + notes, []
                    yield entry
                    row += 1


def _pair_entry(source: PairSource, row: int, rules: PairRules) -> Entry:
    try:
        pair = source.pair(row)
    except SampleError as error:
        return Entry(error.where, [error.reason])
    entry = Entry(pair.where, images=[pair.image])
    with entry.collect():
        entry.samples += [rules.texts(pair, kind) for kind in rules.kinds(row)]
    return entry


class Columns:
    """Parquet files, or what ``datasets`` saved."""

    def __init__(self, path: Path, options: Options):
        self._rules = PairRules()
        outside = options.allow_outside_images
        self._source = ColumnSource(path, options.image_root, allow_outside_images=outside)

    def __len__(self) -> int:
        return self._source.rows

    def __iter__(self) -> Iterator[Entry]:
        return (_pair_entry(self._source, row, self._rules) for row in range(len(self)))


class Prepared:
    """A data set that ``prepare`` wrote."""

    def __init__(self, path: Path, options: Options):
        count = options.count_tokens
        source = PreparedSource(path, rules=functools.partial(make_rules, training=False))
        if source.split != "test" and (count is not None or source.dataset != "mmdialog"):
            source = PreparedSource(source.folder, count_tokens=count)  # what training reads
        self._source = source

    def __len__(self) -> int:
        return len(self._source.kept_units())

    def __iter__(self) -> Iterator[Entry]:
        source = self._source
        samples = collections.defaultdict(list)
        for index in range(len(source)):
            samples[source.find(index)[0]].append(index)
        for record in range(len(self)):
            entry = Entry(f"{source.folder}: record {record}")
            entry.samples += [source.texts(index) for index in samples[record]]
            with entry.collect():
                entry.images += source.images(record)
            yield entry


def _lines(kind: type, path: Path, options: Options) -> Lines:
    return Lines(path, kind(path, options))


READERS: dict[str, Callable[[Path, Options], Reader]] = {
    "cc3m": functools.partial(_lines, Table),
    "cc3m_tar": Shards,
    "parquet": Columns,
    "vist": Stories,
    "mmdialog": functools.partial(_lines, Dialogues),
    "jsonl": functools.partial(_lines, Records),
    "prepared": Prepared,
}


def guess_format(path: Path) -> tuple[str, str]:
    """(format, why) of a path by what it is and how it begins.

    Raises:
      DataError: there is nothing, or nothing that looks like one of the formats.
    """
    if "*" in str(path) or path.suffix == ".tar":
        return "cc3m_tar", "its name"
    if path.suffix in (PARQUET, ARROW):
        return "parquet", "its name"
    if path.is_dir():
        if any(file for kind in (PARQUET, ARROW) for file in path.rglob(f"*{kind}")):
            return "parquet", "the files in it"
        if any(path.glob("*.tar")):
            return "cc3m_tar", "the .tar files in it"
        names = sorted(file.name for file in path.iterdir())
        files = [name for name in names if name.endswith((".tsv", ".json", ".jsonl"))]
        if files and "units.jsonl" not in files:
            raise DataError(f"{path} is a folder; name one of the files in it: {', '.join(files[:5])}")
        return "prepared", "what the folder holds"
    if not path.is_file():
        raise DataError(f"nothing to check: {not_found('data', path)}")
    with path.open("rb") as file:
        start = file.read(2**16)
    first = next((line for line in start.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()), b"")
    if path.suffix == ".json":
        return "vist", "its name"
    if path.suffix in (".tsv", ".csv"):  # of commas it then says how to write it with tabs
        return "cc3m", "its name"
    if b"caption" in first and not first.lstrip().startswith((b"{", b"[")):
        return "cc3m", "its header"
    if first.lstrip().startswith((b"{", b"[")):
        return ("mmdialog", "its first line") if b'"conversation"' in first else ("jsonl", "its first line")
    raise DataError(f"cannot tell what {path} is; give --format, one of {', '.join(READERS)}")
