"""The reduced model of rows 4, 12 and 13, with the same random weights on both sides.

They are made once in PyTorch, written as published files are, and read by the project's own loading.

Sizes and data are those of performance.md 6, row 12: LLaMA 512 x 8 with 4,000 rows, a UNet of 64 to 256
channels on 32 x 32 latents, captions of CC3M's lengths that fit 32 positions, fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ml_collections import ConfigDict

from benchmarks import lengths
from benchmarks.peers.samples import Sample
from benchmarks.peers.towers import REDUCED, Sizes, Towers, make_towers
from benchmarks.run_files import loader_of, on_drawn_samples, read_run_file
from benchmarks.samples import Captions
from minigpt5_jax.batch import Batch
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text.templates import expand
from minigpt5_jax.minigpt5 import StepRandomness
from minigpt5_jax.models.mapper.weights import TABLE as MAPPER_TABLE
from minigpt5_jax.parts.contracts import FROZEN, find
from minigpt5_jax.training.state import TrainState, init_state
from minigpt5_jax.training.step import make_train_step
from minigpt5_jax.wiring.features import make_encoder
from minigpt5_jax.wiring.model import (
    ModelSpec,
    build,
    caption_tokenizer,
    initial_trainable,
    language_tokenizer,
    load_frozen,
)

SEED = 0
BATCH = 12
LONGEST_CAPTION = 21  # with BOS, vokens and end it fits 32 positions
EMBEDDINGS, HEAD = "backbone/llm/embed_tokens/voken", "backbone/llm/lm_head/voken"
MAPPER = "mapper/"


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The model on both sides.

    Attributes:
      towers: the peers' frozen towers.  config, spec: ours, of ``configs/stage1.py``.
      frozen, trainable: our parameters.
    """

    towers: Towers
    config: ConfigDict
    spec: ModelSpec
    frozen: dict[str, jax.Array]
    trainable: dict[str, jax.Array]

    @property
    def params(self) -> dict[str, jax.Array]:
        """All of our parameters."""
        return {**self.frozen, **self.trainable}

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Start values of the new tokens' embeddings and rows of the head, for the peers."""
        return np.array(self.trainable[EMBEDDINGS]), np.array(self.trainable[HEAD])

    @property
    def mapper(self) -> dict[str, torch.Tensor]:
        """Start values of the mapper, for the peers."""
        own = {p.removeprefix(MAPPER): v for p, v in self.trainable.items() if p.startswith(MAPPER)}
        return {name: torch.from_numpy(np.array(v)) for name, v in MAPPER_TABLE.to_source(own).items()}

    @functools.cached_property
    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of the empty caption."""
        ids, mask = caption_tokenizer(self.config, self.spec.sizes).encode([""])
        return ids[0], mask[0]


def make_reduced(sizes: Sizes = REDUCED, device: str = "cpu", batch: int = BATCH) -> Reduced:
    """The model: towers drawn by seed, ours read from their files."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        towers = make_towers(sizes, "cpu", SEED)
        write_towers(towers, root)
        config = configure(sizes, root, batch)
        spec = build(config)
        frozen = load_frozen(config, spec)
        fresh = initial_trainable(config, spec, frozen)
    values = {**frozen, **fresh}
    for tower in (towers.llama, towers.unet, towers.vae, towers.clip):
        tower.to(device)
    return Reduced(
        towers,
        config,
        spec,
        {path: value for path, value in values.items() if spec.labels[path] == FROZEN},
        {path: value for path, value in values.items() if spec.labels[path] != FROZEN},
    )


def write_towers(towers: Towers, root: Path) -> None:
    """The towers in the folders and layouts in which they are published."""
    towers.llama.save_pretrained(root / "llm")
    towers.unet.save_pretrained(root / "sd" / "unet")
    towers.vae.save_pretrained(root / "sd" / "vae")
    towers.clip.save_pretrained(root / "sd" / "text_encoder")
    schedule = find("generator", "stable_diffusion").uses["scheduler"].tower
    (root / "sd" / "scheduler").mkdir()
    (root / "sd" / "scheduler" / schedule.config_file).write_text(
        json.dumps(schedule.describe(schedule.preset))
    )


def configure(sizes: Sizes, root: Path, batch: int) -> ConfigDict:
    """``configs/stage1.py`` at the reduced sizes, in fp32; batch and micro-batch are the same."""
    config = read_run_file("stage1")
    config.model.backbone.update(llm="source", vit="none", qformer="none")
    config.model.generator.update(
        unet="source", vae="source", text_encoder="source", image_size=sizes.vae["sample_size"]
    )
    encoder, decoder, feed_forward = sizes.mapper
    config.model.mapper.update(
        d_model=sizes.width,
        dim_feedforward=feed_forward,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
    )
    config.model.update(dtype="float32", param_dtype="float32")
    config.weights.update(llm=str(root / "llm"), stable_diffusion=str(root / "sd"))
    return on_drawn_samples(config, str(root), data__global_batch=batch, data__accumulation=1)


