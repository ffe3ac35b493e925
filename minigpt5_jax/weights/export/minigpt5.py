"""The original's own checkpoints: Lightning files of stage 1 and stage 2 (fidelity 7.1 to 7.5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.weights.export.model import ExportError, LanguageModel
from minigpt5_jax.weights.foreign.minigpt5 import LLM, trained_to_source
from minigpt5_jax.weights.table import WeightTableError

LIGHTNING_VERSION = "2.0.9"  # the format of the original's requirements; newer ones migrate it
ROWS = (f"{LLM}embed_tokens/voken", f"{LLM}lm_head/voken")


def state_dict(llm: LanguageModel, stage: int | None = None) -> dict[str, np.ndarray]:
    """What the original would have saved of this run, fp32.

    Args:
      stage: 1 for what stage 1 saves (131 tensors: mapper, MLP, queries, both tables), whatever was trained
        last; 2 for what stage 2 saves; None for what this run trained, and without LoRA or a prefix all of
        stage 1's.

    Raises:
      ExportError: stage 2 of a run without LoRA and without a prefix, or parameters the original has no
        name for.
    """
    tuned = {path for path in llm.model.params if "/lora_" in path or "/prefix_encoder/" in path}
    if stage == 2 and not tuned:
        raise ExportError(
            "this run has neither LoRA nor a prefix, so it has no stage-2 file; export it as stage 1"
        )
    mapper = {path for path in llm.model.params if path.startswith("mapper/")}
    kept = {path for path in mapper if not path.startswith(("mapper/fc/", "mapper/queries"))}
    own = set(llm.model.trainable) | (set() if tuned else mapper)  # with queries that were fixed
    chosen = {None: own, 1: mapper, 2: tuned | kept}[stage] | set(ROWS)
    try:
        return trained_to_source(
            {path: llm.model.params[path] for path in sorted(chosen - {llm.table_decay})},
            llm.old_rows(llama.EMBED),
            llm.old_rows(llama.HEAD).T,
        )
    except WeightTableError as error:
        raise ExportError(
            f"this run trained what the original never saves ({error}); export it as 'transformers' and "
            "'diffusers'"
        ) from None


def write(llm: LanguageModel, path: Path, *, stage: int | None = None) -> int:
    """A Lightning ``.ckpt`` for the original and ``torch.load(weights_only=True)``; returns how many tensors.

    Args:
      path: file to write.  stage: see :func:`state_dict`.

    Raises:
      ExportError: torch is not installed, or as :func:`state_dict` says.
    """
    try:
        import torch
    except ImportError:
        raise ExportError(
            "a Lightning checkpoint is written by torch, which is not installed: install "
            "minigpt5_jax[torch]; the other formats do without it"
        ) from None
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state_dict(llm, stage).items()}
    container = {
        "epoch": llm.model.epoch,
        "global_step": llm.model.step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": tensors,
        # No "loops": with an empty one Lightning's Trainer.predict fails, without it all of it loads (7.5).
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(llm.model.hyper_parameters),
    }
    torch.save(container, path)
    return len(tensors)
