"""Samples of CC3M: a pair of caption and image, whatever file it lies in (fidelity 5.2).

The plain sample of row ``i``, ``cc3m_i``, reads the cleaned caption and writes the vokens.  In training,
rows 0, 100, 200, ... give a second sample, ``cc3m_i_instruction``, with a system prompt and one of seven
wordings.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.templates import clean_caption, target_text


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row: its number, the caption as written, the image (path or encoded bytes), its place."""

    row: int
    caption: str
    image: ImageSource
    where: str


@dataclasses.dataclass(frozen=True)
class PairRules:
    """How pairs become samples.

    Attributes:
      training: with instruction samples.
      instruction_every: rows from one instruction sample to the next in training; 0 for none.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      seed: of the wording.
      resample_prompts: draw the wording again each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one image.

    Raises:
      DataError: an unknown prompt set or a negative ``instruction_every``.
    """

    training: bool = True
    instruction_every: int = 100
    prompt_set: str = "head"
    seed: int = 0
    resample_prompts: bool = True
    num_vokens: int = 8

    def __post_init__(self):
        prompts.check_prompt_set(self.prompt_set)
        if not self.training:
            object.__setattr__(self, "instruction_every", 0)
        if self.instruction_every < 0:
            raise DataError(f"instruction_every must not be negative, got {self.instruction_every}")

    def settings(self) -> tuple:
        """What samples depend on, for fingerprints: ``training`` only changes ``instruction_every``."""
        return dataclasses.astuple(self)[1:]

    def count(self, rows: int) -> int:
        """Samples of the first ``rows`` rows."""
        return rows + (-(-rows // self.instruction_every) if self.instruction_every else 0)

    def kinds(self, row: int) -> tuple[bool, ...]:
        """The samples of a row in order: for each, whether it is the instruction sample."""
        return (False, True) if self.instruction_every and row % self.instruction_every == 0 else (False,)

    def find(self, index: int) -> tuple[int, bool]:
        """Row of a sample, and whether it is the instruction sample that follows the row's plain one."""
        if not self.instruction_every:
            return index, False
        block, place = divmod(index, self.instruction_every + 1)
        return block * self.instruction_every + max(0, place - 1), place == 1

    def texts(self, pair: Pair, instruction: bool) -> list[tuple[str, str]]:
        """(source, target) for every wording the sample may have; SampleError for an empty caption."""
        return self._texts(self._caption(pair), instruction)

    def _texts(self, caption: str, instruction: bool) -> list[tuple[str, str]]:
        target = target_text("", draws=True, num_vokens=self.num_vokens)
        if not instruction:
            return [(caption, target)]
        wordings = prompts.CC3M_PROMPTS[self.prompt_set]
        return [(prompts.cc3m_instruction(caption, wording), target) for wording in wordings]

    def example(self, pair: Pair, instruction: bool, epoch: int = 0) -> Example:
        """The plain or the instruction sample of a pair; SampleError for an empty caption."""
        caption = self._caption(pair)
        texts = self._texts(caption, instruction)
        key = (self.seed, epoch if self.resample_prompts else 0, pair.row)
        source, target = texts[np.random.default_rng(key).integers(len(texts)) if instruction else 0]
        return Example(
            source=source,
            target=target,
            images=(),
            target_image=pair.image,
            caption=caption,
            task="cc3m-instruction" if instruction else "cc3m",
            item_id=f"cc3m_{pair.row}_instruction" if instruction else f"cc3m_{pair.row}",
            where=pair.where,
        )

    def _caption(self, pair: Pair) -> str:
        caption = clean_caption(pair.caption)
        if not caption:
            raise SampleError(pair.where, "empty caption")
        return caption
