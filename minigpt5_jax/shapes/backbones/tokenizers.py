"""The small world's own tokenizers, in the files of LLaMA and of Stable Diffusion 2.1."""

from __future__ import annotations

import io
import json
from pathlib import Path

from minigpt5_jax.shapes.backbones.texts import corpus
from minigpt5_jax.shapes.wording import caption_words

LLAMA_PIECES = 1024
BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "!"


def write_llama_tokenizer(path: Path, seed: int = 0, texts: int = 2000) -> None:
    """A sentencepiece BPE model with LLaMA's options: unk, bos, eos = 0, 1, 2, byte fallback, identity."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(texts, seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=LLAMA_PIECES,
        byte_fallback=True,
        add_dummy_prefix=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=1.0,
        minloglevel=1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's files: 256 bytes, 256 bytes that end a word, merges, BOS, EOS; "!" (id 0) pads.

    Merges are learnt until every word of the captions is one token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = caption_words()
    learner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = byte_letters()
    names = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    for name in (BOS, EOS):
        vocab[name] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": PAD}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def byte_letters() -> list[str]:
    """The printable letter of every byte in the order of CLIP's vocabulary, which starts with "!"."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
