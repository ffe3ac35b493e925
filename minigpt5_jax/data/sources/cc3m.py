"""CC3M: pairs of caption and picture (reference 5.2)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from minigpt5_jax.data import prompts
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.example import Example
from minigpt5_jax.data.sources.base import TextLines
from minigpt5_jax.data.templates import clean_caption, target_text


class Cc3mSource:
    """Pairs of caption and picture from a tab-separated table (reference 5.2).

    The table has a header naming at least ``caption`` and ``image_path``; other columns are ignored.
    The source of sample ``cc3m_i`` is its cleaned caption and its target the vokens.  In training, rows
    0, 100, 200, ... give a second sample, ``cc3m_i_instruction``, with a system prompt and one of seven
    wordings.

    Args:
      tsv: the table.
      image_root: folder that ``image_path`` is relative to; default: the table's folder.
      training: with instruction samples.
      instruction_every: rows from one instruction sample to the next; 0 for none.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      seed: of the wording.
      resample_prompts: draw the wording anew each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one picture.

    Raises:
      DataError: the table or the folder is missing, not UTF-8, empty, or lacks a column.
    """

    def __init__(
        self,
        tsv: str | Path,
        image_root: str | Path | None = None,
        *,
        training: bool = True,
        instruction_every: int = 100,
        prompt_set: str = "head",
        seed: int = 0,
        resample_prompts: bool = True,
        num_vokens: int = 8,
    ):
        self._lines = TextLines(tsv)
        self._image_root = Path(tsv).parent if image_root is None else Path(image_root)
        if not self._image_root.is_dir():
            raise DataError(f"image folder not found: {self._image_root}")
        if prompt_set not in prompts.CC3M_PROMPTS:
            known = ", ".join(prompts.CC3M_PROMPTS)
            raise DataError(f"unknown prompt_set {prompt_set!r}; known: {known}")
        header = self._lines[0].split("\t")
        missing = [name for name in ("caption", "image_path") if name not in header]
        if missing:
            raise DataError(
                f"{self._lines.where(0)}: no column {' and '.join(missing)}; columns found: {header}. The "
                "first line must name caption and image_path, separated by a tab"
            )
        self._columns = len(header)
        self._caption, self._path = header.index("caption"), header.index("image_path")
        self._rows = len(self._lines) - 1
        if not self._rows:
            raise DataError(f"{self._lines.path} has a header and no rows")
        if instruction_every < 0:
            raise DataError(f"instruction_every must not be negative, got {instruction_every}")
        self._training, self._every = training, instruction_every if training else 0
        self._prompt_set, self._seed = prompt_set, seed
        self._resample, self._num_vokens = resample_prompts, num_vokens

    def __len__(self) -> int:
        return self._rows + (-(-self._rows // self._every) if self._every else 0)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def _row(self, index: int) -> tuple[int, bool]:
        """Row of a sample and whether it is the instruction sample that follows the row's plain one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if not self._every:
            return index, False
        block, place = divmod(index, self._every + 1)
        return block * self._every + max(0, place - 1), place == 1

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError for a row with too few columns or an empty caption."""
        row, is_instruction = self._row(index)
        where = self._lines.where(row + 1)
        cells = self._lines[row + 1].split("\t")
        if len(cells) != self._columns:
            raise SampleError(where, f"{len(cells)} tab-separated cells, the header has {self._columns}")
        caption, path = clean_caption(cells[self._caption]), cells[self._path].strip()
        if not caption:
            raise SampleError(where, "empty caption")
        if not path:
            raise SampleError(where, "empty image_path")
        source = caption
        if is_instruction:
            wordings = prompts.CC3M_PROMPTS[self._prompt_set]
            key = (self._seed, epoch if self._resample else 0, row)
            wording = wordings[np.random.default_rng(key).integers(len(wordings))]
            source = prompts.cc3m_instruction(caption, wording)
        return Example(
            source=source,
            target=target_text("", draws=True, num_vokens=self._num_vokens),
            images=(),
            target_image=str(self._image_root / path),
            caption=caption,
            task="cc3m-instruction" if is_instruction else "cc3m",
            item_id=f"cc3m_{row}_instruction" if is_instruction else f"cc3m_{row}",
            where=where,
        )

    def fingerprint(self) -> str:
        """Hash of the table and of everything that changes the samples made of it."""
        settings = (self._every, self._prompt_set, self._seed, self._resample, self._num_vokens)
        return hashlib.sha256(f"cc3m {self._lines.sha256} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._training else "test"
        return f"CC3M {kind}: {len(self):,} samples of {self._rows:,} rows in {self._lines.path}"
