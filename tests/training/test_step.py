"""The train step: frozen leaves, accumulation, meshes, draws."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness, parts_with_gradient
from minigpt5_jax.training import sharding
from minigpt5_jax.training.optimizer import linear_warmup_decay, make_optimizer, with_frozen_masked
from minigpt5_jax.training.sharding import (
    ShardingError,
    batch_shardings,
    lay_out,
    make_mesh,
    partition_spec,
    replicated,
    state_shardings,
)
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import (
    StepOptions,
    accumulate_gradients,
    make_train_step,
)
from minigpt5_jax.training.tuning import FROZEN, label_parameters

OPTIONS = StepOptions(LossOptions(), cfg_dropout=0.3)


@pytest.fixture(scope="module")
def labels(tiny_template):
    return label_parameters(tiny_template.shapes, tiny.rules("stage1"))


def split(params, labels):
    trainable = {path: jnp.array(params[path]) for path in tiny.trainable_paths(labels)}
    return trainable, {path: value for path, value in params.items() if labels[path] == FROZEN}


def constant_rates(labels, rate=1e-2):
    return {group: optax.constant_schedule(rate) for group in set(labels.values()) - {FROZEN}}


def test_frozen_leaves_stay_bit_identical_and_trainables_move(tiny_template, tiny_params, tiny_batch, labels):
    trainable, frozen = split(tiny_params, labels)
    before = {path: np.array(value) for path, value in tiny_params.items()}
    optimizer = make_optimizer(labels, constant_rates(labels))
    step = jax.jit(make_train_step(tiny_template, labels, optimizer, OPTIONS), donate_argnums=0)
    state = init_state(trainable, labels, optimizer, seed=0)
    for seed in range(3):
        state, metrics = step(state, frozen, tiny_batch(8, seed))
    assert int(state.step) == 3 and np.isfinite(metrics["loss"])
    assert all((np.array(value) == before[path]).all() for path, value in frozen.items())
    still = [path for path, value in state.trainable.items() if (np.array(value) == before[path]).all()]
    assert not still, f"these never moved: {still}"
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(value.size for value in state.trainable.values())
    check_that_text_alone_leaves_the_mapper(step, state, frozen, tiny_batch(8, 3))


def check_that_text_alone_leaves_the_mapper(step, state, frozen, batch):
    """Without an item, parameters, moments and count stay as they are; the schedule and the rows go on."""
    before = jax.tree.map(np.array, (state.trainable, state.opt_state.inner_states))
    state, metrics = step(state, frozen, dataclasses.replace(batch, item_mask=np.zeros(8, bool)))
    assert np.isfinite(metrics["text"]) and np.isnan(metrics["image"])
    for path, value in state.trainable.items():
        assert (np.array(value) == before[0][path]).all() == path.startswith("mapper/"), path
    for group, moves in (("mapper", 0), ("llm", 1)):
        (adam, _, rate), (was, _, rate_was) = (
            states[group].inner_state for states in (state.opt_state.inner_states, before[1])
        )
        assert adam.count == was.count + moves and rate.count == rate_was.count + 1, group
        pairs = zip(jax.tree.leaves((adam.mu, adam.nu)), jax.tree.leaves((was.mu, was.nu)), strict=True)
        assert all((np.array(now) == old).all() for now, old in pairs) != moves, group


class Task(NamedTuple):
    """Gradients to be taken in several ways, and what they are on one device in one piece."""

    run: Callable  # (trainable, frozen, batch, options=OPTIONS) -> gradients, loss, sums
    trainable: dict
    frozen: dict
    batch: Batch
    expected: tuple


@pytest.fixture(scope="module")
def task(tiny_template, tiny_params, tiny_batch, labels) -> Task:
    trainable, frozen = split(tiny_params, labels)
    # Uneven counts per micro-batch and device: a mean of means would differ.
    batch = dataclasses.replace(tiny_batch(8), item_mask=np.array([1, 1, 1, 1, 1, 0, 0, 1], bool))
    batch.label_positions[6, 1:] = 0
    generator = tiny_template.bind(tiny_template.shapes).generator

    def run(trainable, frozen, batch, options=OPTIONS):
        def draw(micro):
            return StepRandomness.from_key(
                jax.random.key(3), micro, generator, cfg_dropout=options.cfg_dropout
            )

        return accumulate_gradients(tiny_template, trainable, frozen, batch, draw, options)

    return Task(run, trainable, frozen, batch, jax.jit(run)(trainable, frozen, batch))


def test_accumulation_gives_the_update_of_the_large_batch(task):
    stacked = jax.tree.map(lambda x: x.reshape(4, x.shape[0] // 4, *x.shape[1:]), task.batch)
    stacked = dataclasses.replace(stacked, voken_row=stacked.voken_row % 2)
    run = functools.partial(task.run, options=dataclasses.replace(OPTIONS, accumulation=4))
    grads, loss, sums = jax.jit(run)(task.trainable, task.frozen, stacked)
    np.testing.assert_allclose(loss, task.expected[1], rtol=1e-6)
    for name, (total, count) in task.expected[2].items():
        np.testing.assert_allclose(sums[name][0], total, rtol=1e-5, err_msg=name)
        assert count == sums[name][1]
    assert_close(grads, task.expected[0])


def assert_close(got, want, tolerance=1e-5):
    largest = max(np.abs(value).max() for value in want.values())
    for path in want:
        # A key's bias has no gradient (softmax ignores a shift of all keys): what is there is rounding.
        scale = largest if path.endswith("k_proj/bias") else np.abs(want[path]).max()
        error = np.abs(np.asarray(got[path]) - np.asarray(want[path])).max()
        assert error <= tolerance * scale, f"{path}: {error / scale:.1e}"


def test_state_shardings_follow_their_parameter(tiny_template, labels, monkeypatch):
    mesh = make_mesh(2, 2, 2)
    optimizer = make_optimizer(labels, constant_rates(labels))
    monkeypatch.setattr(sharding, "LARGE", 512)
    paths = tiny.trainable_paths(labels)
    shardings = lay_out(tiny_template.shapes, tiny_template.axes, paths, mesh, tiny.sharding()).stored
    state = jax.eval_shape(
        lambda: init_state(
            {p: jnp.zeros(tiny_template.shapes[p].shape) for p in tiny.trainable_paths(labels)},
            labels,
            optimizer,
            0,
        )
    )
    places = state_shardings(state, shardings, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    assert places.step == replicated(mesh)
    for path in tiny.trainable_paths(labels):
        assert places.trainable[path] == shardings[path]
    adam = places.opt_state.inner_states["mapper"].inner_state[0]
    path = "mapper/decoder/layers/feed_forward/linear1/kernel"
    assert adam.mu[path] == adam.nu[path] == shardings[path] and "data" in str(shardings[path].spec)


def test_what_does_not_divide_is_an_error_with_the_numbers(tiny_batch):
    with pytest.raises(ShardingError, match=r"3.*8 devices"):
        make_mesh(data=3)
    mesh = make_mesh(1, 1, 8)
    with pytest.raises(ShardingError, match=r"4 heads.*'tensor' of 8"):
        partition_spec("backbone/llm/q", (32, 32), ("embed", ("heads", 4)), mesh, tiny.sharding())
    with pytest.raises(ShardingError, match=r"tokens has 6 entries.*8 devices"):
        batch_shardings(tiny_batch(6), make_mesh(8, 1, 1))


def test_draws_depend_on_key_and_item_only(tiny_template, tiny_batch):
    generator = tiny_template.bind(tiny_template.shapes).generator

    def draws(key, ids):
        batch = dataclasses.replace(tiny_batch(3), item_id=ids, row_id=ids)
        return StepRandomness.from_key(
            jax.random.key(key), batch, generator, cfg_dropout=0.5, lora_dropout=True
        )

    ids = jnp.array([7, 11, 400])
    whole, part, other = draws(0, ids), draws(0, ids[2:]), draws(1, ids)
    assert whole.timesteps[2] == part.timesteps[0] and (whole.noise[2] == part.noise[0]).all()
    assert (jax.random.key_data(whole.dropout_keys[2]) == jax.random.key_data(part.dropout_keys[0])).all()
    assert (whole.noise != other.noise).any() and (whole.noise[0] != whole.noise[1]).any()
    assert (whole.noise != whole.posterior_noise).any()


def test_learning_rate_is_the_originals():
    rate = linear_warmup_decay(2e-4, 1000, 5000)
    got = [float(rate(s)) for s in (0, 500, 1000, 3000, 5000, 6000)]
    np.testing.assert_allclose(got, [0.0, 1e-4, 2e-4, 1e-4, 0.0, 0.0], atol=1e-9)
    with pytest.raises(ValueError, match="warmup_steps=10 .* 10 steps"):
        linear_warmup_decay(1e-4, 10, 10)


def test_clip_is_taken_over_trainables_only(labels):
    optimizer = make_optimizer(labels, constant_rates(labels), grad_clip=1.0)
    trainable = {path: jnp.ones(3) for path in tiny.trainable_paths(labels)}
    state = init_state(trainable, labels, optimizer, 0)
    frozen = [path for path in labels if labels[path] == FROZEN]
    masked = {**{p: 100.0 * jnp.ones(3) for p in trainable}, **{p: optax.MaskedNode() for p in frozen}}
    updates, _ = optimizer.update(masked, state.opt_state, masked)
    assert all(isinstance(updates[path], optax.MaskedNode) for path in frozen)


def test_parts_without_gradient_stay_as_in_torch():
    """AdamW of torch with ``grad`` None where a part is not reached, by the original's schedule, clipped."""
    labels = {"backbone/rows": "llm", "mapper/fc": "mapper", "generator/w": "mapper", "backbone/w": FROZEN}
    random = np.random.default_rng(0)
    values = {path: random.standard_normal(5).astype(np.float32) for path in labels}
    rates = {"llm": 1e-2, "mapper": 3e-2}
    schedules = {group: linear_warmup_decay(rate, 2, 9) for group, rate in rates.items()}
    optimizer = make_optimizer(labels, schedules, weight_decay=0.1, grad_clip=2.0)
    state = init_state({p: jnp.array(values[p]) for p in values if labels[p] != FROZEN}, labels, optimizer, 0)
    trained, opt_state = state.trainable, state.opt_state
    theirs = {path: torch.nn.Parameter(torch.tensor(values[path])) for path in trained}
    groups = [{"params": [theirs[path]], "lr": rates[labels[path]]} for path in trained]
    adamw = torch.optim.AdamW(groups, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: float(linear_warmup_decay(1.0, 2, 9)(step))
    )
    for mapper, generator in ((1, 1), (0, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 1)):
        reached = {"backbone": True, "mapper": bool(mapper), "generator": bool(generator)}
        grads = {
            path: reached[path.split("/")[0]] * random.standard_normal(5).astype(np.float32)
            for path in trained
        }
        for path, value in theirs.items():
            value.grad = torch.tensor(grads[path]) if reached[path.split("/")[0]] else None
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 2.0)
        adamw.step()
        schedule.step()
        updates, opt_state = optimizer.update(
            with_frozen_masked(grads, labels), opt_state, with_frozen_masked(trained, labels), reached=reached
        )
        trained = optax.apply_updates(trained, {path: updates[path] for path in trained})
        for path, value in trained.items():
            np.testing.assert_allclose(
                value, theirs[path].detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path
            )


def test_a_loss_that_counted_nothing_reaches_no_part():
    def reached(text, image, names=("text", "image")):
        sums = {"text": (jnp.zeros(()), jnp.float32(text)), "image": (jnp.zeros(()), jnp.float32(image))}
        found = parts_with_gradient(sums, LossOptions(dict.fromkeys(names, 1.0)))
        return [kind for kind, some in found.items() if some]

    assert reached(3, 1) == reached(0, 1) == ["backbone", "mapper", "generator"]
    assert reached(3, 0) == ["backbone"]
    assert reached(3, 0, ["image"]) == reached(0, 0) == []  # without its loss, text gives no gradient


def test_tuning_patterns_are_strict():
    with pytest.raises(ValueError, match="no tuning pattern matches"):
        label_parameters(["mapper/x", "generator/y"], [("mapper/.*", "mapper")])
    with pytest.raises(ValueError, match="match no parameter.*mappr"):
        label_parameters(["mapper/x"], [("mappr/.*", "mapper"), (".*", "frozen")])