@dataclasses.dataclass(frozen=True)
class Data:
    """One batch and its draws, for both sides.

    Attributes:
      batch: ours, with moments that our VAE made of the images.
      draws: of every item, by its number.
      samples: the same for the peers, with the images.
    """

    batch: Batch
    draws: StepRandomness
    samples: list[Sample]

    def draw(self, key: jax.Array, micro: Batch) -> StepRandomness:
        """The given draws in the place of random ones (``make_train_step(draw=...)``)."""
        chosen = (
            jnp.asarray(getattr(self.draws, name))[micro.item_id]
            for name in ("timesteps", "noise", "posterior_noise", "cfg_drop")
        )
        return StepRandomness(*chosen)


def make_data(model: Reduced) -> Data:
    """A batch of captions with random images."""
    count, generator = model.config.data.global_batch, model.spec.generator
    random = np.random.default_rng(SEED)
    images = random.integers(0, 256, (count, generator.image_size, generator.image_size, 3)).astype(np.uint8)
    encode = make_encoder(model.spec.template, "target", model.params)
    moments = np.asarray(encode(images))
    captions = Captions(lengths.caption_lengths(count, SEED, LONGEST_CAPTION))
    with tempfile.TemporaryDirectory() as folder:
        model.config.data.index_cache = folder
        batch = next(loader_of(model.config, model.spec, captions, moments))
    draws = StepRandomness(
        timesteps=random.integers(0, generator.num_train_timesteps, count).astype(np.int32),
        noise=random.standard_normal((count, *generator.latent_shape)).astype(np.float32),
        posterior_noise=random.standard_normal((count, *generator.latent_shape)).astype(np.float32),
        cfg_drop=np.arange(count) == 1,  # one item is dropped, so that this path is compared too
    )
    # The loader shuffles: an item's image is the one whose moments it has.
    numbers = [batch.item_id[batch.target_moments.tolist().index(own.tolist())] for own in moments]
    samples = [peer_sample(model, captions.example(i), draws, n, images[i]) for i, n in enumerate(numbers)]
    return Data(batch, draws, samples)


def peer_sample(
    model: Reduced, example: Example, draws: StepRandomness, number: int, image: np.ndarray
) -> Sample:
    """A sample for the peers: one plain sequence, however our batch lays it out.

    Args:
      number: of its item in the batch, whose draws it gets.
    """
    language = language_tokenizer(model.config, model.spec.sizes)
    data = model.config.data
    text = expand(language, *example.words, image_tokens=0, max_length=data.max_length)
    ids, mask = caption_tokenizer(model.config, model.spec.sizes).encode([example.caption])
    return Sample(
        text.tokens.astype(np.int64),
        text.labels.astype(np.int64),
        text.voken_start,
        ids[0].astype(np.int64),
        mask[0].astype(np.int64),
        int(draws.timesteps[number]),
        draws.noise[number],
        draws.posterior_noise[number],
        bool(draws.cfg_drop[number]),
        image,
    )


class Ours:
    """Our train step, compiled.

    Attributes:
      jitted: what is compiled, for counting.  state: donated to the next step.
    """

    def __init__(self, model: Reduced, data: Data, optimizer: optax.GradientTransformation):
        spec = model.spec
        step = make_train_step(spec.template, spec.labels, optimizer, spec.options, draw=data.draw)
        values = jax.tree.map(jnp.array, model.trainable)  # a copy: it is donated
        self.state: TrainState = init_state(values, spec.labels, optimizer, SEED)
        self.arguments = (model.frozen, jax.tree.map(jnp.asarray, data.batch))
        self.function = step
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, *self.arguments).compile()

    def step(self) -> float:
        """One update; its loss."""
        self.state, metrics = self.compiled(self.state, *self.arguments)
        return float(metrics["loss"])


def recorder() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the newest gradients."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def peer_gradients(p1: Any, model: Reduced) -> dict[str, np.ndarray]:
    """P1's gradients under our paths, through the project's weight table."""
    count = len(model.trainable[EMBEDDINGS])
    found = {path: table.grad[-count:].cpu().numpy() for path, table in zip((EMBEDDINGS, HEAD), p1.tables)}
    own = {name: p.grad.cpu().numpy() for name, p in p1.mapper.named_parameters()}
    shapes = {p.removeprefix(MAPPER): v.shape for p, v in model.trainable.items() if p.startswith(MAPPER)}
    return found | {MAPPER + path: value for path, value in MAPPER_TABLE.to_params(own, shapes).items()}
