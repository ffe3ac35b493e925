"""MMDialog: conversations with images, one JSON object a line (fidelity 5.4)."""

from __future__ import annotations

import collections
import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import TextLines, check_jsonl
from minigpt5_jax.data.paths import image_folder
from minigpt5_jax.data.samples.dialogs import Dialog, DialogRules, DialogTurn, Remark
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.fields import Fields
from minigpt5_jax.data.sources.base import Source, check_index

logger = logging.getLogger(__name__)

TEXT, MEDIA = "__TEXT__", "__MEDIA__"


class MMDialogSource(Source):
    """Conversations in the form MMDialog is published in (fidelity 5.4).

    A line is ``{"conversation_id": number, "conversation": [{"turn": [{"__TEXT__": text}, {"__MEDIA__":
    id}]}, ...]}``; other keys are ignored.  The image of an id is ``{id}.jpg``.  Every turn but the first
    is a sample, up to one that the rules of :class:`~minigpt5_jax.data.samples.dialogs.DialogRules` end the
    conversation at.  A line that breaks the form, or that repeats a conversation id, counts as one sample
    that cannot be fetched.

    All lines are read once to find the samples; kept are two numbers for each.

    Args:
      path: the conversations.
      image_root: folder of the images; default: the file's.
      rules: how conversations become samples.
      count_tokens: length of a text in tokens (``lambda text: len(tokenizer.encode(text))``); needed in
        training with ``head``.  It is called while the source is made and not kept.

    Attributes:
      lines: of the file.
      counts: how often something was left out, by kind.
      remarks: of each kind the first few, named.

    Raises:
      DataError: the file or the folder is missing, not UTF-8 or empty, no sample is left, or no
        ``count_tokens`` where it is needed.
    """

    SHOWN = 5

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        rules: DialogRules = DialogRules(),
        *,
        count_tokens: Callable[[str], int] | None = None,
    ):
        rules.check_counter(count_tokens)
        self._rules, self._root = rules, image_folder(path, image_root).root
        self.image_root = str(self._root)
        self.lines = TextLines(path)
        check_jsonl(self.lines.path, self.lines[0])
        self.counts: collections.Counter[str] = collections.Counter()
        self.remarks: dict[str, list[Remark]] = {}
        self._bad, self._repeats = 0, {}
        self._sample_line, self._sample_turn = self._scan(count_tokens)
        if not len(self._sample_line):
            raise DataError(f"no samples in {self.lines.path}: {self._left_out() or 'no conversations'}")
        for kind, shown in self.remarks.items():
            named = "\n  ".join(map(str, shown))
            logger.warning("%s: %s, %d times; the first:\n  %s", path, kind, self.counts[kind], named)

    def _scan(self, count_tokens: Callable[[str], int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Line and turn of every sample; turn -1 for a line that cannot be used."""
        lines, turns, first = array("q"), array("i"), {}
        there = {entry.name for entry in os.scandir(self._root)}  # one listing, not a call for each image
        has_image = lambda path: os.path.basename(path) in there  # noqa: E731
        for line in tqdm(range(self.rows), desc="reading dialogues", delay=2, unit="line"):
            try:
                dialog = self.dialog(line)
            except SampleError:
                usable, remarks = -1, ()
            else:
                if first.setdefault(dialog.id, line) != line:
                    self._repeats[line] = first[dialog.id]
                    usable, remarks = -1, ()
                else:
                    usable, remarks = self._rules.usable(dialog, has_image, count_tokens)
            found = range(1, usable) if usable >= 0 else (-1,)
            self._bad += usable < 0
            self._note(remarks)
            lines.extend([line] * len(found))
            turns.extend(found)
        return np.asarray(lines, np.int64), np.asarray(turns, np.int32)

    def _note(self, remarks: Iterable[Remark]) -> None:
        for remark in remarks:
            self.counts[remark.kind] += 1
            shown = self.remarks.setdefault(remark.kind, [])
            if len(shown) < self.SHOWN:
                shown.append(remark)

    @property
    def rows(self) -> int:
        """Conversations of the file, unusable ones included."""
        return len(self.lines)

    def dialog(self, row: int) -> Dialog:
        """A conversation as it is written; SampleError for one that breaks the form."""
        where = self.lines.where(row)
        if row in self._repeats:
            raise repeated_dialog(where, self.lines.number(self._repeats[row]))
        return parse_dialog(self.lines[row], where, self._root)

    def _find(self, index: int) -> tuple[Dialog, int]:
        check_index(index, self)
        return self.dialog(int(self._sample_line[index])), int(self._sample_turn[index])

    def __len__(self) -> int:
        return len(self._sample_line)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``, the same in every epoch; SampleError for a line that cannot be used."""
        return self._rules.example(*self._find(index))

    def fingerprint(self) -> str:
        """Hash of the file, of what changes its samples, and of the samples found (images may be missing)."""
        found = hashlib.sha256(self._sample_line.tobytes() + self._sample_turn.tobytes()).hexdigest()
        content = f"mmdialog {self.lines.sha256} {self._rules.settings()} {found}"
        return hashlib.sha256(content.encode()).hexdigest()

    def _left_out(self) -> str:
        notes = [f"{count:,} {kind}" for kind, count in sorted(self.counts.items())]
        return ", ".join(notes + [f"{self._bad:,} unusable lines"] * bool(self._bad))

    def describe(self) -> str:
        kind = "training" if self._rules.training else "test"
        notes = f"; left out: {self._left_out()}" if self._left_out() else ""
        return (
            f"MMDialog {kind} ({self._rules.loader}): {len(self):,} samples of {self.rows:,} dialogues in "
            f"{self.lines.path}{notes}"
        )


def repeated_dialog(where: str, first: int) -> SampleError:
    """A line whose id line ``first`` has too."""
    return SampleError(where, f"conversation_id was used in line {first} already")


def parse_dialog(line: str, where: str, root: Path) -> Dialog:
    """Reads and checks one line; SampleError naming ``where`` and what breaks the form."""
    fields = Fields(where)
    value = fields.object(fields.json(line), "", ("conversation_id", "conversation"), optional=None)
    name = fields.integer(value["conversation_id"], "conversation_id")
    turns = fields.items(value["conversation"], "conversation")
    return Dialog(str(name), tuple(_turn(fields, turn, n, root) for n, turn in enumerate(turns)), where)


def _turn(fields: Fields, value: Any, number: int, root: Path) -> DialogTurn:
    place = f"turn {number}"
    parts = fields.items(fields.object(value, place, ("turn",), optional=None)["turn"], place)
    if not parts:
        raise fields.fail(place, "has no parts")
    texts, media = [], []
    for n, part in enumerate(parts):
        spot = f"{place}, part {n}"
        part = fields.object(part, spot, (), (TEXT, MEDIA))
        if len(part) != 1:
            raise fields.fail(
                spot, f"expected one of {TEXT} and {MEDIA}, found {' and '.join(part) or 'none'}"
            )
        if TEXT in part:
            texts.append(fields.plain(part[TEXT], spot))
        else:
            media.append(_media(fields, part[MEDIA], spot))
    if len(texts) > 1:
        raise fields.fail(place, f"has {len(texts)} texts")
    image = str(root / f"{media[0]}.jpg") if media else None
    return DialogTurn(texts[0] if texts else "", image, tuple(media))


def _media(fields: Fields, value: Any, place: str) -> str:
    """Id of an image, written as its file name is."""
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else fields.path(value, place)
    if "/" in name:
        raise fields.fail(place, f"image id {name!r} is no file name")
    return name
