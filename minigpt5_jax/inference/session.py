"""Prompts in, interleaved text and images out, on a model that stays compiled (fidelity 6.1-6.3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, UInt8, UInt32

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import ImageSource, prepare_image
from minigpt5_jax.data.text.prompts import VICUNA_V0, PromptStyle
from minigpt5_jax.data.text.templates import TokenizedSample, expand
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN, SPECIAL_PATTERN, LanguageTokenizer
from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.inference.decode import DecodeResult, decode
from minigpt5_jax.inference.images import initial_latents, negative_condition, sample_images
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.mesh import SHARD_AXES, spread

LENGTH_BUCKET = 32  # prompts are padded to a multiple of it, so that few programs are compiled
CFG_NEGATIVES = ("voken_zero", "empty_prompt")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to answer.

    Attributes:
      source: text as the model reads it, ``<ImageHere>`` once for each of ``images``
        (:mod:`minigpt5_jax.data.text.templates` writes it).
      images: input images, paths or encoded bytes.
      seed: of this answer's draws, 0 ... 2**32 - 1; the answer depends on nothing else in the batch.
      typed: what a user typed, where ``source`` was made of it; for showing, the model does not read it.
    """

    source: str
    images: tuple[ImageSource, ...] = ()
    seed: int = 0
    typed: str = ""


def mixed_seed(*numbers: int) -> int:
    """A seed that is a function of several numbers, such as a run's seed and the number of a prompt."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """An answer.

    Attributes:
      parts: text and images u8[H W 3] in the order they were written; text without its ``###``.
      text: the text parts joined.
      token_ids: everything drawn, ``[IMG0]`` standing for an image, the end included.
      source, seed: of the prompt.
      dropped: positions of the prompt that were cut off to fit (the oldest ones).
    """

    parts: tuple[str | np.ndarray, ...]
    text: str
    token_ids: tuple[int, ...]
    source: str
    seed: int
    dropped: int = 0

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The image parts."""
        return tuple(part for part in self.parts if not isinstance(part, str))


def stop_sequences(tokenizer: LanguageTokenizer, end: str = VICUNA_V0.end) -> tuple[tuple[int, ...], ...]:
    """Every way this tokenizer spells the ``end`` of a text: on its own, and glued to a word.

    ``((835,), (2277, 29937))`` for stock LLaMA, as in the original (Q37).
    """
    found = {tuple(tokenizer.encode(end)): None}  # a dict keeps their order
    for word in ("a", "."):
        before, whole = tokenizer.encode(word), tokenizer.encode(word + end)
        if whole[: len(before)] == before:
            found[tuple(whole[len(before) :])] = None
    return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """A prompt in numbers."""

    prompt: Prompt
    expanded: TokenizedSample
    images: list[np.ndarray]  # those left after truncation


def mesh_of(params: Mapping[str, Any]) -> jax.sharding.Mesh | None:
    """The mesh of several devices that parameters lie on; None for one device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(dict(params)))
    found = next((p.mesh for p in places if isinstance(p, jax.sharding.NamedSharding)), None)
    return found if found is not None and found.size > 1 else None


def write_rows(
    template: Template,
    sampling: SamplingConfig,
    params: Mapping[str, Any],
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    images: UInt8[Array, "i H W 3"],
    image_row: Int[Array, " i"],
    image_start: Int[Array, " i"],
    seeds: UInt32[Array, " b"],
) -> DecodeResult:
    """Answers to prompts, padded on the right; ``image_row`` b is no row.  Compile it with ``jax.jit``."""
    model = template.bind(params)
    embeds = model.backbone.prompt(tokens, images, image_row, image_start)
    keys = jax.vmap(lambda seed: _keys(seed)[0])(seeds)
    result = decode(
        model.backbone.decoder,
        spread(embeds, "rows"),
        lengths,
        keys,
        sampling,
        first_voken_id=model.first_voken_id,
        num_vokens=model.backbone.num_vokens,
    )
    return jax.tree.map(lambda x: spread(x, "rows"), result)


def draw_images(
    template: Template,
    sampler: Sampler,
    guidance_scale: float | Float[Array, " m"],
    cfg_negative: str,
    params: Mapping[str, Any],
    vokens: Float[Array, "m n d"],
    seeds: UInt32[Array, " m"],
    numbers: Int[Array, " m"],
) -> UInt8[Array, "m H W 3"]:
    """Images of voken states, by their answers' seeds and numbers in these.  Compile it with ``jax.jit``."""
    model = template.bind(params)
    negative = negative_condition(model, cfg_negative)
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(_keys(seed)[1], number))(seeds, numbers)
    latents = spread(initial_latents(keys, model.generator.latent_shape), "items")
    condition = model.condition(vokens)
    images = sample_images(model.generator, sampler, condition, negative, latents, guidance_scale)
    return spread(images, "items")


