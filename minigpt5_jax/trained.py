"""From a checkpoint to what the export formats write from (:mod:`minigpt5_jax.weights.export`).

Nothing is put on a device but what was trained: pretrained towers are read from their sources one tensor at
a time, once to compare their hashes with the run's and once to be written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from minigpt5_jax.build import ModelSpec, build, caption_tokenizer, llm_tokenizer, mapper_sizes, tower_sources
from minigpt5_jax.config import ConfigError, weight_sources
from minigpt5_jax.data.tokenizer import IMAGE_TOKEN, LlamaTokenizer
from minigpt5_jax.frozen_sources import find_sources
from minigpt5_jax.inference.session import stop_sequences
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.restore import config_of, open_checkpoints, trained_parameters
from minigpt5_jax.training.provenance import CheckpointError, Meta, differences, hash_leaves
from minigpt5_jax.tuning import FROZEN
from minigpt5_jax.weights.export.model import PretrainedTower, Tokens, Trained
from minigpt5_jax.weights.load import open_weights
from minigpt5_jax.weights.towers import TOWERS


def read_trained(
    checkpoint: str | Path, sources: Sequence[str], step: int | None, weights: Mapping[str, str] | None
) -> Trained:
    """What a run trained, and the pretrained towers of ``sources``, which are known to be the run's.

    Raises:
      CheckpointError, ConfigError: no such checkpoint, a source is missing or is another one.
    """
    checkpoints = open_checkpoints(checkpoint)
    step = checkpoints.latest_step if step is None else step
    meta = checkpoints.meta(step)
    config = config_of(meta, weights)
    paths = _source_paths(config, sources)
    spec = build(config)
    params = {k: np.asarray(v) for k, v in trained_parameters(checkpoints, step, spec).items()}
    checkpoints.close()
    towers = _towers(spec, sources, paths, params)
    tokenizer = llm_tokenizer(config, spec.towers) if "tokenizer" in sources else None
    captions = caption_tokenizer(config, spec.towers) if "clip_tokenizer" in sources else None
    identities = {"llm": tokenizer, "caption": captions}
    now = {"tokenizer": {name: made.identity() for name, made in identities.items() if made}}
    _check_same(meta, {**now, "frozen": _hashes(spec, towers, params)}, checkpoint)
    return Trained(
        params=params,
        trainable=frozenset(path for path in params if spec.labels[path] != FROZEN),
        towers=towers,
        tokens=_tokens(config, tokenizer, paths.get("tokenizer")),
        clip_tokenizer=paths.get("clip_tokenizer"),
        caption_ids={f"{name}_token_id": getattr(captions, f"{name}_id") for name in ("bos", "eos", "pad")}
        if captions
        else {},
        **training_progress(config, meta, step),
        **_shape(config, spec),
    )


def _shape(config: ConfigDict, spec: ModelSpec) -> dict[str, Any]:
    """What a :class:`Trained` says of the model."""
    towers, backbone = spec.towers, config.model.backbone
    lora = prefix = None
    if backbone.lora_rank:
        lora = LoraConfig(backbone.lora_rank, backbone.lora_alpha, backbone.lora_dropout)
    if backbone.prefix_tokens:
        prefix = PrefixConfig(backbone.prefix_tokens, backbone.prefix_hidden_size)
    return {
        "sizes": {
            "llm": towers.llm,
            "unet": towers.unet,
            "vae": towers.vae,
            "text_encoder": towers.text_encoder,
            "mapper": mapper_sizes(config, towers),
        },
        "lora": lora,
        "prefix": prefix,
        "num_vokens": backbone.num_vokens,
        "scheduler": dataclasses.asdict(towers.schedule),
        "dtype": np.dtype(jnp.dtype(config.model.param_dtype)),
        "voken_state_shift": config.model.voken_state_shift,
        "llm_source": weight_sources(config)["llm"],
    }


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


def _towers(
    spec: ModelSpec, sources: Sequence[str], paths: Mapping[str, Path], params: Mapping[str, np.ndarray]
) -> dict[str, PretrainedTower]:
    """The pretrained towers among ``sources``; nothing but headers is read."""
    found = {}
    for tower in tower_sources(spec.towers):
        if tower.source not in sources:
            continue
        shapes = {
            path.removeprefix(tower.prefix): shape
            for path, shape in spec.template.shapes.items()
            if path.startswith(tower.prefix) and not any(part in path for part in tower.skip)
        }
        own = {path: params[tower.prefix + path] for path in shapes if tower.prefix + path in params}
        source = tower.adapt(open_weights(paths[tower.source], TOWERS[tower.source].key))
        found[tower.source] = PretrainedTower(tower.table(source), source, shapes, own)
    return found


def _hashes(
    spec: ModelSpec, towers: Mapping[str, PretrainedTower], params: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Hashes of frozen weights as a checkpoint has them, of the towers that are read."""
    prefixes = {tower.source: tower.prefix for tower in tower_sources(spec.towers)}
    leaves: dict[str, Callable[[], Any]] = {}
    for name, tower in towers.items():
        for path in tower.paths():
            leaves[prefixes[name] + path] = functools.partial(tower.layers, path)
    inside = tuple(prefixes[name] for name in towers)
    for path, value in params.items():
        if path.startswith(inside) and path not in leaves:
            leaves[path] = functools.partial(iter, (value,))
    shapes = spec.template.shapes
    return hash_leaves(
        (path, shapes[path], leaves[path]()) for path in sorted(leaves) if spec.labels[path] == FROZEN
    )


def _check_same(meta: Meta, now: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse words or frozen weights that are not those of the run, as far as they are read."""
    before = {
        "tokenizer": {name: meta["tokenizer"].get(name) for name in now["tokenizer"]},
        "frozen": {name: meta["frozen"].get(name) for name in now["frozen"]},
    }
    if other := differences(before, now, before):
        lines = [f"  {key}: {theirs!r} there, {ours!r} here" for key, (theirs, ours) in other.items()]
        raise CheckpointError(
            f"{checkpoint} was trained on other weights or words than these:\n"
            + "\n".join(lines)
            + "\nGive those it was trained on with --weights NAME=PATH"
        )


def _tokens(config: ConfigDict, tokenizer: LlamaTokenizer | None, path: Path | None) -> Tokens | None:
    if tokenizer is None or path is None:
        return None
    ends = [ids[0] for ids in stop_sequences(tokenizer) if len(ids) == 1]
    return Tokens(
        model_file=path,
        added=(*(f"[IMG{i}]" for i in range(tokenizer.num_vokens)), IMAGE_TOKEN),
        first_id=tokenizer.first_voken_id,
        bos_id=tokenizer.bos_id,
        eos_ids=tuple(dict.fromkeys([tokenizer.eos_id, *config.inference.eos_ids, *ends])),
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
    """Training arguments under the original's names (reference 7.1)."""
    return {
        "num_train_epochs": config.run.epochs,
        "real_batch_size": config.data.global_batch,
        "learning_rate": config.optimizer.lr_llm,
        "warmup_steps": config.optimizer.warmup_steps,
        "adam_epsilon": config.optimizer.eps,
    }
