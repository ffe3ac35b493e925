"""The two tokenizers: LLaMA's by legacy rules with the vokens added, and CLIP's for captions.

Released weights fit the ids of one old tokenizer only (fidelity 1.6): text is split at the added
tokens, white space around each of them is dropped, and every remaining chunk goes through
sentencepiece on its own, each with its own dummy leading space.  Newer tokenizers give other ids and
a model that never draws, so the rules are implemented here, directly on ``sentencepiece``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.paths import not_found

IMAGE_TOKEN = "<ImageHere>"  # one input image
WORDS_KEPT = 100_000  # of captions, with their ids
# How CLIP's rules (_clip_bpe) split lower-case ASCII.
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)
SPECIAL_PATTERN = re.compile(r"\[IMG\d+\]|<ImageHere>")


def voken_text(num_vokens: int) -> str:
    """The vokens of one image as a target spells them: ``[IMG0][IMG1]...``, nothing between."""
    return "".join(f"[IMG{i}]" for i in range(num_vokens))


def _read(path: Path, what: str) -> bytes:
    """Content of a tokenizer file; DataError where it is missing or empty."""
    if not path.is_file():
        raise DataError(not_found(what, path))
    data = path.read_bytes()
    if not data:
        raise DataError(f"{what} is empty: {path}; fetch it again")
    if data.startswith(b"version https://git-lfs"):
        raise DataError(f"{what} {path} is a Git LFS pointer; run `git lfs pull` in its folder")
    return data


@runtime_checkable
class LanguageTokenizer(Protocol):
    """What the program needs of a backbone's tokenizer; :class:`LlamaTokenizer` is one.

    Attributes:
      bos_id, eos_id, pad_id: ids that begin a sample, end a text, and fill a row.
      num_vokens: vokens of an image.  first_voken_id: id of ``[IMG0]``.  image_id: of ``<ImageHere>``.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    num_vokens: int
    first_voken_id: int
    image_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text without BOS and EOS, added tokens among them."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids."""

    def identity(self) -> dict[str, str | int]:
        """What a checkpoint stores, to refuse another tokenizer later."""


@runtime_checkable
class CaptionTokenizer(Protocol):
    """What the program needs of a generator's tokenizer; :class:`ClipTokenizer` is one.

    Attributes:
      max_length: ids of a caption, padding included.
    """

    max_length: int

    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "m c"], Int32[np.ndarray, "m c"]]:
        """Ids of captions, and 1 where they are not padding."""

    def identity(self) -> dict[str, str | int]:
        """What a checkpoint stores, to refuse another tokenizer later."""


def _remedy(folder: Path) -> str:
    """How ``tokenizer.model`` is made of the ``tokenizer.json`` of a folder, with a model in it or not."""
    convert = "python -m minigpt5_jax.convert llm"
    if (folder / "config.json").is_file():
        return f"let `{convert} {folder} --output NEW` make it of tokenizer.json"
    return (
        f"copy tokenizer.json to the weights of the language model, FOLDER, let `{convert} FOLDER --output "
        f"NEW` make it there, and copy NEW/tokenizer.model to {folder}"
    )


