"""The whole composite against numbers recorded from the original code (tests/oracle, case ``s1/a``).

Same weights, same draws: every intermediate, every loss, every trainable gradient and two updates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness, make_template
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text.model import ClipTextConfig
from minigpt5_jax.models.common import Params
from minigpt5_jax.models.eva_vit.model import EvaVitConfig
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.mapper.model import MapperConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet.model import UNetConfig
from minigpt5_jax.models.vae.model import VaeConfig, sample_posterior
from minigpt5_jax.training import tuning
from minigpt5_jax.training.optimizer import linear_warmup_decay, make_optimizer
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters
from minigpt5_jax.weights.foreign import minigpt5 as maps
from minigpt5_jax.weights.table import Table, WeightTableError

TABLE_DECAY = f"backbone/llm{tuning.TABLE_DECAY}"

FORWARD, GRADIENT = 2e-6, 3e-5  # what the README of the oracle promises ("about")
UNET = 4e-6  # the deepest tower: the order in which a processor sums moves it by as much as that


def assert_close(ours, theirs, tolerance, message=""):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, message
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"{message}: {error:.1e}"


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


class Case(NamedTuple):
    """The composite with the oracle's weights, and what it was run on."""

    template: Template
    table: Table
    params: Params
    batch: Batch
    draws: StepRandomness
    numbers: dict[str, np.ndarray]


def make_composite(configs: dict, empty_caption_ids: tuple[int, ...]) -> tuple[Template, Table]:
    """Template of the oracle's model, vision tower included, and its weight table."""
    vit = EvaVitConfig.from_eva(configs["eva_vit"])
    qformer = QFormerConfig.from_hf(
        configs["qformer_bert"],
        encoder_hidden_size=vit.hidden_size,
        num_query_tokens=configs["num_query_token"],
        cross_attention_frequency=configs["cross_attention_freq"],
    )
    llm = LlamaConfig.from_hf(configs["llama"])
    mapper = {name: value for name, value in configs["mapper"].items() if name != "n_queries"}
    template = make_template(
        ("minigpt4", {"llm": llm, "vit": vit, "qformer": qformer, "decay_tables": True}),
        (
            "encoder_decoder",
            {
                "config": MapperConfig(
                    llm_hidden_size=llm.hidden_size, num_queries=configs["mapper"]["n_queries"], **mapper
                )
            },
        ),
        (
            "stable_diffusion",
            {
                "unet": UNetConfig.from_hf(configs["unet"]),
                "vae": VaeConfig.from_hf(configs["vae"]),
                "text_encoder": ClipTextConfig.from_hf(configs["sd_text_encoder"]),
                "schedule": NoiseSchedule.from_hf(configs["scheduler"]),
                "image_size": configs["output_resolution"],
                "empty_caption_ids": empty_caption_ids,
            },
        ),
    )
    return template, maps.table(vit, qformer)


def make_batch(numbers: dict[str, np.ndarray], tokenizer: ClipTokenizer) -> Batch:
    """The recorded batch in our terms: BOS in front, targets as bytes, positions of the labels."""
    ids = numbers["in/input_ids"].astype(np.int32)
    tokens = np.concatenate([np.full((2, 1), 1, np.int32), ids], axis=1)
    labels = numbers["mid/llm_labels"].astype(np.int32)
    target = np.round((numbers["in/output_image"] + 1) * 127.5).astype(np.uint8)
    assert (target / np.float32(127.5) - 1 == numbers["in/output_image"]).all()
    column = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    caption_ids, caption_mask = tokenizer.encode([str(text) for text in numbers["in/caption"]])
    return Batch(
        tokens=tokens,
        labels=labels,
        label_positions=np.stack([np.flatnonzero(row != -100) for row in labels]).astype(np.int32),
        positions=column,
        segment_ids=numbers["mid/llm_attention_mask"].astype(np.int32),
        row_id=np.arange(2, dtype=np.int32),
        images=np.zeros((0, 224, 224, 3), np.uint8),
        image_row=np.zeros(0, np.int32),
        image_start=np.zeros(0, np.int32),
        image_mask=np.zeros(0, bool),
        target=channels_last(target),
        voken_row=np.arange(2, dtype=np.int32),
        voken_start=np.argwhere(labels == 1000)[:, 1].astype(np.int32),
        item_id=np.arange(2, dtype=np.int32),
        item_mask=np.ones(2, bool),
        caption_ids=caption_ids,
        caption_mask=caption_mask,
        has_caption=np.ones(2, bool),
    )


