"""A model from pretrained weights, and from the checkpoints that the original released (fidelity 7).

:func:`load_pretrained` is the way for Python; ``python -m minigpt5_jax.convert minigpt5`` writes the same as
a checkpoint of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from minigpt5_jax.config import (
    PROFILES,
    ConfigError,
    get_config,
    part_settings,
    parts_of,
    use_prefix,
    use_stage2,
    validate,
)
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.owner import Owner
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.training.tuning import TABLE_DECAY
from minigpt5_jax.weights.check import COVERAGE_FILE
from minigpt5_jax.weights.foreign.minigpt5 import PREFIX_EMBEDDING, PREFIX_INNER
from minigpt5_jax.weights.foreign.release import (
    WHOLE,
    Release,
    compare_rows,
    first_of_both,
    holds_both,
    is_whole,
    read_release,
    trained_of_whole,
)
from minigpt5_jax.weights.formats.hub import PATTERNS, resolve
from minigpt5_jax.weights.formats.load import is_torch, open_container, open_weights
from minigpt5_jax.wiring.model import (
    build,
    initial_trainable,
    language_tokenizer,
    load_frozen,
    not_pretrained,
)
from minigpt5_jax.wiring.restore import describe, load_run
from minigpt5_jax.wiring.session import LoadedModel
from minigpt5_jax.wiring.weight_paths import check_sources, uses_of

Files = str | Path | tuple[str | Path, str | Path]


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A model made of released files.

    Attributes:
      run: the model.  release: what was read from the files.
      about: file -> epoch, global_step and hyper-parameters that it states.
    """

    run: LoadedModel
    release: Release
    about: dict[str, dict[str, Any]]


def load_pretrained(
    *,
    minigpt5: Files | None = None,
    config: ConfigDict | None = None,
    profile: str = "head",
    rows: str = "vokens",
    **weights: str | Path,
) -> LoadedModel:
    """A whole model, ready for :meth:`LoadedModel.session` or to be trained further.

    Every source is a file, a folder or a Hugging Face id (``org/name``), in any form that
    ``python -m minigpt5_jax.convert`` reads, but for Stable Diffusion, which is a diffusers folder.

    Args:
      minigpt5: a released ``stage1.ckpt``; ``(stage1.ckpt, stage2.ckpt)``; each as Lightning wrote it, or
        its tensors alone (a dictionary of PyTorch, or safetensors); a whole state dict of either stage (that
        of stage 2 stands for both), which is then the source of every tower that is not given, so that only
        ``tokenizer`` and ``stable_diffusion`` (for ``tokenizer/`` and ``scheduler/``) are needed; a folder
        with checkpoints of this package; None for untrained vokens and mapper.
      config: settings; by default those of the stage that the files are of.  A checkpoint folder brings
        its own.
      profile: code generation the weights fit, ``head`` or ``release_2023_10``.
      rows: ``vokens`` takes the new rows of released files, ``all`` their whole tables, as weight decay left
        them (Q3).
      weights: sources by their names under ``config.weights``: ``llm`` (Vicuna-7B v0 with its tokenizer),
        ``stable_diffusion`` (Stable Diffusion 2.1-base), and ``vit``, ``qformer``, ``llama_proj`` (EVA ViT-g,
        BLIP-2's Q-Former, MiniGPT-4's projection): all three, or none for a model that cannot see.

    Returns:
      configuration, abstract model, every parameter, tokenizer and step.

    Raises:
      ConfigError: a source is missing or unknown, or settings do not go together.
      WeightFileError, WeightTableError: a file cannot be used; the message names keys and likely cause.
      CheckpointError: the folder has other frozen weights or another tokenizer than given here.
    """
    base = get_config() if config is None else config
    if unknown := sorted(set(weights) - set(base.weights)):
        raise ConfigError(f"unknown weight sources {unknown}; known: {', '.join(base.weights)}")
    include = {use.group or name: use.origin.include for name, (_, use) in uses_of(base).items()}
    given = {
        name: str(resolve(path, include.get(name) or PATTERNS)) for name, path in weights.items() if path
    }
    if isinstance(minigpt5, str | Path) and Path(minigpt5).expanduser().is_dir():
        if config is not None:
            raise ConfigError("a checkpoint folder brings its own configuration; leave `config` away")
        return load_run(minigpt5, weights=given)
    stage1, stage2 = minigpt5 if isinstance(minigpt5, tuple) else (minigpt5, None)
    if stage1 is not None:
        stage2 = _second_of(stage1, stage2)
        for path in filter(None, (stage2, stage1)):
            given = {**_towers_of_whole(path, base, given), **given}
    config = default_config(stage2, profile) if config is None else config.copy_and_resolve_references()
    _leave_out_optional(config, given)
    config.weights.update(given)
    if stage1 is not None:
        return import_release(config, stage1, stage2, rows=rows).run
    check_sources(validate(config))
    spec = build(config)
    frozen = load_frozen(config, spec)
    params = {**frozen, **initial_trainable(config, spec, frozen)}
    return LoadedModel(config, spec, params, language_tokenizer(config, spec.sizes), 0)


