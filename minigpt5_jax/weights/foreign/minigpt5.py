"""What the original saves, by our paths (fidelity 7.2 to 7.4).

Its two tables of words hold the new rows as the last rows of the whole vocabulary.  In a stage-2 file with
LoRA PEFT has wrapped the language model; :func:`wrap` and :func:`unwrap` are its names of the two tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.mapper import weights as mapper
from minigpt5_jax.weights.table import Rule, Table, linear_rules

LLAMA_PREFIX = "model.llama_model."
LLM = "backbone/llm/"
_PEFT = "base_model.model."
_WRAPPED = re.compile(re.escape(LLAMA_PREFIX + _PEFT) + r"(.*)\.modules_to_save\.default(\.weight)")

PREFIX_EMBEDDING, PREFIX_INNER = (
    "model.prefix_encoder.embedding.weight",  # [tokens d]
    "model.prefix_encoder.transform.0.weight",  # [inner width d]
)
_PREFIX_ENCODER = Table(
    (
        Rule(PREFIX_EMBEDDING, f"{LLM}prefix_encoder/embedding"),
        *linear_rules("model.prefix_encoder.transform.0", f"{LLM}prefix_encoder/transform/0"),
        *linear_rules("model.prefix_encoder.transform.2", f"{LLM}prefix_encoder/transform/1"),
    )
)
"""The five tensors of a prefix encoder (fidelity 7.3)."""

TRAINED_TABLE = (
    mapper.TABLE.prefixed(target="mapper/")
    + (llama.VOKEN_TABLE + llama.lora_table()).prefixed(LLAMA_PREFIX, LLM)
    + _PREFIX_ENCODER
)
"""Every name any stage saves, the new rows cut off the tables of words (the other rows are Vicuna's, shrunk
by the original's weight decay, Q3).  A file holds what its stage trained: stage 1 131 tensors; stage 2 with
LoRA (128 factors in 32 layers, fidelity 7.3) 254, without ``fc`` and ``t2i_decoder_prompt``."""


def wrap(key: str) -> str:
    """A name of one of the two tables as PEFT's ``modules_to_save`` has it; others as they are."""
    if key not in (LLAMA_PREFIX + llama.EMBED, LLAMA_PREFIX + llama.HEAD):
        return key
    inner = key.removeprefix(LLAMA_PREFIX).removesuffix(".weight")
    return f"{LLAMA_PREFIX}{_PEFT}{inner}.modules_to_save.default.weight"


def unwrap(key: str) -> str:
    """Inverse of :func:`wrap`."""
    found = _WRAPPED.fullmatch(key)
    return LLAMA_PREFIX + found[1] + found[2] if found else key


def base_name(key: str) -> str:
    """Name below :data:`LLAMA_PREFIX` that a frozen tensor of the language model had before PEFT wrapped it.

    Its linear layers became ``base_layer`` in later versions of PEFT, and the tables ``original_module``.
    """
    inner = key.removeprefix(LLAMA_PREFIX).removeprefix(_PEFT)
    return inner.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_second(key: str) -> bool:
    """Whether a tensor is of a second stage: a factor of LoRA, a table that PEFT trains, or of a prefix."""
    tuned = key.startswith(LLAMA_PREFIX + _PEFT) and (".lora_" in key or ".modules_to_save." in key)
    return tuned or key.startswith("model.prefix_encoder.")


def trained_to_source(
    params: Mapping[str, np.ndarray], embedding: np.ndarray, head: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors the original writes for what a stage trained, fp32 (fidelity 7.2, 7.3).

    Args:
      params: what trained, the new rows among it; with LoRA factors the tables get PEFT's names.
      embedding: Vicuna's token table [V d].  head: its output kernel [d V]; the file holds whole tables.

    Raises:
      WeightTableError: a parameter that the original's files have no name for.
    """
    source = TRAINED_TABLE.to_source({path: np.asarray(value, np.float32) for path, value in params.items()})
    source[LLAMA_PREFIX + llama.EMBED] = np.asarray(embedding, np.float32)
    source[LLAMA_PREFIX + llama.HEAD] = np.ascontiguousarray(np.asarray(head, np.float32).T)
    joined = llama.join_tables(source, LLAMA_PREFIX)
    if any("/lora_" in path for path in params):
        return {wrap(key): value for key, value in joined.items()}
    return joined