class Session:
    """A model ready to answer.

    The two compiled functions (text; images) are kept, one per padded prompt length, so a second
    call costs no compilation.  Where ``params`` lie on a mesh, rows are spread over its ``data`` and ``fsdp``
    axes and images over all of it; answers are the same.

    Args:
      template: abstract composite.  params: all of its parameters.
      tokenizer: of the language model.
      style: how the language model is spoken to.
      sampling: rules for text; None takes the defaults with this tokenizer's :func:`stop_sequences`.
      sampler: of images (:func:`minigpt5_jax.diffusion.samplers.make_sampler`).
      guidance_scale: of images.
      cfg_negative: what images are guided away from, ``voken_zero`` for T(0) or ``empty_prompt`` (Q38).
      max_length: positions of a prompt at most; of a longer one the oldest are dropped, with a warning.
      batch_size: answers, and images, made together; a smaller rest is padded to it.  On a mesh it is raised
        to a multiple of the places that rows are spread over.
      pad_input_square: pad input images to a square instead of cropping them.
      images_as_shown: turn input images by EXIF and put transparent ones on white; False as the original.

    Raises:
      ValueError: a setting is out of range.
    """

    style: PromptStyle = VICUNA_V0

    def __init__(
        self,
        template: Template,
        params: Mapping[str, Any],
        tokenizer: LanguageTokenizer,
        *,
        sampler: Sampler,
        style: PromptStyle = VICUNA_V0,
        sampling: SamplingConfig | None = None,
        guidance_scale: float = 7.5,
        cfg_negative: str = "voken_zero",
        max_length: int = 512,
        batch_size: int = 4,
        pad_input_square: bool = False,
        images_as_shown: bool = True,
    ):
        if cfg_negative not in CFG_NEGATIVES:
            raise ValueError(f"cfg_negative={cfg_negative!r} is none of {', '.join(CFG_NEGATIVES)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.tokenizer, self.max_length = tokenizer, max_length
        self._mesh = mesh_of(params)
        shards = 1 if self._mesh is None else math.prod(self._mesh.shape[axis] for axis in SHARD_AXES)
        self.batch_size = -(-batch_size // shards) * shards
        self.style = style
        self.sampling = sampling or SamplingConfig(stop_sequences=stop_sequences(tokenizer, style.end))
        self.pad_input_square, self.images_as_shown = pad_input_square, images_as_shown
        self._template, self._params = template, params
        self._sampler, self._guidance, self._negative = sampler, guidance_scale, cfg_negative
        self._backbone = template.bind(template.shapes).backbone  # abstract: for its sizes
        if self._backbone.vocab_size != tokenizer.first_voken_id:
            raise ValueError(
                f"the tokenizer has {tokenizer.first_voken_id} ids before [IMG0], "
                f"the language model {self._backbone.vocab_size}"
            )
        room = self.sampling.max_new_tokens + self.sampling.max_images * (tokenizer.num_vokens - 1)
        if max_length + room > self._backbone.max_positions:
            raise ValueError(
                f"a prompt of max_length={max_length} and an answer of {room} positions (max_new_tokens="
                f"{self.sampling.max_new_tokens}, {self.sampling.max_images} images) exceed the language "
                f"model's {self._backbone.max_positions} positions; lower one of them"
            )
        self._write = jax.jit(self._write_rows)
        self._draw = jax.jit(self._draw_images)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        images: bool = True,
        report: Callable[[str], None] = lambda line: None,
    ) -> list[Generation]:
        """An answer to each prompt.  All of them are checked before anything is compiled.

        Args:
          images: False samples none: one that was started leaves ``[IMG0]`` in ``token_ids`` and no part.
          report: called with a line about each stage of the work and its progress.

        Raises:
          DataError: an empty prompt, vokens in it, images that do not fit its placeholders or that
            the backbone cannot see, an image that cannot be read; naming the prompt.
        """
        rows = [self._read(number, prompt) for number, prompt in enumerate(prompts)]
        answers: list[tuple[list[int], list[np.ndarray]]] = []
        for some in self._batches(rows):
            answers += self._answer(some)
            report(f"texts: {len(answers)} of {len(rows)}")
        answers = answers if images else [(ids, []) for ids, _ in answers]
        wanted = [
            (states, row.prompt.seed, number)
            for row, (_, started) in zip(rows, answers)
            for number, states in enumerate(started)
        ]
        drawn = iter(self.draw(*map(list, zip(*wanted)), report=report) if wanted else ())
        return [self._assemble(row, ids, len(started), drawn) for row, (ids, started) in zip(rows, answers)]

    def draw(
        self,
        vokens: Sequence[np.ndarray],
        seeds: Sequence[int],
        numbers: Sequence[int],
        *,
        report: Callable[[str], None] = lambda line: None,
    ) -> list[np.ndarray]:
        """Images u8[H W 3] from voken states f32[n d] each.

        Args:
          vokens: mapper input of each image.
          seeds: seed of the answer it belongs to.  numbers: which image of that answer it is.
          report: as for :meth:`generate`.
        """
        images: list[np.ndarray] = []
        for some in self._batches(list(zip(vokens, seeds, numbers))):
            states, seed, number = zip(*self._padded(some))
            made = self._run(self._draw, np.stack(states), np.uint32(seed), np.int32(number))
            images.extend(np.asarray(made)[: len(some)])
            report(f"images: {len(images)} of {len(vokens)}")
        return images

    # -- compiled -------------------------------------------------------------------------------

    def _write_rows(self, params, *inputs) -> DecodeResult:
        return write_rows(self._template, self.sampling, params, *inputs)

    def _draw_images(self, params, *inputs) -> jax.Array:
        settings = (self._sampler, self._guidance, self._negative)
        return draw_images(self._template, *settings, params, *inputs)

    def _run(self, compiled: Callable[..., Any], *arrays: np.ndarray) -> Any:
        """``compiled(params, *arrays)``, the arrays' rows spread over the mesh if there is one."""
        if self._mesh is None:
            return compiled(self._params, *arrays)
        place = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(SHARD_AXES))
        with jax.set_mesh(self._mesh):
            return compiled(self._params, *(jax.device_put(array, place) for array in arrays))

    # -- on the host ----------------------------------------------------------------------------

    def _read(self, number: int, prompt: Prompt) -> _Row:
        """Check and tokenise a prompt, read its images."""

        def refuse(reason: str) -> DataError:
            return DataError(f"prompt {number + 1}: {reason}")

        if not prompt.source.strip():
            raise refuse("is empty")
        if not 0 <= prompt.seed < 2**32:
            raise refuse(f"seed {prompt.seed} is not in 0 ... 2**32 - 1")
        special = set(SPECIAL_PATTERN.findall(prompt.source)) - {IMAGE_TOKEN}
        if special:
            raise refuse(f"contains {min(special)}; vokens mean nothing in a prompt")
        places = prompt.source.count(IMAGE_TOKEN)
        if places != len(prompt.images):
            raise refuse(f"has {places} {IMAGE_TOKEN} for {len(prompt.images)} images")
        if places and not self._backbone.image_tokens:
            raise refuse("has images, but this model has no vision tower")
        expanded = expand(
            self.tokenizer,
            prompt.source,
            "",
            image_tokens=self._backbone.image_tokens,
            max_length=self.max_length,
        )
        if expanded.dropped:
            logging.warning(
                "prompt %d: its first %d positions are dropped, %d fit (max_length)",
                number + 1,
                expanded.dropped,
                self.max_length,
            )
        size, square = self._backbone.image_size, self.pad_input_square
        settings = {"square": square, "flip": False, "as_shown": self.images_as_shown}
        images = [prepare_image(p, size, **settings) for p in prompt.images]
        return _Row(prompt, expanded, [images[i] for i in expanded.images])

    def _answer(self, rows: list[_Row]) -> list[tuple[list[int], list[np.ndarray]]]:
        """(ids, voken states of each image) of at most ``batch_size`` prompts."""
        batch = self._padded(rows)
        longest = max(len(row.expanded.tokens) for row in batch)
        tokens, lengths = self._place_tokens(batch, longest)
        seeds = np.uint32([row.prompt.seed for row in batch])
        result = self._run(self._write, tokens, lengths, *self._place_input_images(batch), seeds)
        result = jax.tree.map(np.asarray, result)
        return [
            (
                result.tokens[i, : result.lengths[i]].tolist(),
                [*result.voken_states[i, : result.num_images[i]]],
            )
            for i in range(len(rows))
        ]

    def _place_tokens(self, batch: list[_Row], longest: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, padded to the bucket of ``longest``; how many each row has)."""
        tokens = np.full(
            (len(batch), -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET), self.tokenizer.pad_id, np.int32
        )
        for place, row in enumerate(batch):
            tokens[place, : len(row.expanded.tokens)] = row.expanded.tokens
        return tokens, np.int32([len(row.expanded.tokens) for row in batch])

    def _place_input_images(
        self, batch: list[_Row], each: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(images, their rows, their first slots); room for ``each`` a row, by default the most of any."""
        size = self._backbone.image_size
        room = len(batch) * (max(len(row.images) for row in batch) if each is None else each)
        images = np.zeros((room, size, size, 3), np.uint8)
        image_row, image_start = np.full(room, len(batch), np.int32), np.zeros(room, np.int32)
        every = [
            (image, place, start)
            for place, row in enumerate(batch)
            for image, start in zip(row.images, row.expanded.image_start)
        ]
        for slot, (image, place, start) in enumerate(every):
            images[slot], image_row[slot], image_start[slot] = image, place, start
        return images, image_row, image_start

    def _assemble(self, row: _Row, ids: list[int], drawn: int, images: Any) -> Generation:
        """Text and images in the order of ``ids``."""
        parts: list[str | np.ndarray] = []
        chunk: list[int] = []
        written = ids if self.sampling.dummy_token_id is None else ids[1:]

        def flush() -> None:
            if text := self._clean(chunk):
                parts.append(text)
            chunk.clear()

        for token in written:
            if token == self.tokenizer.first_voken_id and drawn:
                flush()
                parts.append(next(images))
                drawn -= 1
            else:
                chunk.append(token)
        flush()
        text = " ".join(part for part in parts if isinstance(part, str))
        prompt = row.prompt
        return Generation(tuple(parts), text, tuple(ids), prompt.source, prompt.seed, row.expanded.dropped)

    def _clean(self, ids: list[int]) -> str:
        """Text of ids without control tokens, stray vokens and the ``###`` of its end."""
        ends = {self.tokenizer.bos_id, self.tokenizer.eos_id, *self.sampling.eos_ids}
        text = self.tokenizer.decode([i for i in ids if i not in ends])
        return SPECIAL_PATTERN.sub("", text).replace(self.style.end, "").strip()

    def _batches(self, rows: list[Any]) -> list[list[Any]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _padded(self, rows: list[Any]) -> list[Any]:
        """``batch_size`` rows: the last one stands for those that are missing, at no extra step."""
        return rows + [rows[-1]] * (self.batch_size - len(rows))


def _keys(seed: jax.Array) -> jax.Array:
    """(key of the text, key of the images) of an answer."""
    return jax.random.split(jax.random.key(seed))