class LlamaTokenizer:
    """LLaMA's sentencepiece model with ``num_vokens`` vokens and ``<ImageHere>`` behind its pieces.

    The added ids follow the ``vocab_size`` rows of the language model: ``[IMG0]`` is
    ``first_voken_id = vocab_size`` and ``<ImageHere>`` is ``image_id = vocab_size + num_vokens``.
    Control pieces written out in text (``<s>``) stay ordinary text.

    Args:
      model_file: sentencepiece ``tokenizer.model``.
      num_vokens: vokens of one image, 8 in the papers.
      bos_id: id put in front of every sample; 2 for weights released in October 2023 (quirk Q21).
      vocab_size: rows of the language model's tables before the added tokens, where these are more
        than the pieces (checkpoints whose tokenizer has ``[PAD]`` as entry 32000).

    Raises:
      DataError: the file is missing, empty or no sentencepiece model, or ``vocab_size`` is too small.
    """

    def __init__(
        self, model_file: str | Path, num_vokens: int = 8, *, bos_id: int = 1, vocab_size: int | None = None
    ):
        import sentencepiece

        path = Path(model_file)
        if not path.exists() and path.with_name("tokenizer.json").is_file():
            raise DataError(
                f"{path} is not there, only tokenizer.json, which newer versions of transformers write and "
                "whose rules give other ids (Q22): put tokenizer.model of the same model beside it, or "
                f"{_remedy(path.parent)}"
            )
        data = _read(path, "sentencepiece model")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DataError(f"{path} is no sentencepiece model ({error}); fetch it again") from None
        self.num_pieces = self._pieces.vocab_size()
        self.vocab_size = self.num_pieces if vocab_size is None else vocab_size
        if self.vocab_size < self.num_pieces:
            raise DataError(f"vocab_size {vocab_size} is less than the {self.num_pieces} pieces of {path}")
        if num_vokens < 1:
            raise DataError(f"num_vokens must be at least 1, got {num_vokens}")
        self.num_vokens = num_vokens
        self.bos_id = bos_id
        self.eos_id = self._pieces.eos_id()
        self.pad_id = self.eos_id  # as the original: pad is eos, masked
        self.first_voken_id = self.vocab_size
        self.voken_ids = tuple(range(self.vocab_size, self.vocab_size + num_vokens))
        self.image_id = self.vocab_size + num_vokens
        names = [f"[IMG{i}]" for i in range(num_vokens)] + [IMAGE_TOKEN]
        self._added = {name: self.vocab_size + i for i, name in enumerate(names)}
        self._added_names = {i: name for name, i in self._added.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._known: dict[str, list[int]] = {}
        bare = f"{voken_text(num_vokens)} ###"  # the target of every sample that is an image only
        self._known[bare] = self.encode(bare)
        self._sha256 = hashlib.sha256(data).hexdigest()

    def __len__(self) -> int:
        """Number of ids, added tokens included (V = 32009 for stock LLaMA with 8 vokens)."""
        return self.image_id + 1

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without BOS and EOS."""
        if text in self._known:
            return list(self._known[text])
        parts = self._split.split(text)  # plain chunks at even places, added tokens at odd ones
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._added[part])
                continue
            part = part.lstrip() if i > 0 else part
            part = part.rstrip() if i < len(parts) - 1 else part
            ids.extend(self._pieces.encode(part) if part else [])
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ``ids``, single spaces around added tokens.

        Control tokens are spelled out, glued to the next word (``<s>we ended . [IMG0] ###``, fidelity 6.2).

        Raises:
          DataError: an id outside the vocabulary.
        """
        parts: list[str] = []
        chunk: list[int] = []

        def flush() -> None:
            if chunk:
                parts.append(self._decode_chunk(chunk))
                chunk.clear()

        for i in map(int, ids):
            if i in self._added_names:
                flush()
                parts.append(self._added_names[i])
            elif 0 <= i < self.num_pieces:
                chunk.append(i)
            else:
                raise DataError(f"id {i} is outside the vocabulary (0 ... {self.image_id})")
        flush()
        return " ".join(parts)

    def _decode_chunk(self, ids: Sequence[int]) -> str:
        """Text of pieces; a control token gets a space before it unless it comes first or after another."""
        text, run, after_control = "", [], False
        for place, i in enumerate(ids):
            if self._pieces.is_control(i) or self._pieces.is_unknown(i):
                space = " " if place and not after_control else ""
                text += space + self._pieces.decode(run) + self._pieces.id_to_piece(i)
                run, after_control = [], True
            else:
                run.append(i)
                after_control = False
        return text + self._pieces.decode(run)

    def identity(self) -> dict[str, str | int]:
        """What a checkpoint stores, to refuse another tokenizer later."""
        return {
            "sha256": self._sha256,
            "vocab_size": self.vocab_size,
            "num_vokens": self.num_vokens,
            "bos_id": self.bos_id,
        }


class ClipTokenizer:
    """CLIP's byte-pair encoding of captions, padded and cut to a fixed length.

    Args:
      folder: holds ``vocab.json`` and ``merges.txt``, or ``tokenizer.json`` (all that newer versions of
        transformers write), and ``special_tokens_map.json`` or ``tokenizer_config.json``, as the
        ``tokenizer`` folder of a Stable Diffusion checkpoint.
      max_length: ids per caption, 77 in SD 2.1.

    Raises:
      DataError: a file is missing or not readable, or a special token is not in the vocabulary.
    """

    def __init__(self, folder: str | Path, max_length: int = 77):
        folder = Path(folder)
        try:
            vocab, merges, digest = _clip_rules(folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # also JSON and UTF-8 errors
            if isinstance(error, DataError):
                raise
            raise DataError(f"CLIP tokenizer in {folder} is not readable ({error}); fetch it again") from None
        names = _clip_special_names(folder)
        missing = {role: name for role, name in names.items() if name not in vocab}
        if missing:
            raise DataError(f"CLIP tokenizer in {folder}: special tokens {missing} are not in its vocabulary")
        if max_length < 3:
            raise DataError(f"max_length must be at least 3 (BOS, one token, EOS), got {max_length}")
        self.max_length = max_length
        self.vocab_size = len(vocab)
        self.bos_id, self.eos_id, self.pad_id = (vocab[names[role]] for role in ("bos", "eos", "pad"))
        self._sha256 = digest
        self._bpe = _clip_bpe(vocab, merges, names)
        self._special = re.compile("|".join(map(re.escape, names.values())))
        self._words: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "m c"], Int32[np.ndarray, "m c"]]:
        """Ids of captions (BOS, at most c - 2 tokens, EOS, padding) and their mask, 1 up to and with EOS."""
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            line = [self.bos_id, *self._encode(text)[: self.max_length - 2], self.eos_id]
            ids[row, : len(line)] = line
            mask[row, : len(line)] = 1
        return ids, mask

    def _encode(self, text: str) -> list[int]:
        """Ids of a text.  Words of plain ASCII are looked up, which takes a tenth of the time."""
        if not text.isascii() or self._special.search(text):
            return self._bpe.encode(text).ids
        ids: list[int] = []
        for word in _ASCII_WORDS.findall(text.lower()):
            if word not in self._words:
                if len(self._words) >= WORDS_KEPT:
                    self._words.clear()
                self._words[word] = self._bpe.encode(word).ids
            ids += self._words[word]
        return ids

    def identity(self) -> dict[str, str | int]:
        """What a checkpoint stores, to refuse another tokenizer later."""
        return {"sha256": self._sha256, "max_length": self.max_length, "pad_id": self.pad_id}