@pytest.fixture(scope="module")
def case(oracle_dir, oracle_configs, oracle_weights, oracle_cases) -> Case:
    numbers = {k.removeprefix("s1/a/"): v for k, v in oracle_cases.items() if k.startswith("s1/a/")}
    numbers["empty_text_feature"] = oracle_cases["s1/empty_text_feature"]
    tokenizer = ClipTokenizer(oracle_dir / "tokenizer_clip")
    empty = tuple(int(i) for i in tokenizer.encode([""])[0][0])
    template, table = make_composite(oracle_configs, empty)
    shapes = {path: s.shape for path, s in template.shapes.items() if path != TABLE_DECAY}
    params = table.to_params(maps.split_rows(oracle_weights), shapes)
    params[TABLE_DECAY] = np.zeros((), np.float32)
    draws = StepRandomness(
        timesteps=numbers["rng/timesteps"].astype(np.int32),
        noise=channels_last(numbers["rng/noise"]),
        posterior_noise=channels_last(numbers["rng/posterior_noise"]),
        cfg_drop=numbers["rng/cfg_random"] < 0.1,
    )
    batch = make_batch(numbers, tokenizer)
    batch, draws, params = jax.tree.map(jnp.asarray, (batch, draws, params))
    return Case(template, table, params, batch, draws, numbers)


@pytest.fixture(scope="module")
def labels(case) -> dict[str, str]:
    return label_parameters(case.template.shapes, tiny.rules("stage1"))


def trainables_of(case: Case, group: str) -> dict[str, np.ndarray]:
    """What was recorded under ``group/<original name>``, by our paths (new rows only)."""
    source = {k.removeprefix(group): v for k, v in case.numbers.items() if k.startswith(group)}
    source = {name: value for name, value in source.items() if name not in ("lr", "loss")}
    shapes = {path: s.shape for path, s in case.template.shapes.items()}
    paths = set(tiny.trainable_paths(label_parameters(shapes, tiny.rules("stage1")))) - {TABLE_DECAY}
    return maps.stage1_to_params(source, {path: shapes[path] for path in paths})


def test_every_tensor_is_read_and_written_back(case, oracle_weights):
    assert len(oracle_weights) == 1267 and case.params.keys() == case.template.shapes.keys()
    known = {path: np.asarray(value) for path, value in case.params.items() if path != TABLE_DECAY}
    again = maps.join_rows(case.table.to_source(known))
    buffers = {name for name in oracle_weights if name.endswith(("rotary_emb.inv_freq", "position_ids"))}
    assert len(buffers) == 4 and again.keys() == oracle_weights.keys() - buffers
    assert all(np.array_equal(again[name], oracle_weights[name]) for name in again)


def test_a_stray_or_missing_tensor_is_named(case, oracle_weights):
    shapes = {path: s.shape for path, s in case.template.shapes.items() if path != TABLE_DECAY}
    source = maps.split_rows(oracle_weights)
    lost = "model.llama_proj.bias"
    with pytest.raises(WeightTableError, match="backbone/llama_proj/bias"):
        case.table.to_params({k: v for k, v in source.items() if k != lost}, shapes)
    with pytest.raises(WeightTableError, match=r"unet\.conv_in\.scale"):
        case.table.to_params({**source, "unet.conv_in.scale": np.ones(3)}, shapes)


