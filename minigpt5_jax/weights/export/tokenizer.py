"""LLaMA's tokenizer with the new tokens as Hugging Face files, ids as this package makes them.

``tokenizer.json`` carries the legacy rules (fidelity 1.6): text is cut at the new tokens, white space
around them is dropped, and every piece between them begins with its own dummy space.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from minigpt5_jax.weights.export.model import Tokens
from minigpt5_jax.weights.formats.save import write_json

SPACE = "\u2581"  # sentencepiece's mark of a word's start


def write(tokens: Tokens, max_length: int, folder: Path) -> None:
    """The tokenizer's files, for a model of ``max_length`` positions."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokens.model_file.read_bytes())
    count = pieces.get_piece_size()
    names = [pieces.id_to_piece(i) for i in range(count)]
    scores = [pieces.get_score(i) for i in range(count)]
    fast = _backend(names, scores, pieces.unk_id(), pieces.id_to_piece(tokens.bos_id), tokens.bos_id)
    added = _added(tokens, count)
    fast.add_tokens(list(added.values()))
    assert all(fast.token_to_id(str(token)) == number for number, token in added.items())
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(tokens.model_file, folder / "tokenizer.model")
    special = {
        "bos_token": pieces.id_to_piece(tokens.bos_id),
        "eos_token": pieces.id_to_piece(pieces.eos_id()),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "pad_token": pieces.id_to_piece(pieces.eos_id()),
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            **special,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "legacy": True,
        },
    )


def _added(tokens: Tokens, count: int) -> dict[int, Any]:
    """Id -> new token; rows that have no piece, such as Vicuna's ``[PAD]``, get a name that no text has."""
    from tokenizers import AddedToken

    unused = {i: AddedToken(f"<unused{i}>", normalized=False) for i in range(count, tokens.first_id)}
    new = {
        tokens.first_id + i: AddedToken(name, lstrip=True, rstrip=True, normalized=False)
        for i, name in enumerate(tokens.added)
    }
    return unused | new


def _backend(names: list[str], scores: list[float], unk_id: int, bos: str, bos_id: int) -> Any:
    """sentencepiece's byte-pair encoding by the rules of the ``tokenizers`` library."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab = {name: i for i, name in enumerate(names)}
    rules = {"unk_token": names[unk_id], "fuse_unk": True, "byte_fallback": True}
    fast = Tokenizer(models.BPE(vocab, _merges(vocab, scores), **rules))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    return fast


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs that make a piece, the best piece first, as sentencepiece would join them."""
    found = [
        (-scores[number], vocab[name[:cut]], vocab[name[cut:]], name[:cut], name[cut:])
        for name, number in vocab.items()
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(found)]
