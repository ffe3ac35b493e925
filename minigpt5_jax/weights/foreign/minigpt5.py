"""The original's whole state dict, and what it saves, by our paths (fidelity 7.2 to 7.4).

The two tables of words hold the new rows as the last rows of the whole vocabulary; :func:`split_rows` and
:func:`join_rows` stand between such a state dict and the weight tables here.  In a stage-2 file with LoRA
PEFT has wrapped the language model; :func:`wrap` and :func:`unwrap` are its names of the two tables.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

from minigpt5_jax.models.clip_text import weights as clip_text
from minigpt5_jax.models.eva_vit import weights as eva_vit
from minigpt5_jax.models.eva_vit.model import EvaVitConfig
from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.mapper import weights as mapper
from minigpt5_jax.models.qformer import weights as qformer
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet import weights as unet
from minigpt5_jax.models.vae import weights as vae
from minigpt5_jax.weights.table import Rule, Table, linear_rules, norm_rules

LLAMA_PREFIX = "model.llama_model."
LLM = "backbone/llm/"
_PEFT = "base_model.model."
_WRAPPED = re.compile(re.escape(LLAMA_PREFIX + _PEFT) + r"(.*)\.modules_to_save\.default(\.weight)")


def vision_table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """From images to the language model: EVA ViT, its norm, Q-Former, projection."""
    parts = Table((*norm_rules("ln_vision", "ln_vision"), *linear_rules("llama_proj", "llama_proj")))
    parts += eva_vit.table(vit).prefixed("visual_encoder.", "vit/")
    parts += qformer.table(qformer_config).prefixed(target="qformer/")
    return parts.prefixed("model.", "backbone/")


GENERATOR_TABLE = (
    unet.TABLE.prefixed("unet.", "unet/")
    + vae.TABLE.prefixed("vae.", "vae/")
    + clip_text.TABLE.prefixed("sd_text_encoder.", "text_encoder/")
).prefixed(target="generator/")

MAPPER_TABLE = mapper.TABLE.prefixed(target="mapper/")

ROWS_TABLE = llama.VOKEN_TABLE.prefixed(LLAMA_PREFIX, LLM)
"""New rows of the two tables, cut off by :func:`split_rows`."""

STAGE1_TABLE = MAPPER_TABLE + ROWS_TABLE
"""The 131 tensors of a stage-1 file; of the two language-model tables only the new rows are read
or written (the other rows are Vicuna's, shrunk by the original's weight decay, Q3)."""

LORA_TABLE = llama.lora_table().prefixed(LLAMA_PREFIX, LLM)
"""PEFT's low-rank factors of ``q_proj`` and ``v_proj``: 128 tensors in 32 layers (fidelity 7.3)."""

PREFIX_TABLE = Table(
    (
        Rule("model.prefix_encoder.embedding.weight", f"{LLM}prefix_encoder/embedding"),
        *linear_rules("model.prefix_encoder.transform.0", f"{LLM}prefix_encoder/transform/0"),
        *linear_rules("model.prefix_encoder.transform.2", f"{LLM}prefix_encoder/transform/1"),
    )
)
"""The five tensors of a prefix encoder (fidelity 7.3)."""

TRAINED_TABLE = STAGE1_TABLE + LORA_TABLE + PREFIX_TABLE
"""Every name any stage saves.  A file holds what its stage trained: with LoRA 254 tensors, without ``fc``
and ``t2i_decoder_prompt``."""


def table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """Every tensor of a stage-1 model's memory (``state_dict()`` before anything is dropped)."""
    return (
        llama.TABLE.prefixed(LLAMA_PREFIX, LLM)
        + STAGE1_TABLE
        + vision_table(vit, qformer_config)
        + GENERATOR_TABLE
    )


split_rows = functools.partial(llama.split_tables, num_new=9, prefix=LLAMA_PREFIX)
"""A state dict with the new rows (nine, or ``num_new``) of both tables under keys of their own."""
join_rows = functools.partial(llama.join_tables, prefix=LLAMA_PREFIX)
"""Inverse of :func:`split_rows`."""


def stage1_to_params(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], num_new: int = 9
) -> dict[str, np.ndarray]:
    """The trainables of a stage-1 file.

    Args:
      source: its ``state_dict``.  shapes: path -> shape of what stage 1 trains.

    Raises:
      WeightTableError: naming keys that are missing, unexpected or of another shape.
    """
    cut = split_rows(source, num_new=num_new)
    for key in (llama.EMBED, llama.HEAD):
        del cut[LLAMA_PREFIX + key]  # Vicuna's rows come from Vicuna
    return STAGE1_TABLE.to_params(cut, shapes)


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
    joined = join_rows(source)
    if any("/lora_" in path for path in params):
        return {wrap(key): value for key, value in joined.items()}
    return joined
