"""Answers while they are written: texts in pieces, images as they are drawn, rows that may be given up."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.inference.decode import FINISH_REASONS, DecodeState, advance, begin
from minigpt5_jax.inference.session import (
    Generation,
    Prompt,
    Session,
    _keys,
    _Row,
    draw_images,
)
from minigpt5_jax.models.mesh import spread

Drawer = Callable[..., jax.Array]
TURNS = 8
"""Ids that are written between two looks at what is there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A prompt that was read, and how it is to be answered.

    Attributes:
      row: from :meth:`StreamingSession.read`.
      guidance_scale: of its images.
      image_seed: of its images, where it is another one than that of the text.
      max_tokens: ids of the answer at most, an image counting as one; None for the session's bound.
    """

    row: _Row
    guidance_scale: float
    image_seed: int | None = None
    max_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""
        return len(self.row.expanded.tokens)

    @property
    def image_room(self) -> int:
        """Input images, rounded up to a power of two (0, 1, 2, 4, ...): one program serves several counts."""
        count = len(self.row.images)
        return 1 << (count - 1).bit_length() if count else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What was added to an answer.

    Attributes:
      row: whose.  part: which part of the answer it belongs to.
      text: more of a text, or None.
      image: u8[H W 3], or None.  Without text and image: an image was begun.
    """

    row: int
    part: int
    text: str | None = None
    image: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """An answer that is complete.

    Attributes:
      row: whose.  answer: all of it.
      reason: one of ``FINISH_REASONS``; ``length`` where ``max_tokens`` ended it.
    """

    row: int
    answer: Generation
    reason: str


@dataclasses.dataclass
class _Progress:
    """What is there of an answer, and what was told of it."""

    asked: Asked
    ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str = ""  # none yet
    told: list[str | None] = dataclasses.field(default_factory=list)  # of each part; None for an image

    def take(self, ids: list[int], reason: str) -> None:
        """All ids so far, and why there will be no more."""
        bound = self.asked.max_tokens
        cut = bound is not None and (len(ids) > bound or (len(ids) == bound and not reason))
        self.ids, self.finish_reason = (ids[:bound], "length") if cut else (ids, reason)


