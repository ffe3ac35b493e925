"""Runs of the small world as their checkpoints, with trained values far from where they started."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt5_jax.build import build, initial_trainable, load_frozen, tokenizer_identity
from minigpt5_jax.config import use_prefix, use_stage2, validate
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import describe_run, hash_parameters
from minigpt5_jax.tuning import FROZEN

CONFIG = Path(__file__).parents[2] / "configs" / "shapes_stage1.py"
KINDS = ("stage1", "lora", "prefix")


def small_config(kind: str):
    """Configuration of a run in the small world."""
    spec = importlib.util.spec_from_file_location("shapes_stage1", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.mapper.update(num_encoder_layers=2, num_decoder_layers=2)
    if kind == "lora":
        data = config.data.to_dict()
        use_stage2(config).data.update(data)
    if kind == "prefix":
        data = config.data.to_dict()
        use_prefix(use_stage2(config)).data.update(data)
        config.model.backbone.prefix_hidden_size = 16
    return validate(config)


def make_run(folder: Path, kind: str) -> Path:
    """A workdir with one checkpoint of step 7."""
    config = small_config(kind)
    spec = build(config)
    frozen = load_frozen(config, spec, lambda _, value: jnp.asarray(value))
    random = np.random.default_rng(0)
    fresh = {
        path: jnp.asarray(np.asarray(value) + 0.05 * random.standard_normal(value.shape), value.dtype)
        for path, value in initial_trainable(config, spec, frozen).items()
    }
    trainable = {path: value for path, value in fresh.items() if spec.labels[path] != FROZEN}
    inherited = {path: value for path, value in fresh.items() if spec.labels[path] == FROZEN}
    meta = describe_run(
        config.to_dict(),
        tokenizer=tokenizer_identity(config, spec.towers),
        frozen=hash_parameters({**frozen, **inherited}),
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, {"trainable": trainable, **({"inherited": inherited} if inherited else {})}, 0, meta)
    checkpoints.close()
    return folder


@pytest.fixture(scope="session")
def run_of(tmp_path_factory) -> Callable[[str], Path]:
    """``run_of("stage1" | "lora" | "prefix")``: workdir of a run, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_run(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get