def _clip_rules(folder: Path) -> tuple[dict[str, int], list[tuple[str, ...]], str]:
    """Vocabulary and merges of a folder, and their SHA-256.

    Of ``vocab.json`` and ``merges.txt`` it is that of the files; of ``tokenizer.json`` that of the two in a
    form of its own, so that a run does not take the one for the other without a word.
    """
    whole = folder / "tokenizer.json"
    if not (folder / "vocab.json").exists() and whole.exists():
        model = json.loads(_read(whole, "CLIP tokenizer"))["model"]
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
            raise DataError(f"{whole} is no tokenizer of CLIP (BPE whose words end in </w>)")
        merges = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in model["merges"]]
        digest = hashlib.sha256(json.dumps([model["vocab"], merges], sort_keys=True).encode()).hexdigest()
        return model["vocab"], merges, digest
    vocab_bytes = _read(folder / "vocab.json", "CLIP vocabulary")
    merges_bytes = _read(folder / "merges.txt", "CLIP merges")
    lines = merges_bytes.decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return json.loads(vocab_bytes), merges, hashlib.sha256(vocab_bytes + b"\0" + merges_bytes).hexdigest()


def _clip_special_names(folder: Path) -> dict[str, str]:
    """Spelling of BOS, EOS and padding from the folder's files (SD 2.x pads with ``!``)."""
    merged: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                merged.update(json.loads((folder / name).read_bytes()))
            except ValueError as error:
                raise DataError(f"{folder / name} is no JSON ({error}); fetch it again") from None
    names = {}
    for role in ("bos", "eos", "pad"):
        value = merged.get(f"{role}_token")
        value = value["content"] if isinstance(value, dict) else value
        if not isinstance(value, str):
            files = "special_tokens_map.json or tokenizer_config.json"
            raise DataError(f"CLIP tokenizer in {folder}: no {role}_token in {files}")
        names[role] = value
    return names


def _clip_bpe(vocab: dict[str, int], merges: list[tuple[str, ...]], names: dict[str, str]):
    """CLIP's text rules: NFC, lower case, white space collapsed, byte-level BPE, ``</w>`` at word ends."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    bpe = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=names["eos"],
        )
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # A special token inside a caption is taken for the token itself, the padding "!" included: a written
    # "!" is id 0 and not the word "!</w>".  So do the original's captions.
    special = sorted(set(names.values()))
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return bpe
