"""From a checkpoint to what the export formats write from (:mod:`minigpt5_jax.weights.export`).

Nothing is put on a device but what was trained: pretrained towers are read from their sources one tensor at
a time, once to compare their hashes with the run's and once to be written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, parts_of, warmup_steps, weight_sources
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN
from minigpt5_jax.inference.session import stop_sequences
from minigpt5_jax.parts.contracts import FROZEN, Export
from minigpt5_jax.training.provenance import Meta, hash_leaves, require_same
from minigpt5_jax.weights.export.model import ExportableModel, PretrainedTower, Tokens
from minigpt5_jax.wiring.model import ModelSpec, build, make_tokenizer, open_towers
from minigpt5_jax.wiring.restore import OpenedRun, trained_parameters, upgrade_meta
from minigpt5_jax.wiring.weight_paths import find_sources


def read_exportable(run: OpenedRun, needs: Sequence[str]) -> ExportableModel:
    """What a run trained, and the pretrained towers of ``needs``, which are known to be the run's.

    Args:
      run: an opened run.  needs: names under ``config.weights`` of what a format reads.

    Raises:
      CheckpointError, ConfigError: no such checkpoint, a source is missing or is another one.
    """
    config = run.config
    paths = _source_paths(config, needs)
    spec = build(config)
    params = {k: np.asarray(v) for k, v in trained_parameters(run.reader, spec, run.step).items()}
    towers = open_towers(spec, paths, params)
    tokenizers = {
        kind: make_tokenizer(config, part, spec.sizes)
        for kind, part in spec.parts.items()
        if part.tokenizer_use and part.tokenizer_use in needs
    }
    now = {"tokenizer": {kind: made.identity() for kind, made in tokenizers.items()}}
    _check_same(run.meta, {**now, "frozen": _hashes(spec, towers, params)}, run.checkpoints)
    captions = tokenizers.get("generator")
    return ExportableModel(
        params=params,
        trainable=frozenset(path for path in params if spec.labels[path] != FROZEN),
        towers={name: tower for name, (_, tower) in towers.items()},
        sizes=spec.sizes,
        paths=paths,
        given=weight_sources(config),
        made=spec.made,
        num_vokens=spec.backbone.num_vokens,
        tokens=_tokens(run, spec, tokenizers.get("backbone"), paths),
        caption_ids={
            f"{name}_token_id": getattr(captions, f"{name}_id")
            for name in ("bos", "eos", "pad")
            if captions is not None
        },
        voken_state_shift=spec.backbone.voken_state_shift,
        dtype=np.dtype(jnp.dtype(config.model.param_dtype)),
        writers={name: export.write for name, export in formats_of(config).items()},
        **training_progress(config, run.meta, run.step),
    )


def formats_of(config: ConfigDict) -> dict[str, Export]:
    """Format -> how the parts of a configuration write it."""
    return {name: export for part in parts_of(config).values() for name, export in part.exports.items()}


def _source_paths(config: ConfigDict, names: Sequence[str]) -> dict[str, Path]:
    """Where each source lies.

    Raises:
      ConfigError: naming those that are not given or not there, and how to get them.
    """
    paths, problems = find_sources(config, names)
    if problems:
        raise ConfigError(
            "this format needs weights the run was trained on, and they are missing:\n"
            + "\n".join(problems)
            + "\nSay where they are now with --weights NAME=PATH"
        )
    return paths


def _hashes(
    spec: ModelSpec, towers: Mapping[str, tuple[str, PretrainedTower]], params: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Hashes of frozen weights as a checkpoint has them, of the towers that are read."""
    leaves: dict[str, Callable[[], Any]] = {}
    for at, tower in towers.values():
        for path in tower.paths():
            leaves[at + path] = functools.partial(tower.layers, path)
    inside = tuple(at for at, _ in towers.values())
    for path, value in params.items():
        if path.startswith(inside) and path not in leaves:
            leaves[path] = functools.partial(iter, (value,))
    shapes = spec.template.file_shapes
    return hash_leaves(
        (path, shapes[path], leaves[path]()) for path in sorted(leaves) if spec.labels[path] == FROZEN
    )


def _check_same(meta: Meta, now: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a tokenizer or frozen weights that are not those of the run, as far as they are read."""
    meta = upgrade_meta(meta)
    before = {
        "tokenizer": {name: meta["tokenizer"].get(name) for name in now["tokenizer"]},
        "frozen": {name: meta["frozen"].get(name) for name in now["frozen"]},
    }
    require_same(
        before,
        now,
        before,
        f"{checkpoint} was trained with different frozen weights or a different tokenizer than these:",
        "{}: {!r} there, {!r} here",
        remedy="Give those it was trained on with --weights NAME=PATH",
    )


def _tokens(run: OpenedRun, spec: ModelSpec, tokenizer: Any, paths: Mapping[str, Path]) -> Tokens | None:
    if tokenizer is None:
        return None
    part = spec.parts["backbone"]
    ends = [ids[0] for ids in stop_sequences(tokenizer, part.prompts.end) if len(ids) == 1]
    return Tokens(
        model_file=paths[part.tokenizer_use],
        added=(*(f"[IMG{i}]" for i in range(tokenizer.num_vokens)), IMAGE_TOKEN),
        first_id=tokenizer.first_voken_id,
        bos_id=tokenizer.bos_id,
        eos_ids=tuple(dict.fromkeys([tokenizer.eos_id, *run.config.inference.eos_ids, *ends])),
    )


def training_progress(config: ConfigDict, meta: Meta, step: int) -> dict[str, Any]:
    """How far which training went: of an imported release what its newest file says, not our defaults."""
    files = meta.get("imported", {}).get("files", {})
    last = [about for file, about in files.items() if file != config.run.init_from]  # that is stage 1's
    about = last[-1] if last else {}
    return {
        "hyper_parameters": about.get("hyper_parameters") or _hyper_parameters(config),
        "epoch": int(about.get("epoch") or 0),
        "step": int(about["global_step"]) if about.get("global_step") is not None else step,
    }


def _hyper_parameters(config: ConfigDict) -> dict[str, Any]:
    """Training arguments under the original's names (fidelity 7.1)."""
    return {
        "num_train_epochs": config.run.epochs,
        "real_batch_size": config.data.global_batch,
        "learning_rate": config.optimizer.lr_llm,
        "warmup_steps": warmup_steps(config, config.run.num_steps or math.inf),
        "adam_epsilon": config.optimizer.eps,
    }
