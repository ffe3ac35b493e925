"""The language model as a Hugging Face folder: resized tables, LoRA folded in, tokenizer with the vokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.weights.export import tokenizer
from minigpt5_jax.weights.export.model import WORD_TABLES, ExportError, LanguageModel
from minigpt5_jax.weights.formats.load import cast
from minigpt5_jax.weights.formats.save import save_sharded, write_json
from minigpt5_jax.weights.view import View, made

_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(\w+)\.weight")


def merged(llm: LanguageModel, key: str, value: np.ndarray) -> np.ndarray:
    """A projection [out, in] with its low-rank update: ``W + lora_alpha / r * B A`` (fidelity 7.5), fp32."""
    found = _ATTENTION.fullmatch(key)
    if llm.lora is None or found is None or found[2] not in llm.lora.target_modules:
        return value
    layer, path = int(found[1]), f"{llm.at}layers/self_attn/{found[2]}"
    down, up = (np.asarray(llm.model.params[f"{path}/lora_{x}"][layer], np.float32) for x in "ab")
    return value.astype(np.float32) + np.float32(llm.lora.scale) * (down @ up).T


def tensors(llm: LanguageModel, *, merge: bool, dtype: Any) -> View:
    """Every tensor of ``LlamaForCausalLM``, made when it is asked for.

    Args:
      merge: fold LoRA into the projections.  dtype: of all tensors.
    """
    tower = llm.tower

    def read(key: str) -> np.ndarray:
        if key in WORD_TABLES:
            return llm.table(key, dtype)
        return cast(merged(llm, key, tower[key]) if merge else tower[key], dtype)

    return made(tower, tower, read)


def config(llm: LanguageModel, dtype: str) -> dict[str, Any]:
    """``config.json``: the sizes, the vocabulary with its new rows, the tokenizer's ids."""
    tokens = llm.model.tokens
    return {
        **llama.TOWER.describe(llm.sizes),
        "vocab_size": tokens.first_id + len(tokens.added),
        "use_cache": True,
        "bos_token_id": tokens.bos_id,
        "eos_token_id": tokens.eos_ids[0],
        "pad_token_id": tokens.eos_ids[0],
        "torch_dtype": dtype,
    }


def generation_config(llm: LanguageModel) -> dict[str, Any]:
    """``generation_config.json``: ids that begin, end and pad a text."""
    tokens = llm.model.tokens
    return {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": list(tokens.eos_ids),
        "pad_token_id": tokens.eos_ids[0],
    }


def write(llm: LanguageModel, folder: Path, *, dtype: Any = None, merge: bool = True) -> int:
    """A folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns the number of tensors.

    Args:
      dtype: of all tensors; by default that of the frozen ones.
      merge: fold LoRA into the projections; without it the folder is the base of the ``peft`` adapter.

    Raises:
      ExportError: a prefix, which cannot be folded into weights.
    """
    if merge and llm.prefix is not None:
        raise ExportError(
            "a prefix is keys and values in front of the text, it cannot be folded into LLaMA's weights: "
            "export it as 'minigpt5', or the language model without it (--nomerge)"
        )
    dtype = np.dtype(dtype or llm.model.dtype)
    values = tensors(llm, merge=merge, dtype=dtype)
    save_sharded(folder, values, {"format": "pt"})
    write_json(folder / "config.json", config(llm, dtype.name))
    write_json(folder / "generation_config.json", generation_config(llm))
    tokenizer.write(llm.model.tokens, llm.sizes.max_position_embeddings, folder)
    return len(values)
