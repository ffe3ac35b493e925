"""The exported pipeline in diffusers: one step and whole generations, PNDM and DDIM, are ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5_jax.diffusion.samplers import guided
from minigpt5_jax.export import export_torch
from minigpt5_jax.weights.foreign.rewrite import TOWERS
from minigpt5_jax.weights.formats.load import open_weights

STEPS, GUIDANCE = 5, 3.0


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "pipeline"
    export_torch(run_folder("stage1"), path, to="diffusers")
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def example(folder):
    """``example.py`` of the folder, as a module."""
    spec = importlib.util.spec_from_file_location("example", folder / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(example, folder, run_folder, tmp_path_factory):
    """(voken states of a prompt by the example, latents to begin from [1 h w c], the example's mapper)."""
    language_model = tmp_path_factory.mktemp("llm") / "llm"
    export_torch(run_folder("stage1"), language_model, to="transformers")
    mapper = example.FeatureMapper.from_folder(folder / "mapper")
    states = example.voken_states(language_model, "a small red circle", mapper)
    return states, np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32), mapper


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_close(theirs, ours, tolerance=1e-4):
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() <= tolerance * np.abs(ours).max()


def test_states_of_the_example_are_ours(drawn, run_of, hidden_of):
    run = run_of("stage1")
    ids = [1, *run.tokenizer.encode("a small red circle"), *run.tokenizer.voken_ids]
    hidden, _ = hidden_of(run, ids)
    assert_close(drawn[0][0], hidden[-9:-1])


@torch.no_grad()
def test_one_step_and_the_other_towers(pipeline, drawn, run_of, condition_of):
    run, (states, latents, mapper) = run_of("stage1"), drawn
    condition = condition_of(run, states.numpy())
    assert_close(mapper(states), condition)

    @jax.jit
    def ours(params, latents, condition, ids):
        generator = run.spec.template.bind(params).generator
        noise = generator.predict_noise(latents, jnp.array([321]), condition)
        return noise, generator.vae.decode(latents), generator.text_encoder(ids)

    ids = pipeline.tokenizer(["a red circle"], padding="max_length", max_length=77).input_ids
    noise, pixels, text = ours(run.params, latents, condition, jnp.asarray(ids, jnp.int32))
    there = channels_first(latents)
    found = pipeline.unet(there, 321, torch.tensor(condition)).sample
    assert_close(found.permute(0, 2, 3, 1), noise)
    assert_close(pipeline.vae.decode(there).sample.permute(0, 2, 3, 1), pixels)
    assert_close(pipeline.text_encoder(torch.tensor(ids)).last_hidden_state, text)


@pytest.mark.parametrize("name", ["pndm", "ddim"])
def test_a_whole_generation(pipeline, example, drawn, run_of, condition_of, name):
    run, (states, start, mapper) = run_of("stage1"), drawn
    sampler = run.spec.generator.make_sampler(name, STEPS)
    condition = condition_of(run, states.numpy())
    negative = condition_of(run, np.zeros((1, 8, 128), np.float32))

    @jax.jit
    def ours(params, start, condition, negative):
        generator = run.spec.template.bind(params).generator
        both = jnp.concatenate([negative, condition])
        denoise = guided(lambda x, t: generator.predict_noise(x, jnp.full(2, t, jnp.int32), both), GUIDANCE)
        latents = sampler.sample(denoise, start)
        return latents, generator.decode(latents)

    latents, pictures = ours(run.params, start, condition, negative)
    if name == "ddim":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    options = {"latents": channels_first(start), "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    found = example.draw(pipeline, mapper, states, output_type="latent", **options)
    assert_close(found.permute(0, 2, 3, 1), latents)
    [picture] = example.draw(pipeline, mapper, states, **options)
    off = np.abs(np.asarray(picture, int) - np.asarray(pictures[0], int))
    assert off.max() <= 1 and (off > 0).mean() < 0.01, "a rounding, here and there"


def test_the_way_there_and_back_changes_no_bit(folder, run_of):
    run = run_of("stage1")
    for name in ("unet", "vae", "text_encoder"):
        prefix, sizes = f"generator/{name}/", run.spec.sizes[name]
        params = {k.removeprefix(prefix): v for k, v in run.params.items() if k.startswith(prefix)}
        source = open_weights(folder / name)
        table = TOWERS[name].table(source, sizes)
        again = table.to_params(source, {path: value.shape for path, value in params.items()})
        assert again.keys() == params.keys()
        assert all(np.array_equal(again[path], params[path]) for path in params), name


@pytest.mark.slow
def test_the_example_as_a_command(folder, run_folder, tmp_path):
    export_torch(run_folder("stage1"), tmp_path / "llm", to="transformers")
    command = [
        sys.executable,
        "example.py",
        "--language_model",
        str(tmp_path / "llm"),
        "--prompt",
        "a red circle",
        "--output",
        str(tmp_path / "a.png"),
        "--steps",
        "2",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (64, 64)