def _second_of(stage1: str | Path, stage2: str | Path | None) -> str | Path | None:
    """The file of the second stage: a whole state dict that holds both stages is given as the first."""
    both = stage2 is None and holds_both(open_weights(resolve(stage1), key="state_dict"))
    return stage1 if both else stage2


def _towers_of_whole(file: str | Path, config: ConfigDict, given: Mapping[str, str]) -> dict[str, str]:
    """The file itself as the source of every tower, if it is a whole state dict of the original.

    Raises:
      ConfigError: it is, and a tokenizer is not given, of which it holds none.
    """
    path = resolve(file)
    if not is_whole(open_weights(path, key="state_dict")):
        return {}
    missing = [
        f"{name}=PATH ({use.get})"
        for part in parts_of(config).values()
        for name, use in part.uses.items()
        if name == part.tokenizer_use and not any(map(given.get, (name, use.beside, use.group)))
    ]
    if missing:
        raise ConfigError(
            f"{path} is a whole state dict, which holds no tokenizers: give {' and '.join(missing)}"
        )
    return {name: str(path) for name in WHOLE if name in config.weights}


def _leave_out_optional(config: ConfigDict, given: Mapping[str, str]) -> None:
    """Without any of a part's optional towers, the model is one that has none of them."""
    for kind, part in parts_of(config).items():
        without = {name: "none" for name, key in part.keys.items() if "none" in key.choices}
        keys = {**part_settings(config)[kind], **without}
        optional = [name for name, use in part.uses.items() if use.tower and not use.needed(keys)]
        if optional and not any(given.get(name) for name in optional):
            config.model[kind].update(without)


