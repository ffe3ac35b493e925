"""The contracts a model is put together from, and the record by which a part tells everything else.

A backbone, a mapper or a generator is one file: the NNX module that wires its towers behind one of the three
protocols here, and ``PART``, which says all that the rest of the program must know of it: its configuration
keys, files, tokenizer, trainable parameters, shardings and exports.  Nothing outside of ``models/`` and
``parts/`` names a tower.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # configurations are read without JAX
    import jax

    from minigpt5_jax.batch import Batch

KINDS = ("backbone", "mapper", "generator")
FROZEN = "frozen"
"""Learning-rate group of what does not train."""
SMALL, STAGE2, PREFIX, INT8 = "small", "stage2", "prefix", "int8"
"""Names of settings that a part may have: in the small world, in stage 2, with prefix tuning, and with its
largest frozen tower in 8 bits."""
QUANTIZATION = "_quantization"
"""Behind the name of a tower: the key of its part that says how its frozen kernels are stored, ``none`` or
one of :data:`minigpt5_jax.weights.quantization.METHODS`."""


@runtime_checkable
class Backbone(Protocol):
    """Text and images -> hidden states: a language model that sees.

    Attributes:
      hidden_size: width of its hidden states.
      vocab_size: rows V of the frozen vocabulary; voken ids are V ... V + num_vokens - 1 and the image
        placeholder is V + num_vokens.
      num_vokens: generative vokens of an image.
      image_tokens: slots that one input image takes in the sequence (0: it cannot see).
      image_size: side of an input image in pixels.
      max_positions: positions of a sequence that the language model was made for.
      position_axes: numbers that say where a token is: 1, or 3 for a rotary embedding over time and image.
      uses_dropout: whether training needs ``dropout_keys``.
      voken_state_shift: 1 where the mapper reads the states that predict the vokens, as the original and as
        decoding gives them; 0 for the states on them (Q2).
      decoder: the language model with a cache (:class:`minigpt5_jax.inference.decode.CachedModel`).
    """

    hidden_size: int
    vocab_size: int
    num_vokens: int
    image_tokens: int
    image_size: int
    max_positions: int
    position_axes: int
    uses_dropout: bool
    voken_state_shift: int
    decoder: Any

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with image features in their slots, f32[b t d]."""

    def hidden(self, embeds: jax.Array, batch: Batch, dropout_keys: jax.Array | None) -> jax.Array:
        """Final-layer hidden states [b t d]; ``dropout_keys`` (key[b]) switches LoRA dropout on."""

    def logit_blocks(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the frozen vocabulary and of the new rows, f32[... V] and f32[... n]."""

    def voken_rows(self) -> jax.Array:
        """Embeddings of the vokens, f32[n d]."""

    def image_states(self, images: jax.Array) -> jax.Array:
        """u8[i H W 3] -> states [i q c] that may be precomputed, as the towers that make them are frozen."""

    def prompt(
        self, tokens: jax.Array, images: jax.Array, image_row: jax.Array, image_start: jax.Array
    ) -> jax.Array:
        """Embeddings of prompts, f32[b t d], with the features of ``images`` from ``image_start`` on.

        An image whose row is b is left out.
        """


@runtime_checkable
class Mapper(Protocol):
    """Voken states [n m d] -> condition of the generator [n q c]."""

    def __call__(self, vokens: jax.Array) -> jax.Array: ...


@runtime_checkable
class Generator(Protocol):
    """Condition -> loss against an image, or an image.

    Attributes:
      image_size: side of its images in pixels.
      latent_shape: (h, w, c) of its latents.
      condition_shape: (q, c) of the condition that it listens to.
      num_train_timesteps: timesteps are drawn from 0 ... num_train_timesteps - 1.
    """

    image_size: int
    latent_shape: tuple[int, int, int]
    condition_shape: tuple[int, int]
    num_train_timesteps: int

    def moments(self, images: jax.Array) -> jax.Array:
        """u8[m H W 3] -> moments of the posterior over latents, f32[m h w 2c]; may be precomputed."""

    def latents(self, moments: jax.Array, posterior_noise: jax.Array) -> jax.Array:
        """Moments -> scaled latents f32[m h w c], one posterior sample per image."""

    def caption_features(self, caption_ids: jax.Array, caption_mask: jax.Array) -> jax.Array:
        """Text features of captions, [m q c]: the target of the caption loss."""

    def empty_caption_features(self) -> jax.Array:
        """Text features of the empty string, [q c]: the caption target of a CFG-dropped item."""

    def empty_prompt_features(self) -> jax.Array:
        """Condition of the empty prompt as the generator was trained with it, [q c]."""

    def denoising_loss(
        self, latents: jax.Array, condition: jax.Array, timesteps: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Weighted denoising error of each item, f32[m]."""

    def denoiser(self, condition: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """``(latents, timestep i32[]) -> prediction`` under a condition, for this generator's samplers."""

    def make_sampler(self, name: str, num_inference_steps: int) -> Any:
        """The sampler called ``name`` (:class:`minigpt5_jax.diffusion.samplers.Sampler`)."""

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images u8[m H W 3]."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
      default: its value; None for "not set", with the type in ``kind``.
      why: what it does and why it has this default, one line.
      choices: allowed values; empty for any.
      low, high: closed bounds of a number.
      kind: type of the value where the default is None.
      path: whether it is a path (or may be one), whose ``~`` is replaced when a configuration enters.
        Folders of caches are none: their home is that of whoever runs it.
    """

    default: Any
    why: str
    choices: tuple[Any, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    kind: type | None = None
    path: bool = False

    def initial(self) -> Any:
        """The default as a ConfigDict holds it: a typed placeholder where there is none."""
        from ml_collections.config_dict import placeholder

        return placeholder(self.kind) if self.default is None else self.default


@dataclasses.dataclass(frozen=True)
class Origin:
    """A published set of files.

    Attributes:
      title: what it is.  files: names there.  gigabytes: to be downloaded, of 10^9 bytes.
      licence: terms in a line.
      repos: Hugging Face repositories that have it, the first home first; withdrawn ones are not listed.
      include: patterns of the files wanted from such a repository.
      elsewhere: where it is published otherwise.
      within: Hugging Face repository of a larger model that holds it; ``convert`` takes its folder.
      command: the ``convert`` command that reads it, and the ``weights`` key that takes the result.
      convert: what the command does, ``(source, output folder, ConvertOptions) -> coverages``.
    """

    title: str
    files: tuple[str, ...]
    gigabytes: float
    licence: str
    repos: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    elsewhere: str = ""
    within: str = ""
    command: str = ""
    convert: Callable[[Path, Path, ConvertOptions], list[Any]] | None = None

    def fetch(self, folder: str) -> str:
        """The command that downloads it into ``folder``, or where to look."""
        if not self.repos:
            return f"{self.elsewhere}: put {', '.join(self.files)} into {folder}/"
        patterns = "".join(f" '{pattern}'" for pattern in self.include)
        wanted = f" --include{patterns}" if patterns else ""
        return f"hf download {self.repos[0]}{wanted} --local-dir {folder}"


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Options of the ``convert`` command.

    Attributes:
      sizes: ``config.json`` (or folder) with sizes other than MiniGPT-5's, or ``source``: that of the source.
      keep_rows: keep rows of a language model that its tokenizer has no entry for.
      tokenizer: folder of the tokenizer that a single-file checkpoint lacks.
    """

    sizes: str | None = None
    keep_rows: bool = False
    tokenizer: str | None = None


@dataclasses.dataclass(frozen=True)
class Use:
    """Files that a part is made of, under a name below ``config.weights``.

    Attributes:
      why: the line of its configuration key.  get: what to get where it is missing.
      origin: where it is published.
      packaged: its path below the small world's assets.
      tower: the architecture; None for files that are none (a tokenizer).
      at: where its parameters go, below the part; '' for directly below.
      only: starts of the paths below ``at`` that it fills; all of them by default.
      new: marks of paths below ``at`` that no file has (rows of new tokens, LoRA).
      sizes: sizes that follow from those of other towers (name -> sizes); by default they are chosen by
        ``model.<kind>.<name>``, a preset or ``source``.
      needed: whether a configuration (the part's keys) uses it.
      group: the key under ``weights`` of a folder that holds it.  subfolder: its place there.
      beside: name of the files beside which it lies by default.
      file: the file that is meant where a folder is given.
      stock: SHA-256 of a published file -> what it is.
      check: refuses a ``config.json`` (its values, its path) that fits in size but is of another model.
      refuse: refuses a source, whatever its sizes, that holds what a run adds to it.
    """

    why: str
    get: str
    origin: Origin
    packaged: str
    tower: Any = None
    at: str = ""
    only: tuple[str, ...] = ("",)
    new: tuple[str, ...] = ()
    sizes: Callable[[Mapping[str, Any]], Any] | None = None
    needed: Callable[[Mapping[str, Any]], bool] = lambda keys: True
    group: str = ""
    subfolder: str = ""
    beside: str = ""
    file: str = ""
    stock: Mapping[str, str] = dataclasses.field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Path], None] | None = None
    refuse: Callable[[Path], None] | None = None

    def fills(self, path: str) -> bool:
        """Whether its files hold the parameter ``path`` (below the part)."""
        inner = path.removeprefix(self.at)
        return (
            self.tower is not None
            and self.tower.table is not None
            and path.startswith(self.at)
            and inner.startswith(self.only)
            and not any(mark in path for mark in self.new)
        )


