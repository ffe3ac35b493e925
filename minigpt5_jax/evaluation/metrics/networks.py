"""Towers of metrics with their files: images or texts in, features out, a batch at a time, in float32.

Products are computed at full precision: in TF32, GPUs change the third digit of a feature.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.evaluation.metrics.pixels import INCEPTION_SIDE, clip_image, clip_pixels, inception_pixels
from minigpt5_jax.evaluation.metrics.text import MissingPackageError
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.bert.weights import TOWER as BERT
from minigpt5_jax.models.clip.weights import TOWER as CLIP
from minigpt5_jax.models.clip.weights import sizes_of
from minigpt5_jax.models.inception_v3.weights import TOWER as INCEPTION
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.check import examine
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.load import load_tower, open_weights
from minigpt5_jax.weights.view import Tensors

CLEAN_UPS = ("none", "open_clip")
CLIP_TOKENS, SENTENCE_TOKENS = 77, 256
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
OPEN_CLIP_FILE = "open_clip_model.safetensors"


def file_in(path: str | Path, *names: str) -> Path:
    """The first of ``names`` that a folder holds, else the path itself."""
    path = Path(path).expanduser()
    return next((path / name for name in names if (path / name).is_file()), path)


def open_file(path: str | Path, *names: str, remedy: str) -> Tensors:
    """Tensors of a published file, or of a folder with one of ``names`` or in Hugging Face's layout.

    Raises:
      FileNotFoundError: there is no such file.
      WeightFileError: it cannot be read; the message ends with ``remedy``.
    """
    try:
        return open_weights(file_in(path, *names))
    except WeightFileError as error:
        raise WeightFileError(f"{error}\nfor this metric, give {remedy}") from None


def bound(tower: Tower, source: Tensors, sizes: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call(module, *arrays)``, compiled, over the parameters of a source.

    Raises:
      WeightTableError: naming the keys that do not fit, and the likely cause.
    """
    view, _ = examine(tower.class_name or tower.file, tower, source, sizes)
    loaded = load_tower(tower.table(view, sizes), view, tower.shapes(sizes), np.float32)
    params = {path: jnp.asarray(value) for path, value in loaded.items()}
    template = Template.of(lambda rngs: tower.module(sizes, rngs=rngs))
    compiled = jax.jit(lambda params, *arrays: call(template.bind(params), *arrays))

    def run(*arrays: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jax.tree.map(np.asarray, compiled(params, *map(jnp.asarray, arrays)))

    return run


def padded_batches(items: Sequence[Any], size: int) -> Iterator[tuple[list[Any], int]]:
    """Batches of ``size``, the last filled up (one shape is compiled), and how many of each are real."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


class SetFeatures(NamedTuple):
    """``pool3`` for FID and KID, ``logits`` for the Inception Score."""

    pool3: Float[np.ndarray, "n 2048"]
    logits: Float[np.ndarray, "n classes"]


class InceptionNetwork:
    """Features of images by the network of FID.

    Args:
      path: ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid or the same file of torch-fidelity, or the
        folder that holds it.
      resize: one of :data:`~minigpt5_jax.evaluation.metrics.pixels.INCEPTION_RESIZES`.
      batch: images at once.  side: that the network sees, 299 in every published score.

    Raises:
      FileNotFoundError, WeightFileError, WeightTableError: the file is not there, or is another one.
    """

    def __init__(self, path: str | Path, resize: str = "tf1", *, batch: int = 32, side: int = INCEPTION_SIDE):
        source = open_file(path, *INCEPTION_FILES, remedy=f"{INCEPTION_FILES[0]} of pytorch-fid")

        def call(module: Any, images: jax.Array) -> SetFeatures:
            out = module(inception_pixels(images, resize, side))
            return SetFeatures(out.pool3, out.logits)

        self.batch, self._run = batch, bound(INCEPTION, source, INCEPTION.preset, call)

    def __call__(self, images: Sequence[np.ndarray]) -> SetFeatures:
        """Features of images, each u8[h w 3] of any size; images of one size are computed together.

        Raises:
          ValueError: no images.
        """
        if not images:
            raise ValueError("no images")
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(place)
        rows: list[Any] = [None] * len(images)
        for places in by_size.values():
            for batch, real in padded_batches(places, self.batch):
                pool3, logits = self._run(np.stack([images[place] for place in batch]))
                for place, *row in zip(batch[:real], pool3, logits):
                    rows[place] = row
        return SetFeatures(*(np.stack(column) for column in zip(*rows)))


def clean_caption(text: str) -> str:
    """A text as open_clip's tokenizer cleans it: repaired, HTML unescaped twice, one line, lower case.

    Raises:
      MissingPackageError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise MissingPackageError(
            "open_clip's clean-up of texts needs ftfy; pip install ftfy, or choose clip_tokenizer=none"
        ) from None
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class ClipTexts(NamedTuple):
    """Features of unit length, and which texts had more than 77 tokens and were cut."""

    features: Float[np.ndarray, "n d"]
    cut: Bool[np.ndarray, " n"]


class ClipNetwork:
    """Features of images and texts by CLIP, of unit length.

    Args:
      path: one file, or a folder of open_clip or of Hugging Face (``openai/clip-vit-large-patch14``).
      tokenizer: folder with ``vocab.json`` and ``merges.txt``; by default that of the weights.
      clean_up: ``open_clip`` cleans texts as that package does, ``none`` leaves them as Hugging Face does.
      hidden_act: where no ``config.json`` says it; every CLIP of OpenAI has ``quick_gelu``.
      batch: images or texts at once.

    Raises:
      FileNotFoundError, WeightFileError, WeightTableError, DataError: a file is not there, or is another one.
      ValueError: an unknown clean-up.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path | None = None,
        *,
        clean_up: str = "none",
        hidden_act: str = "quick_gelu",
        batch: int = 32,
    ):
        if clean_up not in CLEAN_UPS:
            raise ValueError(f"clip_tokenizer={clean_up!r} is not one of {', '.join(CLEAN_UPS)}")
        path = Path(path).expanduser()
        folder = path if path.is_dir() else path.parent
        remedy = "model.safetensors of the same model in Hugging Face's form"
        source = open_file(path, "model.safetensors", OPEN_CLIP_FILE, remedy=remedy)
        self.sizes = _clip_sizes(folder / CLIP.config_file, source, hidden_act)
        self.batch, self.clean_up = batch, clean_up
        self._tokenizer_folder = Path(tokenizer).expanduser() if tokenizer else folder
        call = functools.partial(bound, CLIP, source, self.sizes)
        self._images = call(lambda module, images: _unit(module.image_features(clip_pixels(images))))
        self._texts = call(lambda module, *tokens: _unit(module.text_features(*tokens)))

    def images(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "n d"]:
        """Features of RGB images of any size."""
        side = self.sizes.vision_config.image_size
        rows = [np.zeros((0, self.sizes.projection_dim), np.float32)]
        for batch, real in padded_batches(images, self.batch):
            rows.append(self._images(np.stack([clip_image(image, side) for image in batch]))[:real])
        return np.concatenate(rows)

    def texts(self, texts: Sequence[str]) -> ClipTexts:
        """Features of texts; one of more tokens than CLIP reads is cut, with its last id the end of text."""
        ids, ends, cut = self.tokens(texts)
        rows = [np.zeros((0, self.sizes.projection_dim), np.float32)]
        for batch, real in padded_batches(range(len(texts)), self.batch):
            rows.append(self._texts(ids[batch], ends[batch])[:real])
        return ClipTexts(np.concatenate(rows), cut)

    def tokens(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "n c"], Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Ids, place of the first end-of-text id, and whether a text was cut."""
        length = self.sizes.text_config.max_position_embeddings
        tokenizer = self._tokenizer(length + 1)  # one more than is read, to see what is cut
        cleaned = [clean_caption(text) for text in texts] if self.clean_up == "open_clip" else list(texts)
        ids, mask = tokenizer.encode(cleaned)
        cut = mask[:, length] > 0
        ids = ids[:, :length].copy()
        ids[cut, -1] = tokenizer.eos_id
        return ids, (ids == tokenizer.eos_id).argmax(1), cut

    @functools.cache  # noqa: B019  (one tokenizer for as long as the network lives)
    def _tokenizer(self, length: int) -> ClipTokenizer:
        return ClipTokenizer(self._tokenizer_folder, length)


def _clip_sizes(config: Path, source: Tensors, hidden_act: str) -> Any:
    """Sizes from Hugging Face's ``config.json``, or by the shapes of the tensors without one."""
    if config.is_file() and "text_config" in json.loads(config.read_text()):
        return CLIP.read_sizes(config)
    return sizes_of(source, hidden_act)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class SentenceNetwork:
    """Sentence embeddings of unit length: the mean of BERT's last states over the tokens of a text.

    Args:
      path: folder of ``sentence-transformers/all-MiniLM-L6-v2``: ``model.safetensors`` (or
        ``pytorch_model.bin``), ``config.json`` and ``tokenizer.json``.
      batch: texts at once.  max_tokens: 256 for this model, as sentence-transformers sets it; the 128 and the
        fixed padding in ``tokenizer.json`` are not used.

    Raises:
      FileNotFoundError, WeightFileError, WeightTableError: a file is not there, or is another one.
    """

    def __init__(self, path: str | Path, *, batch: int = 32, max_tokens: int = SENTENCE_TOKENS):
        from tokenizers import Tokenizer

        path = Path(path).expanduser()
        remedy = "the folder of sentence-transformers/all-MiniLM-L6-v2"
        for name in ("config.json", "tokenizer.json"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name} is missing; give {remedy}")
        source = open_file(path, remedy=remedy)
        self.sizes, self.batch = BERT.read_sizes(path / "config.json"), batch
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(max_tokens, self.sizes.max_position_embeddings))
        self._run = bound(BERT, source, self.sizes, _sentences)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """One embedding per text."""
        rows = [np.zeros((0, self.sizes.hidden_size), np.float32)]
        for batch, real in padded_batches(texts, self.batch):
            lines = [encoding.ids for encoding in self._tokenizer.encode_batch(batch)]
            longest = max(map(len, lines))
            length = min(-(-longest // 32) * 32, self.sizes.max_position_embeddings)  # few shapes to compile
            ids = np.zeros((len(lines), length), np.int32)
            mask = np.zeros_like(ids)
            for row, line in enumerate(lines):
                ids[row, : len(line)], mask[row, : len(line)] = line, 1
            rows.append(self._run(ids, mask)[:real])
        return np.concatenate(rows)


def _sentences(module: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the mask, then unit length."""
    weights = mask[..., None].astype(jnp.float32)
    summed = (module(ids, mask) * weights).sum(1)
    return _unit(summed / weights.sum(1).clip(1e-9))