def test_the_131_tensors_of_a_stage1_file(case, labels, oracle_dir):
    container = torch.load(oracle_dir / "stage1.ckpt", map_location="cpu", weights_only=False)
    source = {name: value.numpy() for name, value in container["state_dict"].items()}
    assert len(source) == 131
    paths = set(tiny.trainable_paths(labels)) - {TABLE_DECAY}
    params = maps.stage1_to_params(source, {path: case.template.shapes[path].shape for path in paths})
    assert params.keys() == paths
    tables = {
        name: source[maps.LLAMA_PREFIX + name][:-9]
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    again = maps.trained_to_source(params, tables["model.embed_tokens.weight"], tables["lm_head.weight"].T)
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[name], source[name]) for name in source)


def test_every_intermediate_is_the_originals(case):
    batch, draws, numbers = case.batch, case.draws, case.numbers
    supervised = np.argwhere(numbers["mid/llm_labels"][:, 1:] != -100)

    @jax.jit
    def run(params, batch, draws):
        model = case.template.bind(params)
        found = {"llm_inputs_embeds": model.backbone.embed(batch)}
        out = model.outputs(batch, draws)
        found["hidden"] = out.hidden
        states = out.hidden[supervised[:, 0], supervised[:, 1]]
        found["llm_logits_supervised"] = jnp.concatenate(model.backbone.logit_blocks(states), -1)
        vokens = model.voken_states(out.hidden, batch.voken_row, batch.voken_start)
        found["mapper_in"] = jnp.where(draws.cfg_drop[:, None, None], 0.0, vokens)
        found["fc_out"] = model.mapper.fc(found["mapper_in"])
        found["mapper_memory"] = model.mapper.encoder(found["fc_out"].astype(jnp.float32))
        found["mapper_out"] = out.condition
        generator = model.generator
        found["vae_moments"] = generator.moments(batch.target)
        latents = model.target_latents(batch, draws)
        sampled = sample_posterior(found["vae_moments"], draws.posterior_noise)
        found["latents"], found["scaled"] = latents, generator.scaling_factor * sampled
        found["unet_in"] = generator.schedule.add_noise(latents, draws.noise, draws.timesteps)
        found["unet_out"] = generator.predict_noise(found["unet_in"], draws.timesteps, out.condition)
        found["caption_feature"] = generator.caption_features(batch.caption_ids, batch.caption_mask)[:1]
        found["empty_text_feature"] = generator.empty_caption_features()[None]
        return found

    found = run(case.params, batch, draws)
    np.testing.assert_array_equal(found.pop("latents"), found.pop("scaled"))
    real = numbers["mid/llm_attention_mask"] > 0
    hidden, embeds = np.asarray(found.pop("hidden")), np.asarray(found.pop("llm_inputs_embeds"))
    assert_close(hidden[real], numbers["mid/llm_all_hidden"][-1][real], FORWARD, "hidden")
    assert_close(embeds[real], numbers["mid/llm_inputs_embeds"][real], FORWARD, "embeds")
    empty = numbers["empty_text_feature"].reshape(found["empty_text_feature"].shape)
    assert_close(found.pop("empty_text_feature"), empty, FORWARD, "empty_text_feature")
    for name, value in found.items():
        want = numbers[f"mid/{name}"]
        tolerance = UNET if name == "unet_out" else FORWARD
        assert_close(value, channels_last(want) if want.ndim == 4 else want, tolerance, name)


def recorder() -> optax.GradientTransformation:
    """Keeps the gradients it is given in its state."""
    return optax.GradientTransformation(
        lambda params: params, lambda grads, state, params=None: (grads, grads)
    )