def default_config(stage2: str | Path | None, profile: str) -> ConfigDict:
    """Settings of a stage: stage 1, or stage 2 by LoRA or by a prefix, as its file says.

    Raises:
      ConfigError: an unknown profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    config = get_config()
    if stage2 is not None:
        keys = open_weights(resolve(stage2), key="state_dict")
        use_stage2(config)
        rank = next((keys[key].shape[0] for key in keys if ".lora_A." in key), 0)
        if rank:
            config.model.backbone.lora_rank = rank
        elif PREFIX_EMBEDDING in keys and PREFIX_INNER in keys:
            use_prefix(config)
            tokens, width = keys[PREFIX_EMBEDDING].shape[0], keys[PREFIX_INNER].shape[0]
            config.model.backbone.update(prefix_tokens=tokens, prefix_hidden_size=width)
    return PROFILES[profile](config)


def import_release(
    config: ConfigDict, stage1: str | Path, stage2: str | Path | None = None, *, rows: str = "vokens"
) -> ImportedModel:
    """The model of released files on the pretrained weights of ``config``.

    Args:
      config: of the stage that the files are of.  stage1, stage2: ``.ckpt`` of the original; stage 2 lies
        on top of stage 1.  A whole state dict of stage 2 is both, given as either or as the only one.
      rows: as in :func:`load_pretrained`.

    Raises:
      ConfigError, WeightFileError, WeightTableError: as in :func:`load_pretrained`.
    """
    stage2 = _second_of(stage1, stage2)
    files = [resolve(path) for path in (stage1, stage2) if path is not None]
    opened = [open_weights(path, key="state_dict") for path in files]
    sources = [trained_of_whole(tensors) for tensors in opened]
    if holds_both(opened[0]):
        sources[0] = first_of_both(sources[0])
    both = (sources[0], sources[1] if stage2 is not None else None)
    check_sources(validate(config))
    spec = build(config)
    shapes = {path: s.shape for path, s in spec.template.shapes.items() if not_pretrained(path, spec)}
    # No tensor of the files: measured on their tables.
    decays = {path: shapes.pop(path) for path in list(shapes) if path.endswith(TABLE_DECAY)}
    release = read_release(
        *both,
        shapes,
        vocab_size=spec.backbone.vocab_size,
        num_new=spec.backbone.num_vokens + 1,
        rows=rows,
    )
    frozen = load_frozen(config, spec)
    decay = compare_rows(*both, release.vocab_size, lambda path: np.asarray(frozen[path]))
    release = dataclasses.replace(release, decay=decay)
    params = {
        path: jnp.asarray(value, spec.template.shapes[path].dtype) for path, value in release.params.items()
    }
    shrunk = 0.0 if rows == "all" else 1.0 - release.factor
    params |= {path: jnp.asarray(shrunk, jnp.float32) for path in decays}
    about = {str(path): _about(path) for path in files}
    steps = [values.get("global_step") for values in about.values()]
    step = max((number for number in steps if isinstance(number, int)), default=0)
    if stage2 is not None and files[0] != files[1]:
        config.run.init_from = str(files[0])
    run = LoadedModel(config, spec, {**frozen, **params}, language_tokenizer(config, spec.sizes), step)
    return ImportedModel(run, dataclasses.replace(release, params=params), about)


def save_imported(imported: ImportedModel, workdir: str | Path) -> Path:
    """Write an imported model as a checkpoint of ours, which ``generate`` and ``run.init_from`` take.

    Raises:
      CheckpointError: the folder holds checkpoints, a run trains there, or it cannot be written.
    """
    run, folder = imported.run, Path(workdir).expanduser() / "checkpoints"
    labels = run.spec.labels
    own = imported.release.params
    trainable = {path: value for path, value in own.items() if labels[path] != FROZEN}
    inherited = {path: value for path, value in own.items() if labels[path] == FROZEN}
    coverage = [one.to_json() for one in imported.release.coverage]
    state = {"trainable": trainable, **({"inherited": inherited} if inherited else {})}
    with contextlib.closing(Checkpoints(folder, owner=Owner(folder.parent))) as checkpoints:
        if checkpoints.latest_step is not None:
            raise CheckpointError(f"{folder} holds checkpoints; choose another --workdir")
        meta = describe(run.config, run.spec, run.params)
        meta |= {"imported": {"files": imported.about, "coverage": coverage}}
        checkpoints.save(run.step, state, 0, meta)
        checkpoints.wait()
    (folder.parent / COVERAGE_FILE).write_text(json.dumps(coverage, indent=2) + "\n")
    return folder


def _about(path: Path) -> dict[str, Any]:
    """What a Lightning file says about its run, as plain JSON; nothing where it holds tensors alone."""
    values: Mapping[str, Any] = open_container(path) if is_torch(path) else {}
    names = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")
    return {name: json.loads(json.dumps(values[name], default=str)) for name in names if name in values}
