"""The small world's text encoder: padding positions hold the scene, whatever the wording.

Features at real tokens depend on the wording, which a mapper cannot guess; padding positions attend to
the real ones (fidelity 3.3), so they can carry the scene alone.  A linear head, thrown away afterwards,
reads the scene from each of them through noise, and two wordings of a scene must agree there.  Another
head, two layers up, asks the last word of each object for it, so that words are soon bound to objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.text.templates import clean_caption
from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text.model import ClipTextConfig, ClipTextModel
from minigpt5_jax.models.common import Params
from minigpt5_jax.shapes.backbones.fields import UNTOLD, alone, ask, labels
from minigpt5_jax.shapes.backbones.fit import GATHERING_LAYERS, fit, in_parts, lower_layers
from minigpt5_jax.shapes.backbones.heads import Heads, init_heads, read_loss
from minigpt5_jax.shapes.wording import caption, ends_of_objects
from minigpt5_jax.shapes.world import Scene, draw_scene

POSITIONS = 77
WORDS_AT_MOST = 45  # positions of the longest caption, BOS and EOS included, and some to spare
PADS_PER_STEP = 8  # padding positions drawn for a step; those of the others are not computed
FEATURE_NOISE = 0.7  # of features of about unit variance: attributes must stand far apart
AGREEMENT_WEIGHT = 1.0
WORDS_WEIGHT = 1.0
COUNT_SHARES = (0.25, 0.35, 0.4)  # of scenes with one, two, three objects


def config(vocab_size: int, num_hidden_layers: int = 3) -> ClipTextConfig:
    """Sizes."""
    return ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        hidden_act="gelu",
    )


def template(vocab_size: int, num_hidden_layers: int = 3) -> Template:
    """The tower."""
    sizes = config(vocab_size, num_hidden_layers)
    return Template.of(lambda rngs: ClipTextModel(sizes, rngs=rngs))


def first_positions(width: int) -> np.ndarray:
    """f32[77 width]: where learnt positions start: waves, which make near positions alike."""
    frequency = 0.5 ** (np.arange(width // 2) * 16.0 / width)  # wavelengths of 6 to 1,600 positions
    angle = np.arange(POSITIONS)[:, None] * frequency
    waves = np.sqrt(2.0) * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return (0.02 * waves).astype(np.float32)


def encode(tokenizer: ClipTokenizer, scenes: Sequence[Scene], random: np.random.Generator):
    """Ids and mask i32[n 77] of one wording of each scene."""
    return tokenizer.encode([clean_caption(caption(scene, random)) for scene in scenes])


def draw_scenes(random: np.random.Generator, size: int) -> list[Scene]:
    """Training scenes of one, two and three objects, the more objects the more scenes."""
    counts = random.choice(len(COUNT_SHARES), size, p=COUNT_SHARES)
    return [draw_scene(random, count=int(count) + 1) for count in counts]


def number_of_words(text: str) -> int:
    """Tokens of a caption: each word and each comma is one."""
    return len(text.replace(",", " ,").split())


def batches(tokenizer: ClipTokenizer, size: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Two wordings of ``size`` scenes, the second ones behind the first, and the positions of the step.

    ``pads`` are what padding positions are asked, ``words`` what the last word of each object is.
    """

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((seed, step))
        scenes = draw_scenes(random, size) * 2
        captions = [clean_caption(caption(scene, random)) for scene in scenes]
        ids, mask = tokenizer.encode(captions)
        asked = ask(labels(scenes), mask == 0)
        words = np.full((len(scenes), WORDS_AT_MOST, asked.shape[-1]), UNTOLD, np.int32)
        for row, text in zip(words, captions, strict=True):
            for end, item in ends_of_objects(text):
                row[number_of_words(text[:end])] = alone(item)  # BOS is position 0
        pads = WORDS_AT_MOST + random.permutation(POSITIONS - WORDS_AT_MOST)[:PADS_PER_STEP]
        chosen = np.concatenate([np.arange(WORDS_AT_MOST), np.sort(pads)])
        rows = {"ids": ids, "mask": mask, "pads": asked}
        chosen_rows = {name: value[:, chosen] for name, value in rows.items()}
        return {"positions": chosen, "words": words, **chosen_rows}

    return batch


