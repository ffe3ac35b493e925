"""Samples of a dialogue with images, by both generations of the original's loader (fidelity 5.4).

Every turn but the first is a sample that reads a few turns before it.

Speakers follow from the number of a turn: even ones are the human's.  Turn ``i`` is written after reading
turn 0 (i = 1), the 2 turns before (i even) or the 3 turns before (i odd): whole exchanges, so that every
history opens with the human.  One turn that cannot be used ends the dialogue; what is left out is returned
as a :class:`Remark` and never silent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.templates import IMAGE, target_text

LOADERS = prompts.PROMPT_SETS
SPEAKERS = ("Human", "Assistant")
BAD_MEDIA_IDS = ("-3872362534310063124", "3713630103994725971")  # left out by the original (quirk Q28)


@dataclasses.dataclass(frozen=True, slots=True)
class DialogTurn:
    """What one side says: a text, and an image (path or encoded bytes) or none.

    ``media`` are the ids its file gives, of which the first is the image.
    """

    text: str
    image: ImageSource | None = None
    media: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Dialog:
    """Turns in order; ``where`` is the dialogue as a user finds it again."""

    id: str
    turns: tuple[DialogTurn, ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class Remark:
    """Something of a dialogue that is not used.

    Attributes:
      kind: why, in one of a few fixed phrases to count by.
      where: the dialogue.
      detail: the turn, and what was found there.
    """

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class DialogRules:
    """How dialogues become samples.

    Attributes:
      loader: ``head`` or ``release``, the original's two code generations.
      training: leave out what follows a long turn.
      max_tokens: tokens of a turn in training (``head``).
      max_words: words between white space of a turn in training (``release``).
      bad_media_ids: media that end a dialogue (``head``), as texts or numbers; kept as sorted texts.
      num_vokens: vokens of one image.

    Raises:
      DataError: an unknown loader.
    """

    loader: str = "head"
    training: bool = True
    max_tokens: int = 50
    max_words: int = 20
    bad_media_ids: Collection[str | int] = BAD_MEDIA_IDS
    num_vokens: int = 8

    def __post_init__(self):
        if self.loader not in LOADERS:
            raise DataError(f"unknown loader {self.loader!r}; known: {', '.join(LOADERS)}")
        object.__setattr__(self, "bad_media_ids", tuple(sorted(map(str, self.bad_media_ids))))

    def settings(self) -> tuple:
        """What samples depend on, for fingerprints."""
        return dataclasses.astuple(self)

    @property
    def counts_tokens(self) -> bool:
        """Whether :meth:`usable` needs ``count_tokens``."""
        return self.training and self.loader == "head"

    def check_counter(self, count_tokens: Callable[[str], int] | None) -> None:
        """DataError where ``count_tokens`` is needed and None."""
        if self.counts_tokens and count_tokens is None:
            raise DataError(f"training with loader {self.loader!r} leaves out long turns: give count_tokens=")

    def usable(
        self,
        dialog: Dialog,
        has_image: Callable[[ImageSource], bool],
        count_tokens: Callable[[str], int] | None = None,
    ) -> tuple[int, list[Remark]]:
        """How many turns from the first one on can be used, and what is left out.

        Args:
          has_image: whether an image is there.
          count_tokens: length of a text; needed where :attr:`counts_tokens`.
        """
        remarks = []

        def remark(kind: str, number: int, detail: str) -> None:
            remarks.append(Remark(kind, dialog.where, f"turn {number}: {detail}"))

        usable = len(dialog.turns)
        for number, turn in enumerate(dialog.turns):
            problem = self._problem(turn, has_image, count_tokens)
            if problem:
                remark(problem[0], number, f"{problem[1]}; the dialogue ends before it")
                usable = number
                break
            if len(turn.media) > 1:
                remark("further images of a turn", number, f"{len(turn.media)} images, the first is used")
        if len(dialog.turns) < 2:
            remark("fewer than two turns", 0, f"the dialogue has {len(dialog.turns)} turns")
        return usable, remarks

    def _problem(
        self,
        turn: DialogTurn,
        has_image: Callable[[ImageSource], bool],
        count_tokens: Callable[[str], int] | None,
    ) -> tuple[str, str] | None:
        """(kind, detail) of why a turn cannot be used, in the order the original looks."""
        if self.loader == "head":
            if not turn.text.strip():
                return "empty text", "no text"
            if turn.text.endswith(".jpg"):
                return "file name as text", f"the text {turn.text!r} is a file name"
            if self.training and (size := count_tokens(turn.text)) > self.max_tokens:
                return f"over {self.max_tokens} tokens", f"{size} tokens"
        elif self.training and (size := len(turn.text.split())) > self.max_words:
            return f"over {self.max_words} words", f"{size} words"
        if turn.image is not None:
            if self.loader == "head" and turn.media and turn.media[0] in self.bad_media_ids:
                return "bad image", f"image {turn.media[0]} is in the list of bad ones"
            if not has_image(turn.image):
                return "missing image", f"image {turn.media[0] if turn.media else ''} is missing"
        return None

    @staticmethod
    def history(turn: int) -> range:
        """Numbers of the turns that turn ``turn`` (1 or more) is written after."""
        return range(max(0, turn // 2 - 1) * 2, turn)

    def example(self, dialog: Dialog, turn: int) -> Example:
        """The sample that writes turn ``turn``, 1 or more."""
        before = [dialog.turns[number] for number in self.history(turn)]
        said = [
            (SPEAKERS[number % 2], one.text if one.image is None else f"{one.text} {IMAGE}")
            for number, one in zip(self.history(turn), before)
        ]
        now, system, speaker = dialog.turns[turn], prompts.DIALOG_SYSTEMS[self.loader], SPEAKERS[turn % 2]
        head = self.loader == "head"
        spell = prompts.dialog_source if head else prompts.dialog_source_release
        draws = now.image is not None
        return Example(
            source=spell(system, said, speaker),
            target=target_text(now.text, draws=draws, num_vokens=self.num_vokens),
            images=tuple(one.image for one in before if one.image is not None),
            target_image=now.image,
            caption=None,
            task="mmdialog",
            item_id=f"{dialog.id}_{turn}-mm" if head else f"mmdialog{dialog.id}_{turn}",
            where=dialog.where,
        )
