"""Files of which every line is an entry: CC3M's table, MMDialog, the user's own JSONL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.lines import BOM, check_jsonl
from minigpt5_jax.data.prepare.checks.entries import Entry, Options
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.samples.records import RecordRules, parse_record
from minigpt5_jax.data.sources.cc3m import header_hint, read_row, split_row
from minigpt5_jax.data.sources.jsonl import repeated_id
from minigpt5_jax.data.sources.mmdialog import parse_dialog, repeated_dialog


class Table:
    """CC3M's table, line by line."""

    def __init__(self, path: Path, options: Options):
        self._path, self._folder, self._rules = path, options.folder(path), PairRules()
        self._header: list[str] | None = None
        self._row, self._seen, self._images = -1, {}, set()

    @property
    def rows(self) -> int:
        """Rows read so far, the header not counted."""
        return self._row + 1

    def row(self, lines: Sequence[str], first: int, entry: Entry) -> int:
        """Reads the row that begins in a line; returns the number of its last line, 0 for that very one."""
        if self._header is None:
            entry.of_file = True
            self._header = cells = split_row(lines[first]) or [lines[first]]
            missing = [name for name in ("caption", "image_path") if name not in cells]
            if missing:
                hint = header_hint(self._path, cells)
                entry.problems.append(
                    f"no column {' and '.join(missing)}, found {cells}; no row can be read without. {hint}"
                )
            return 0
        self._row += 1
        if not {"caption", "image_path"} <= set(self._header):
            return 0
        cells, stop = read_row(lines, first, len(self._header), entry.where)
        values = dict(zip(self._header, cells))
        self._pair(values["caption"], values["image_path"].strip(), entry)
        return stop

    def _pair(self, caption: str, path: str, entry: Entry) -> None:
        if not path:
            entry.problems.append("empty image_path")
            return
        entry.add_image(self._folder, path)
        first = self._seen.setdefault(hash((caption, path)), entry.where)
        if first != entry.where:
            entry.problems.append(f"the same caption and image as {first}")
        elif path in self._images:
            entry.notes.append(("rows whose image another row has too", path))
        self._images.add(path)
        pair = Pair(self._row, caption, path, entry.where)
        entry.samples += [self._rules.texts(pair, kind) for kind in self._rules.kinds(self._row)]


class Records:
    """The user's own JSONL, line by line."""

    def __init__(self, path: Path, options: Options):
        self._folder, self._rules = options.folder(path), RecordRules()
        self._ids: dict[str, str] = {}

    def __call__(self, line: str, entry: Entry) -> None:
        record, number = parse_record(line, entry.where), entry.where.rpartition(":")[2]
        if record.id is not None and self._ids.setdefault(record.id, number) != number:
            raise repeated_id(record.id, entry.where, int(self._ids[record.id]))
        if not record.answers():
            entry.problems.append("no assistant turn: a prompt to generate from, nothing to learn from")
        for image in (image for turn in record.turns for image in turn.images()):
            entry.add_image(self._folder, image.path)
        for turn, stretch in record.samples():
            example = self._rules.example(
                record, turn, stretch, image_root=self._folder.root, name="", where=entry.where
            )
            entry.samples.append([example.words])


class Dialogues:
    """MMDialog, line by line."""

    ACCEPTED = ("over ", "further images")  # kinds of remarks that are the original's own limits

    def __init__(self, path: Path, options: Options):
        self._root, self._ids, self._count = options.folder(path).root, {}, options.count_tokens
        self._rules = DialogRules(training=options.count_tokens is not None)

    def __call__(self, line: str, entry: Entry) -> None:
        dialog = parse_dialog(line, entry.where, self._root)
        number = int(entry.where.rpartition(":")[2])
        if (first := self._ids.setdefault(dialog.id, number)) != number:
            raise repeated_dialog(entry.where, first)
        usable, remarks = self._rules.usable(dialog, lambda image: True, self._count)
        for remark in remarks:
            if remark.kind.startswith(self.ACCEPTED):
                entry.notes.append((f"turns: {remark.kind}", remark.detail))
            else:
                entry.problems.append(remark.detail)
        entry.images += [turn.image for turn in dialog.turns if turn.image is not None]
        for turn in range(1, usable):
            entry.samples.append([self._rules.example(dialog, turn).words])


class Lines:
    """Lines of a text file as entries; ``read`` fills in each that is UTF-8 and not blank.

    A SampleError of ``read`` is a problem of its entry.
    """

    def __init__(self, path: Path, read: Table | Callable[[str, Entry], None]):
        self._path, self._read = path, read
        data = path.read_bytes()
        if not data.strip():
            raise DataError(f"data file is empty: {path}")
        self._lines = data.removeprefix(BOM).split(b"\n")
        if not isinstance(read, Table):
            first = next(line for line in self._lines if line.strip())
            check_jsonl(path, first.decode("utf-8", "replace"))

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Entry]:
        last = 0  # the last line of a row over several lines
        for number, line in enumerate(self._lines, 1):
            if number <= last:
                continue
            entry = Entry(f"{self._path}:{number}")
            if line.endswith(b"\r"):
                entry.notes.append(("lines end in CR LF", "accepted"))
                line = line[:-1]
            if not line:
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                entry.problems.append(f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})")
            else:
                with entry.collect():
                    if isinstance(self._read, Table):
                        last = self._read.row(_Decoded(self._lines), number - 1, entry)
                    else:
                        self._read(text, entry)
            yield entry
        if isinstance(self._read, Table) and not self._read.rows:
            yield Entry(str(self._path), ["a header and no rows"], of_file=True)


class _Decoded(Sequence):
    """Lines as text, decoded when they are asked for."""

    def __init__(self, lines: list[bytes]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> str:
        return self._lines[number].decode("utf-8", "replace").removesuffix("\r")