def train(
    tokenizer: ClipTokenizer, steps: int, seed: int, size: int = 24, checkpoint: Path | None = None
) -> tuple[Params, Heads, float]:
    """(parameters, the head, seconds)."""
    tower, gatherer = template(tokenizer.vocab_size), template(tokenizer.vocab_size, GATHERING_LAYERS)
    table = "position_embedding/embedding"

    def loss(params, batch, key):
        # The tower counts positions from 0; the step's table starts with the rows it is to use.
        tables = {**params["text"], table: params["text"][table][batch["positions"]]}
        rest = params["text"][table][: POSITIONS - len(batch["positions"])]
        tables[table] = jnp.concatenate([tables[table], jax.lax.stop_gradient(rest)])
        features = tower.bind(tables)(batch["ids"], batch["mask"])
        noisy = features + FEATURE_NOISE * jax.random.normal(key, features.shape)
        read, right = read_loss(params["head"], noisy, batch["pads"])
        one = slice(None, size)  # one of the two wordings is enough
        ids, mask = (batch[name][one, :WORDS_AT_MOST] for name in ("ids", "mask"))
        early = gatherer.bind(lower_layers(tables, "layers/"))(ids, mask)
        words, bound = read_loss(params["word_head"], early, batch["words"][one])
        first, second = jnp.split(features[:, WORDS_AT_MOST:], 2)
        apart = jnp.square(first - second).mean()
        total = read + WORDS_WEIGHT * words + AGREEMENT_WEIGHT * apart
        return total, {"read": read, "right": right, "words": words, "bound": bound, "apart": apart}

    key = jax.random.key(seed)
    params: dict[str, Params | Heads] = {
        "text": {**tower.init(key), table: jnp.asarray(first_positions(128))},
        "head": init_heads(jax.random.fold_in(key, 1), 128),
        "word_head": init_heads(jax.random.fold_in(key, 2), 128),
    }
    batch = batches(tokenizer, size, seed)
    fitted, seconds = fit(loss, params, batch, steps=steps, seed=seed, name="text", checkpoint=checkpoint)
    return fitted["text"], fitted["head"], seconds


def make_features(params: Params) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """``f(ids, mask) -> f32[n 77 128]``, compiled once; with the attention mask as in stage 1."""
    depth = len(params["layers/layer_norm1/scale"])
    tower = template(len(params["token_embedding/embedding"]), depth)
    run = jax.jit(lambda p, i, m: tower.bind(p)(i, m))
    return lambda ids, mask: np.asarray(run(params, ids, mask))


def features(params: Params, ids: np.ndarray, mask: np.ndarray, size: int = 128) -> np.ndarray:
    """f32[n 77 128] of captions, with the attention mask as in stage 1."""
    return in_parts(make_features(params), size, ids, mask)


def measure(params: Params, heads: Heads, tokenizer: ClipTokenizer, seed: int = 1) -> dict[str, float]:
    """On held-out scenes: share of padding positions that hold the scene, disagreement of wordings."""
    random, result = np.random.default_rng(seed), {}
    for count in (1, 2, 3):
        scenes = [draw_scene(random, held_out=True, count=count) for _ in range(150)]
        made = [encode(tokenizer, scenes, random) for _ in range(2)]
        first, second = (features(params, *one) for one in made)
        asked = ask(labels(scenes), made[0][1] == 0)
        _, right = read_loss(heads, jnp.asarray(first), asked)
        pads = slice(WORDS_AT_MOST, None)
        spread = np.square(first[:, pads] - first[:, pads].mean(0)).mean()
        apart = 0.5 * np.square(first[:, pads] - second[:, pads]).mean()
        result |= {
            f"scene read from padding positions, {count} objects": float(right),
            f"variance between wordings / between scenes, {count} objects": float(apart / spread),
        }
    return result