def test_losses_gradients_and_two_updates_are_the_originals(case, labels):
    numbers = case.numbers
    trainable = {path: case.params[path] for path in tiny.trainable_paths(labels)}
    frozen = {path: value for path, value in case.params.items() if labels[path] == FROZEN}
    hyper = numbers["optim/hyper"]  # a row per group: betas, eps, weight decay, learning rate
    rates = {"llm": float(hyper[0, 4]), "mapper": float(hyper[1, 4])}
    num_steps = int(numbers["optim/estimated_stepping_batches"])
    schedules = {group: linear_warmup_decay(rate, 0, num_steps) for group, rate in rates.items()}
    b1, b2, eps, decay = (float(x) for x in hyper[0, :4])
    optimizer = make_optimizer(labels, schedules, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    optimizer = optax.chain(recorder(), optimizer)
    step = make_train_step(
        case.template, labels, optimizer, StepOptions(LossOptions()), draw=lambda key, micro: case.draws
    )
    state, step = init_state(trainable, labels, optimizer, seed=0), jax.jit(step)
    for number in (1, 2):
        rate = [schedules[group](number - 1) for group in ("llm", "mapper", "mapper", "mapper")]
        np.testing.assert_allclose(rate, numbers[f"step{number}/lr"], rtol=1e-6)
        state, metrics = step(state, frozen, case.batch)
        if number == 1:
            for name in ("text", "image", "caption"):
                assert_close(metrics[name], numbers[f"out/{name}_loss"], FORWARD, name)
            assert_close(metrics["loss"], numbers["out/loss"], FORWARD, "loss")
            check_gradients(state.opt_state[0], trainables_of(case, "grad/"))
        assert_close(metrics["loss"], numbers[f"step{number}/loss"], 1e-5, f"loss of step {number}")
        check_update(case, state.trainable, number, {path: rates[labels[path]] for path in trainable})
    assert state.step == 2
    check_export(case, state.trainable, rates)


def check_gradients(grads, want):
    found = {path for path, gradient in grads.items() if not isinstance(gradient, optax.MaskedNode)}
    assert found == want.keys() | {TABLE_DECAY} and grads[TABLE_DECAY] == 0
    for path in want:
        if path.endswith("k_proj/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-6, path
        else:
            assert_close(grads[path], want[path], GRADIENT, path)


def check_update(case, trainable, number, rates):
    """Values after an update, where the gradient is more than noise: a first update is nearly
    ``rate * sign(g)``, so noise would decide its direction."""
    want, gradients = trainables_of(case, f"step{number}/"), trainables_of(case, "grad/")
    for path, value in trainable.items():
        if path != TABLE_DECAY and not path.endswith("k_proj/bias"):
            clear = np.abs(gradients[path]) >= 1e-4 * np.abs(gradients[path]).max()
            error = np.abs(np.asarray(value) - want[path])[clear].max() / rates[path]
            assert error < 5e-3, f"{path} after update {number}: off by {error:.1e} updates"


def check_export(case, trainable, rates):
    """The 131 tensors an export writes after two updates, against those the original had then: whole tables,
    stacked projections.  Their old rows have shrunk by weight decay; here a share says by how much (Q3)."""
    paths = ("backbone/llm/embed_tokens/embedding", "backbone/llm/lm_head/kernel")
    shrunk = 1 - np.asarray(trainable[TABLE_DECAY])
    tables = (np.asarray(case.params[path]) * shrunk for path in paths)
    known = {path: np.asarray(value) for path, value in trainable.items() if path != TABLE_DECAY}
    exported = maps.trained_to_source(known, *tables)
    want, gradients = (
        {k.removeprefix(group): v for k, v in case.numbers.items() if k.startswith(group)}
        for group in ("step2/", "grad/")
    )
    assert exported.keys() == want.keys() - {"lr", "loss"} and len(exported) == 131
    for name, value in exported.items():
        table = name.startswith(maps.LLAMA_PREFIX)
        clear = np.abs(gradients[name]) >= 1e-4 * np.abs(gradients[name]).max()
        if table:
            assert not clear[:-9].any()
            np.testing.assert_allclose(value[:-9], want[name][:-9], rtol=2e-7)
        error = np.abs(value - want[name])[clear].max() / rates["llm" if table else "mapper"]
        assert error < 5e-3, f"{name}: off by {error:.1e} updates"