@dataclasses.dataclass(frozen=True)
class Export:
    """A way out.

    Attributes:
      write: ``(ExportableModel, folder or file to fill, **options) -> number of tensors``.
      about: what it is, one line.
      needs: what it reads, by names under ``config.weights``.
      options: of those that :func:`minigpt5_jax.export.export_torch` knows, the ones it takes.
      suffix: of the one file that it writes; '' for a folder.
    """

    write: Callable[..., int]
    about: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ("dtype",)
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part may know of the run when it is made.

    Attributes:
      dtype: compute dtype.  param_dtype: of frozen weights.  remat: recompute layers in the backward pass.
      loss: the settings ``config.loss``.  decay_frozen_rows: weight decay shrinks frozen tables too (Q3).
      tokenizer: makes this part's tokenizer, None for a part without one.
      neighbours: what the parts on either side offer (:attr:`Part.offers`).
    """

    dtype: Any
    param_dtype: Any
    remat: bool
    loss: Mapping[str, Any]
    decay_frozen_rows: bool
    tokenizer: Callable[[], Any]
    neighbours: Mapping[str, Any]


Patterns = tuple[tuple[str, str], ...]
Keys = Mapping[str, Any]
Sizes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """One backbone, mapper or generator, for everything outside of its file.

    Attributes:
      kind: one of :data:`KINDS`.  name: in configurations; that of its file.
      module: the NNX module.
      make: ``(keys, sizes, context)`` -> keyword arguments of ``module`` (but ``rngs``).
      keys: configuration keys below ``model.<kind>``.  A backbone has ``num_vokens``, a generator
        ``image_size``.  A tower of ``uses`` whose frozen kernels may be quantised has a key
        ``<name>_quantization``.
      uses: files, by names under ``config.weights``.
      groups: keys under ``weights`` of folders that hold several of them -> the key's line.
      tokenizer: ``(find(name) -> path, keys, sizes, bos_id)`` -> tokenizer of a backbone (see
        :class:`minigpt5_jax.data.text.tokenizer.LanguageTokenizer`) or of a generator's captions
        (``CaptionTokenizer`` there).
      tokenizer_use: name of the files the tokenizer is read from.
      prompts: how a backbone's language model is spoken to
        (:class:`minigpt5_jax.data.text.prompts.PromptStyle`).
      offers: ``sizes`` -> what the mapper must know: ``hidden_size`` of a backbone, ``condition_shape`` of a
        generator.
      trainable: stage (``stage1``, ``stage2``) -> ordered (pattern below the part, learning-rate group);
        the first match decides, and what none matches is frozen.
      sharding: start of paths below the part -> logical axis -> mesh axis; the first match decides.
      frozen_prompts: trainable paths below the part and ``keys`` -> whether states before the first voken
        depend on none of them, so that prompts without images may run without gradients
        (``Batch.prompt_end``).
      reads_trees: of a backbone: whether it reads rows that are trees (``Batch.subtree_end``).
      features: of a frozen image tower: name -> starts of the paths below the part that make the
        precomputed features.
      initial: ``(fresh, pretrained, keys, key)`` -> start values that are not those of the module, paths
        below the part.  JAX must be able to trace it, which shows what it reads of ``pretrained``; towers
        that nothing reads are not loaded and not in there.
      conflicts: ``keys`` -> what does not go together, a line each.
      losses: name -> loss of its own (:class:`minigpt5_jax.minigpt5.Loss`), with weight ``loss_<name>``.
      settings: name of a setting -> values of ``keys`` under it (:data:`SMALL`, :data:`STAGE2`,
        :data:`PREFIX`, :data:`INT8`).
      samplers: of a generator, by name; the first one is the default.
      exports: format -> how it is written.
    """

    kind: str
    name: str
    module: Callable[..., Any]
    make: Callable[[Keys, Sizes, Context], dict[str, Any]]
    keys: Mapping[str, Key]
    uses: Mapping[str, Use] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: Callable[[Callable[[str], Path], Keys, Sizes, int], Any] | None = None
    tokenizer_use: str = ""
    prompts: Any = None
    offers: Callable[[Sizes], Mapping[str, Any]] = lambda sizes: {}
    trainable: Mapping[str, Patterns] = dataclasses.field(default_factory=dict)
    sharding: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    frozen_prompts: Callable[[Iterable[str], Keys], bool] = lambda trainable, keys: False
    reads_trees: bool = False
    features: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    initial: Callable[[dict[str, Any], Mapping[str, Any], Keys, Any], dict[str, Any]] | None = None
    conflicts: Callable[[Keys], Iterable[str]] = lambda keys: ()
    losses: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    samplers: tuple[str, ...] = ()
    exports: Mapping[str, Export] = dataclasses.field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Start of its parameters' paths in the whole model."""
        return f"{self.kind}/"

    def quantization(self, name: str, keys: Keys) -> str:
        """How the frozen kernels of tower ``name`` are stored; ``none`` for one without such a key."""
        return keys.get(name + QUANTIZATION, "none")

    def used(self, keys: Keys) -> Iterator[tuple[str, Use]]:
        """(name, files) of everything that a configuration of this part needs."""
        return ((name, use) for name, use in self.uses.items() if use.needed(keys))


@functools.cache
def find(kind: str, name: str) -> Part:
    """The part called ``name``: a file of ``parts/<kind>s/``, or any module (``my_package.my_part``).

    Raises:
      ValueError: there is none, or the module is no part of this kind; the message lists those that ship.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown part {kind!r}; known: {', '.join(KINDS)}")
    where = name if "." in name else f"{__package__}.{kind}s.{name}"
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if not where.startswith(str(error.name)):
            raise  # it is there, and something that it needs is not
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(names(kind))}") from None
    part = getattr(module, "PART", None)
    if part is None:
        raise ValueError(f"{where} has no PART; see minigpt5_jax/parts/contracts.py")
    if part.kind != kind:
        raise ValueError(f"{where} is a {part.kind}, not a {kind}")
    return part


def names(kind: str) -> tuple[str, ...]:
    """Names of the parts of a kind that ship with the package; none is imported."""
    package = importlib.import_module(f"{__package__}.{kind}s")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def shipped() -> Iterator[Part]:
    """Every part that ships with the package."""
    return (find(kind, name) for kind in KINDS for name in names(kind))
