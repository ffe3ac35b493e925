"""The small world's text encoder: every padding position holds the scene, whatever the wording.

The caption target of stage 1 has 77 positions, of which a caption fills about 16.  Features at real
tokens depend on the wording, which a mapper cannot guess; padding positions attend to the real ones
(reference 3.3), so they can carry the scene alone.  A linear head, thrown away afterwards, reads all
attributes from each padding position through noise, and two wordings of a scene must agree there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.templates import clean_caption
from minigpt5_jax.data.tokenizer import ClipTokenizer
from minigpt5_jax.models.clip_text import ClipTextConfig, ClipTextModel
from minigpt5_jax.models.common import Params, Template
from minigpt5_jax.shapes.fit import fit
from minigpt5_jax.shapes.heads import Heads, init_heads, read_loss
from minigpt5_jax.shapes.texts import labels
from minigpt5_jax.shapes.world import Scene, all_scenes, caption, draw_scene

POSITIONS = 77
WORDS_AT_MOST = 20  # positions of the longest caption, BOS and EOS included, and some to spare
PADS_PER_STEP = 12  # padding positions drawn for a step; those of the others are not computed
FEATURE_NOISE = 0.7  # of features of about unit variance: attributes must stand far apart
AGREEMENT_WEIGHT = 1.0


def config(vocab_size: int) -> ClipTextConfig:
    """Sizes."""
    return ClipTextConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=POSITIONS, hidden_act="gelu",
    )  # fmt: skip


def template(vocab_size: int) -> Template:
    """The tower."""
    return Template.of(lambda rngs: ClipTextModel(config(vocab_size), rngs=rngs))


def encode(tokenizer: ClipTokenizer, scenes: Sequence[Scene], random: np.random.Generator):
    """Ids and mask i32[n 77] of one wording of each scene."""
    return tokenizer.encode([clean_caption(caption(scene, random)) for scene in scenes])


def batches(tokenizer: ClipTokenizer, size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Two wordings of ``size`` scenes, the second ones behind the first, and the positions of the step."""
    random = np.random.default_rng(seed)
    first = np.arange(WORDS_AT_MOST)
    while True:
        scenes = [draw_scene(random) for _ in range(size)] * 2
        ids, mask = encode(tokenizer, scenes, random)
        pads = WORDS_AT_MOST + random.permutation(POSITIONS - WORDS_AT_MOST)[:PADS_PER_STEP]
        chosen = np.concatenate([first, np.sort(pads)])
        yield {
            "ids": ids[:, chosen], "mask": mask[:, chosen], "positions": chosen, "labels": labels(scenes),
        }  # fmt: skip


def train(tokenizer: ClipTokenizer, steps: int, seed: int, size: int = 24) -> tuple[Params, Heads, float]:
    """(parameters, the head, seconds)."""
    tower = template(tokenizer.vocab_size)
    table = "position_embedding/embedding"

    def loss(params, batch, key):
        # The tower counts positions from 0; the step's table starts with the rows it is to use.
        tables = {**params["text"], table: params["text"][table][batch["positions"]]}
        rest = params["text"][table][: POSITIONS - len(batch["positions"])]
        tables[table] = jnp.concatenate([tables[table], jax.lax.stop_gradient(rest)])
        features = tower.bind(tables)(batch["ids"], batch["mask"])
        noisy = features + FEATURE_NOISE * jax.random.normal(key, features.shape)
        pad = batch["mask"] == 0
        read, right = read_loss(params["head"], noisy, batch["labels"], pad)
        first, second = jnp.split(features[:, WORDS_AT_MOST:], 2)
        apart = jnp.square(first - second).mean()
        return read + AGREEMENT_WEIGHT * apart, {"read": read, "right": right, "apart": apart}

    key = jax.random.key(seed)
    params: dict[str, Params | Heads] = {
        "text": tower.init(key), "head": init_heads(jax.random.fold_in(key, 1), 128),
    }  # fmt: skip
    fitted, seconds = fit(
        loss, params, batches(tokenizer, size, seed), steps=steps, learning_rate=2e-3, seed=seed, name="text"
    )
    return fitted["text"], fitted["head"], seconds


def features(params: Params, ids: np.ndarray, mask: np.ndarray, size: int = 128) -> np.ndarray:
    """f32[n 77 128] of captions, with the attention mask as in stage 1."""
    tower = template(len(params["token_embedding/embedding"]))
    run = jax.jit(lambda p, i, m: tower.bind(p)(i, m))
    parts = [run(params, ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)]
    return np.concatenate([np.asarray(part) for part in parts])


def measure(params: Params, heads: Heads, tokenizer: ClipTokenizer, seed: int = 1) -> dict[str, float]:
    """On held-out scenes: share of padding positions that hold the scene, disagreement of two wordings."""
    random, scenes = np.random.default_rng(seed), list(all_scenes(True))
    made = [encode(tokenizer, scenes, random) for _ in range(2)]
    first, second = (features(params, *one) for one in made)
    _, right = read_loss(heads, jnp.asarray(first), labels(scenes), jnp.asarray(made[0][1] == 0))
    pads = slice(WORDS_AT_MOST, None)
    spread = np.square(first[:, pads] - first[:, pads].mean(0)).mean()
    return {
        "scene read from padding positions": float(right),
        "variance between wordings / between scenes": float(
            0.5 * np.square(first[:, pads] - second[:, pads]).mean() / spread
        ),
        "variance between scenes": float(spread),
    }
