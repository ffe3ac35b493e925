"""Runs of the small world as their checkpoints, with trained values of a trained size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from minigpt5_jax.config import use_prefix, use_stage2, validate
from minigpt5_jax.wiring.model import ModelSpec, build
from minigpt5_jax.wiring.restore import load_run, not_pretrained
from minigpt5_jax.wiring.session import LoadedModel
from tiny import run_file


def small_config(kind: str):
    """Configuration of a run in the small world: ``stage1``, ``lora`` or ``prefix``."""
    config = run_file("shapes_stage1").get_config()
    config.model.mapper.update(num_encoder_layers=2, num_decoder_layers=2)
    if kind != "stage1":
        data = config.data.to_dict()
        use_stage2(config).data.update(data)
    if kind == "prefix":
        use_prefix(config).model.backbone.prefix_hidden_size = 16
    return validate(config)


def trained_values(spec: ModelSpec) -> dict[str, jnp.ndarray]:
    """Random values for all that training makes, none of them zero or one."""
    random = np.random.default_rng(0)

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = random.standard_normal(shape)
        if path.endswith("scale"):
            return 1 + 0.1 * noise
        return noise / np.sqrt(shape[-2]) if path.endswith(("kernel", "lora_a")) else 0.1 * noise

    return {
        path: jnp.asarray(value(path, shape.shape), shape.dtype)
        for path, shape in spec.template.shapes.items()
        if not_pretrained(path, spec)
    }


def make_run(folder: Path, kind: str) -> Path:
    """A workdir with one checkpoint, of step 7."""
    config = small_config(kind)
    return tiny.save_run(config, folder, trained_values(build(config)))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Callable[[str], Path]:
    """``run_folder("stage1" | "lora" | "prefix")``: workdir of a run, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_run(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def run_of(run_folder) -> Callable[[str], LoadedModel]:
    """The same run, loaded."""
    loaded: dict[str, LoadedModel] = {}

    def get(kind: str) -> LoadedModel:
        if kind not in loaded:
            loaded[kind] = load_run(run_folder(kind))
        return loaded[kind]

    return get


@pytest.fixture(scope="session")
def hidden_of() -> Callable[[LoadedModel, list[int]], tuple[np.ndarray, np.ndarray]]:
    """``hidden_of(run, ids)``: final states [t d] and logits [t V] of one row."""
    import jax

    def get(run: LoadedModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        @jax.jit
        def forward(params, tokens):
            llm = run.spec.template.bind(params).backbone.llm
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            states = llm(llm.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
            return states, jnp.concatenate(llm.logit_blocks(states), -1)

        states, logits = forward(run.params, jnp.asarray([ids], jnp.int32))
        return np.asarray(states[0]), np.asarray(logits[0])

    return get


@pytest.fixture(scope="session")
def condition_of() -> Callable[[LoadedModel, np.ndarray], np.ndarray]:
    """``condition_of(run, states)``: the mapper's output."""
    import jax

    def get(run: LoadedModel, states: np.ndarray) -> np.ndarray:
        forward = jax.jit(lambda params, x: run.spec.template.bind(params).condition(x))
        return np.asarray(forward(run.params, jnp.asarray(states)))

    return get
