"""A LoRA run as an adapter folder that ``peft`` puts on a Hugging Face LLaMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.weights.export.model import WORD_TABLES, ExportError, LanguageModel
from minigpt5_jax.weights.formats.load import cast
from minigpt5_jax.weights.formats.save import save_safetensors, write_json

PREFIX = "base_model.model."


def tensors(llm: LanguageModel) -> dict[str, np.ndarray]:
    """LoRA factors and both whole tables, under the names ``peft`` saves, fp32.

    Raises:
      ExportError: the run has no LoRA.
    """
    if llm.lora is None:
        raise ExportError(
            "this run has no LoRA, so there is no adapter: export the language model with its new rows as "
            "'transformers'" + (", a prefix as 'minigpt5'" if llm.prefix else "")
        )
    factors = {path: value for path, value in llm.model.below(llm.at).items() if "/lora_" in path}
    named = llama.lora_table(llm.lora.target_modules).to_source(factors)
    found = {key.replace(".default.", "."): np.asarray(value, np.float32) for key, value in named.items()}
    return found | {PREFIX + key: llm.table(key) for key in WORD_TABLES}


def config(llm: LanguageModel) -> dict[str, Any]:
    """``adapter_config.json`` (fidelity 4.3)."""
    lora = llm.lora
    assert lora is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": llm.model.given[llm.source],
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": ["embed_tokens", "lm_head"],
    }


def write(llm: LanguageModel, folder: Path, *, dtype: Any = None) -> int:
    """``adapter_config.json`` and ``adapter_model.safetensors``; returns the number of tensors.

    The base model's tables must have V + n rows before the adapter is loaded
    (``base.resize_token_embeddings``).

    Raises:
      ExportError: the run has no LoRA.
    """
    values = {name: cast(value, dtype) for name, value in tensors(llm).items()}
    save_safetensors(folder / "adapter_model.safetensors", values, {"format": "pt"})
    write_json(folder / "adapter_config.json", config(llm))
    return len(values)
