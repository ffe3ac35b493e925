"""The original's whole state dict, and what it saves, by our paths (reference sections 7.2 to 7.4).

Both tables hold the new rows as the last rows of the whole vocabulary; :func:`split_rows` and
:func:`join_rows` stand between such a state dict and the tables here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minigpt5_jax.models.eva_vit import EvaVitConfig
from minigpt5_jax.models.qformer import QFormerConfig
from minigpt5_jax.weights.maps import clip_text, eva_vit, llama, mapper, qformer, unet, vae
from minigpt5_jax.weights.table import Table, linear_rules, norm_rules

LLAMA_PREFIX = "model.llama_model."


def vision_table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """From pictures to the language model: EVA ViT, its norm, Q-Former, projection."""
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

STAGE1_TABLE = MAPPER_TABLE + llama.VOKEN_TABLE.prefixed(LLAMA_PREFIX, "backbone/llm/")
"""The 131 tensors of a stage-1 file; of the two language-model tables only the new rows are read
or written (the other rows are Vicuna's, shrunk by the original's weight decay, Q3)."""


def table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """Every tensor of a stage-1 model's memory (``state_dict()`` before anything is dropped)."""
    return (
        llama.TABLE.prefixed(LLAMA_PREFIX, "backbone/llm/")
        + STAGE1_TABLE
        + vision_table(vit, qformer_config)
        + GENERATOR_TABLE
    )


def split_rows(source: Mapping[str, np.ndarray], num_new: int = 9) -> dict[str, np.ndarray]:
    """A state dict with the ``num_new`` new rows of both tables under keys of their own.

    Raises:
      WeightTableError: a table is missing or too short.
    """
    return llama.split_tables(source, num_new, LLAMA_PREFIX)


def join_rows(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of :func:`split_rows`."""
    return llama.join_tables(source, LLAMA_PREFIX)


def stage1_to_params(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], num_new: int = 9
) -> dict[str, np.ndarray]:
    """The trainables of a stage-1 file.

    Args:
      source: its ``state_dict``.  shapes: path -> shape of what stage 1 trains.

    Raises:
      WeightTableError: naming keys that are missing, unexpected or of another shape.
    """
    cut = split_rows(source, num_new)
    for key in (llama.EMBED, llama.HEAD):
        del cut[LLAMA_PREFIX + key]  # Vicuna's rows come from Vicuna
    return STAGE1_TABLE.to_params(cut, shapes)


def stage1_to_source(
    params: Mapping[str, np.ndarray], embedding: np.ndarray, head: np.ndarray
) -> dict[str, np.ndarray]:
    """The 131 tensors the original writes, fp32.

    Args:
      params: the trainables.
      embedding: Vicuna's token table [V d].  head: its output kernel [d V]; the file holds whole tables.
    """
    source = STAGE1_TABLE.to_source({path: np.asarray(value, np.float32) for path, value in params.items()})
    source[LLAMA_PREFIX + llama.EMBED] = np.asarray(embedding, np.float32)
    source[LLAMA_PREFIX + llama.HEAD] = np.ascontiguousarray(np.asarray(head, np.float32).T)
    return join_rows(source)
