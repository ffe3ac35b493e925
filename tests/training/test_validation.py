"""What training and validation say of the image loss at each noise level, and of held-out images."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from minigpt5_jax.config import get_config, use_shapes_backbones, validate
from minigpt5_jax.evaluation import held_out as watch
from minigpt5_jax.evaluation.held_out import watchers
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import Object, Scene
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.training.step import means
from minigpt5_jax.training.validation import make_validation_step
from minigpt5_jax.wiring.inputs import open_sources
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.training import make_loop

IMAGE_ONLY = LossOptions({"image": 1.0})
BINS = ("image_t0_249", "image_t250_499", "image_t500_749", "image_t750_999")


@pytest.fixture(scope="module")
def losses(tiny_template, tiny_params):
    """``f(batch, timesteps) -> {name: (sum, count)}`` of the image loss and its bins."""
    generator = tiny_template.bind(tiny_template.shapes).generator

    @jax.jit
    def run(params, batch, timesteps):
        draws = StepRandomness.from_key(jax.random.key(0), batch, generator)  # as validation draws
        draws = dataclasses.replace(draws, timesteps=timesteps)
        found, more = tiny_template.bind(params).losses(batch, draws, IMAGE_ONLY)
        return {**found, **more}

    return functools.partial(run, tiny_params)


def test_bins_of_the_image_loss_split_the_items(losses, tiny_batch):
    batch = dataclasses.replace(tiny_batch(8), item_mask=np.array([1, 1, 1, 1, 1, 1, 0, 1], bool))
    timesteps = jnp.array([0, 249, 250, 499, 500, 749, 600, 999])
    sums = losses(batch, timesteps)
    assert sums.keys() == {"image", *BINS}
    np.testing.assert_allclose(sum(sums[name][0] for name in BINS), sums["image"][0], rtol=1e-6)
    assert [int(sums[name][1]) for name in BINS] == [2, 2, 2, 1] and sums["image"][1] == 7
    alone = losses(dataclasses.replace(batch, item_mask=np.arange(8) == 7), timesteps)
    np.testing.assert_allclose(alone["image"][0], sums[BINS[3]][0], rtol=1e-6)
    assert np.isnan(means(alone)[BINS[0]]), "an empty bin is no zero; metrics leave it out"


def test_fixed_levels_are_reported_one_by_one(losses, tiny_template, tiny_params, tiny_batch):
    batch = dataclasses.replace(tiny_batch(8), item_mask=np.array([1, 1, 1, 0, 1, 1, 1, 1], bool))
    both = jax.jit(make_validation_step(tiny_template, IMAGE_ONLY, (50, 900)))({}, tiny_params, batch)
    assert both.keys() == {"image", "image_t50", "image_t900", "image_swapped", "image_unconditional"}
    assert int(both["image_t50"][1]) == int(both["image"][1]) == 7
    got = means(both)
    np.testing.assert_allclose(got["image"], (got["image_t50"] + got["image_t900"]) / 2, rtol=1e-6)
    alone = means(losses(batch, jnp.full(8, 900)))
    np.testing.assert_allclose(alone["image"], got["image_t900"], rtol=1e-5)


# ------------------------------------------------------------------------------ held-out images


def coloured(mask, first=0):
    """A batch that is nothing but targets of one colour each."""
    colours = first + np.arange(8, dtype=np.uint8)
    batch = dataclasses.replace(
        tiny.make_tiny_batch(8), item_mask=np.array(mask, bool), item_id=np.int32(colours)
    )
    return dataclasses.replace(batch, target=np.broadcast_to(colours[:, None, None, None], (8, 4, 4, 3)))


def test_images_are_drawn_for_the_first_batch_that_has_any():
    calls = []

    def draw(params, batch, keys):
        jax.debug.callback(lambda: calls.append(1))
        return batch.target + params["a"] + params["b"]

    batches = [coloured([0] * 8), coloured([0, 1, 0, 0, 0, 1, 0, 0], 10), coloured([1] * 8, 20)]
    frozen = {"a": jnp.uint8(100)}
    drawn = watch.HeldOutImages(draw, batches, frozen, make_mesh(8, 1, 1), seed=0)
    assert drawn.targets[:, 0, 0, 0].tolist() == [11, 15]
    one, two = {"b": jnp.uint8(1)}, {"b": jnp.uint8(2)}
    assert drawn(one)[:, 0, 0, 0].tolist() == [112, 116]
    assert drawn(one) is drawn(one), "a grid and a score of one step are drawn once"
    assert drawn(two)[:, 0, 0, 0].tolist() == [113, 117]
    jax.effects_barrier()
    assert len(calls) == 2
    assert not len(watch.HeldOutImages(draw, batches[:1], frozen, make_mesh(8, 1, 1), seed=0).targets)


def test_a_cut_update_shows_the_same_images():
    def draw(params, batch, keys):
        return batch.target + jax.vmap(lambda key: jax.random.bits(key, (1, 1, 1), "uint8"))(keys)

    whole, mesh = coloured([0, 1, 0, 0, 0, 1, 1, 0]), make_mesh(devices=jax.devices()[:1])
    halves = [jax.tree.map(lambda x, at=at: x[at : at + 4], whole) for at in (0, 4)]
    one = watch.HeldOutImages(draw, [whole], {}, mesh, seed=0)
    two = watch.HeldOutImages(draw, halves, {}, mesh, seed=0, micro=2)
    assert two.targets.tolist() == one.targets.tolist() and two({}).tolist() == one({}).tolist()


def test_held_out_samples_are_the_same_however_an_update_is_cut(tmp_path):
    config = use_shapes_backbones(get_config())
    config.run.update(workdir=str(tmp_path), eval_batches=2)
    config.data.update(format="shapes", shapes_train=8, shapes_validation=13, global_batch=8)
    config.data.update(max_length=64, flip_mode="off", accumulation=1)
    spec = build(validate(config))
    source = open_sources(config, spec.sizes)[1]

    def texts(batches):
        return [row.tolist() for batch in batches for row in batch.tokens]

    whole = watch.held_out_batches(config, spec, source)
    config.data.accumulation = 4
    cut = watch.held_out_batches(config, spec, source)
    assert [len(batch.tokens) for batch in whole] == [8, 8] and len(cut) == 7
    assert texts(cut) == texts(whole)[:14]


def test_the_oracle_compares_drawn_images_with_the_datas():
    def scene(colour, background):
        return Scene(background, (Object(0, 1, 0, 0, 0), Object(1, colour, 1, 2, 3)))

    targets = render([scene(n, 0) for n in range(4)])
    assert set(watch.oracle_score(targets, targets).values()) == {1.0}
    drawn = render([scene(0, 0), scene(2, 0), scene(2, 3), scene(3, 0)])
    got = watch.oracle_score(drawn, targets)
    assert got["oracle_all"] == 0.5 and got["oracle_colour"] == got["oracle_background"] + 0.0 == 0.75
    assert got["oracle_place"] == got["oracle_shape"] == got["oracle_texture"] == got["oracle_size"] == 1.0


def test_only_images_of_the_small_world_are_judged():
    config = get_config()
    config.model.generator.image_size = 64
    assert not watch.readable(config)
    for name in ("shapes", "shapes_stories", "shapes_dialogs"):
        config.data.format = name
        assert watch.readable(config)
    config.model.generator.image_size = 128
    assert not watch.readable(config)


@pytest.mark.slow
def test_a_run_shows_itself(tmp_path, capfd):
    """Two steps of a random model on scenes: what is in the bar, in metrics.jsonl, and in the images."""
    config = tiny.write_oracle_sources(tmp_path / "weights")
    config.model.backbone.update(vit="none", qformer="none")
    config.data.update(
        format="shapes",
        shapes_train=16,
        shapes_validation=8,
        global_batch=8,
        worker_count=0,
        max_length=200,
        flip_mode="off",
    )
    config.run.update(workdir=str(tmp_path / "run"), num_steps=2, log_every=1, eval_every=2, grid_every=2)
    config.inference.update(sampler="ddim", num_inference_steps=2)
    config.optimizer.warmup_steps = 1
    results = make_loop(validate(config), watchers).run()
    lines = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    trained = set().union(*(line for line in lines if "loss" in line))
    assert {"loss", "text", "image", "caption", "voken_emission", "grad_norm", "samples_per_s"} <= trained
    assert any(name in trained for name in BINS)
    (validated,) = [line for line in lines if "validation/image" in line]
    assert {"validation/" + name: value for name, value in results.items()}.items() <= validated.items()
    wanted = {"text", "caption", "voken_emission", "image", "image_t100", "image_swapped", "oracle_all"}
    assert wanted <= results.keys() and 0 <= results["oracle_place"] <= 1
    shown = capfd.readouterr().err
    assert "step 2, held out:" in shown and "oracle_all 0." in shown
    assert "samples/s, loss" in shown, "the bar has rate and losses"
    assert (tmp_path / "run/images/held_out_000002.png").is_file()