class StreamingSession(Session):
    """A session whose answers can be followed.

    Every batch has ``batch_size`` rows of ``max_length`` positions, so that one program serves all prompts
    and an answer is the same in whatever company it is made.
    """

    def __init__(self, *given: Any, **settings: Any):
        super().__init__(*given, **settings)
        self._begin = jax.jit(self._begin_rows)
        self._go_on = jax.jit(self._advance_rows, donate_argnums=1)

    def read(self, prompt: Prompt) -> _Row:
        """A prompt, checked and in numbers; nothing is compiled, and any thread may call it.

        Raises:
          DataError: as :meth:`generate`.
        """
        return self._read(0, prompt)

    def drawer(self, sampler: Sampler | None = None) -> Drawer:
        """What draws the images of :meth:`stream`, compiled at its first use.

        It serves every session of the same model and ``batch_size``.  ``sampler``: by default the session's.
        """
        return jax.jit(functools.partial(self._draw_guided, sampler or self._sampler))

    def stream(
        self,
        asked: Sequence[Asked],
        drawer: Drawer,
        wanted: Callable[[int], bool] = lambda row: True,
    ) -> Iterator[Piece | Finished]:
        """Pieces of answers as they are made, and each answer when it is complete.

        Args:
          asked: ``batch_size`` prompts at most, of one ``image_room``.
          drawer: of images.
          wanted: whether a row is still waited for.  It is asked between pieces of work; nothing more is told
            of a row that is not, and a batch that nobody waits for ends.
        """
        followed = [_Progress(one) for one in asked]
        rows = self._padded([one.row for one in asked])
        state, seeds = self._start(rows, asked[0].image_room), np.uint32([row.prompt.seed for row in rows])
        while writing := [
            (row, one) for row, one in enumerate(followed) if wanted(row) and not one.finish_reason
        ]:
            state = self._go_on(self._params, state, seeds)
            done, tokens = np.asarray(state.done), np.asarray(state.result.tokens)
            lengths, reasons = np.asarray(state.result.lengths), np.asarray(state.result.finish_reason)
            for row, one in writing:
                reason = FINISH_REASONS[reasons[row]] if done[row] else ""
                one.take(tokens[row, : lengths[row]].tolist(), reason)
                yield from self._tell(row, one)
        yield from self._draw_all(followed, np.asarray(state.result.voken_states), drawer, wanted)

    def warm_up(self, prompt: Prompt, drawer: Drawer) -> None:
        """Compile what a first answer and its image need."""
        asked = Asked(self.read(prompt), self._guidance, max_tokens=1)
        rows = self._padded([asked.row])
        state = self._go_on(self._params, self._start(rows, asked.image_room), np.zeros(len(rows), np.uint32))
        states = np.asarray(state.result.voken_states)
        self._draw_some([_Progress(asked)], [(0, 0)], np.zeros_like(states), drawer)

    # -- compiled -------------------------------------------------------------------------------

    def _begin_rows(self, params, tokens, lengths, images, image_row, image_start) -> DecodeState:
        model = self._template.bind(params)
        embeds = spread(model.backbone.prompt(tokens, images, image_row, image_start), "rows")
        return begin(
            model.backbone.decoder, embeds, lengths, self.sampling, num_vokens=model.backbone.num_vokens
        )

    def _advance_rows(self, params, state, seeds) -> DecodeState:
        model = self._template.bind(params)
        return advance(
            model.backbone.decoder,
            state,
            jax.vmap(lambda seed: _keys(seed)[0])(seeds),
            self.sampling,
            first_voken_id=model.first_voken_id,
            num_vokens=model.backbone.num_vokens,
            turns=TURNS,
        )

    def _draw_guided(self, sampler, params, vokens, seeds, numbers, guidance) -> jax.Array:
        return draw_images(self._template, sampler, guidance, self._negative, params, vokens, seeds, numbers)

    # -- on the host ----------------------------------------------------------------------------

    def _start(self, rows: list[_Row], image_room: int) -> DecodeState:
        """Prompts, fed."""
        tokens, lengths = self._place_tokens(rows, self.max_length)
        return self._run(self._begin, tokens, lengths, *self._place_input_images(rows, image_room))

    def _images_of(self, one: _Progress) -> int:
        return one.ids.count(self.tokenizer.first_voken_id)

    def _parts(self, one: _Progress, images: Iterator[Any]) -> Generation:
        return self._assemble(one.asked.row, one.ids, self._images_of(one), images)

    def _tell(self, row: int, one: _Progress) -> Iterator[Piece | Finished]:
        """What is new in an answer."""
        parts = self._parts(one, itertools.repeat(None)).parts
        for number, part in enumerate(parts):
            if part is None:
                if number == len(one.told):
                    one.told.append(None)
                    yield Piece(row, number)
                continue
            final = one.finish_reason or number < len(parts) - 1
            text = part if final else self._settled(part)
            before = one.told[number] if number < len(one.told) else ""
            if len(text) > len(before) and text.startswith(before):
                one.told[number:] = [text]
                yield Piece(row, number, text=text[len(before) :])
        if one.finish_reason and not self._images_of(one):
            yield Finished(row, self._parts(one, iter(())), one.finish_reason)

    def _settled(self, text: str) -> str:
        """As much of an unfinished text as further ids cannot change: no half letter, no half ``###``."""
        end = self.style.end
        for length in range(len(end) - 1, 0, -1):
            text = text.removesuffix(end[:length])
        return text.rstrip("\ufffd").rstrip()

    def _draw_all(
        self,
        followed: list[_Progress],
        states: np.ndarray,
        drawer: Drawer,
        wanted: Callable[[int], bool],
    ) -> Iterator[Piece | Finished]:
        """Images of all answers, and each answer with its last one."""
        images: list[list[np.ndarray]] = [[] for _ in followed]
        todo = [(row, number) for row, one in enumerate(followed) for number in range(self._images_of(one))]
        while todo := [(row, number) for row, number in todo if wanted(row)]:
            some, todo = todo[: self.batch_size], todo[self.batch_size :]
            for (row, number), image in zip(some, self._draw_some(followed, some, states, drawer)):
                one = followed[row]
                images[row].append(image)
                places = [part for part, text in enumerate(one.told) if text is None]
                yield Piece(row, places[number], image=image)
                if len(images[row]) == len(places):
                    yield Finished(row, self._parts(one, iter(images[row])), one.finish_reason)

    def _draw_some(
        self, followed: list[_Progress], some: list[tuple[int, int]], states: np.ndarray, drawer: Drawer
    ) -> list[np.ndarray]:
        """Images of (row, number in its answer)."""
        padded = self._padded(some)
        asked = [followed[row].asked for row, _ in padded]
        seeds = np.uint32(
            [one.row.prompt.seed if one.image_seed is None else one.image_seed for one in asked]
        )
        numbers, guidance = np.int32([number for _, number in padded]), [one.guidance_scale for one in asked]
        vokens = np.stack([states[place] for place in padded])
        return list(np.asarray(self._run(drawer, vokens, seeds, numbers, np.float32(guidance)))[: len(some)])
