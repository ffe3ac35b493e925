"""LLaMA's ``tokenizer.model``, made of ``tokenizer.json``, all that newer versions of transformers write.

The two rules of splitting text are the same only in part (Q22), so ``tokenizer.json`` is not run: its pieces
are put back into a model of sentencepiece.  The scores are not in the file: sentencepiece numbers pieces by
their scores (LLaMA's piece 29871 has -29612), and their order is all that it asks of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json

CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPACE = "▁"
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
PRE_TOKENIZER = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
SPELLINGS = ((NORMALIZER, None), (None, PRE_TOKENIZER))
"""(normalizer, pre_tokenizer): a space in front and no other change, in the two ways to write it."""


def model_of_json(path: Path) -> bytes:
    """Content of the ``tokenizer.model`` that a ``tokenizer.json`` was made of.

    Equal to the file as far as text becomes ids and ids become text.

    Raises:
      WeightFileError: it is the tokenizer of another model than LLaMA 1 or 2, or cut off.
    """
    # Written by sentencepiece's own messages, which need protobuf (orbax-checkpoint has it).
    from sentencepiece import sentencepiece_model_pb2 as messages

    pieces, model = _pieces(path, read_json(path)), messages.ModelProto()
    kinds, special = messages.ModelProto.SentencePiece, len(CONTROL + BYTES)
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(BYTES)]
    for number, piece in enumerate(pieces):
        kind = types[number] if number < special else kinds.NORMAL
        model.pieces.add(piece=piece, score=min(0.0, float(special - number)), type=kind)
    model.trainer_spec.model_type = messages.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def _pieces(path: Path, values: Any) -> list[str]:
    """Pieces by id, after checking that they are those of a sentencepiece model with LLaMA's settings."""
    try:
        model, vocab = values["model"], values["model"]["vocab"]
        pieces = sorted(vocab, key=vocab.get)
        made = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        ranks = [vocab[piece] for piece in made]
        wrong = {
            "is no BPE with bytes": model["type"] != "BPE" or not model["byte_fallback"],
            "has gaps in its ids": [vocab[piece] for piece in pieces] != list(range(len(pieces))),
            "has other pieces first": pieces[: len(CONTROL + BYTES)] != CONTROL + BYTES,
            "merges in another order than that of its ids": ranks != sorted(ranks),
            "changes its text": (values.get("normalizer"), values.get("pre_tokenizer")) not in SPELLINGS,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{path} is no tokenizer.json of LLaMA ({error!r})") from None
    if reasons := [reason for reason, is_so in wrong.items() if is_so]:
        raise WeightFileError(
            f"{path} {' and '.join(reasons)}, so it is not the tokenizer of LLaMA 1 or 2; put "
            "tokenizer.model of the same model beside it"
        )
    return pieces
