"""The small world's language model: next tokens, and states behind a caption that hold its scene.

A model that only predicts captions forgets what was said as soon as it is said, and no mapper finds
the scene in the states at the vokens.  So behind each caption stand filler positions, whose inputs
are the mean of the embedding table (where voken rows start, reference 2.1) plus noise, and a linear
head, thrown away afterwards, reads every attribute from each of their states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minigpt5_jax.data.templates import clean_caption
from minigpt5_jax.data.tokenizer import LlamaTokenizer
from minigpt5_jax.models.common import Params, Template
from minigpt5_jax.models.llama import Llama, LlamaConfig
from minigpt5_jax.shapes.fit import fit
from minigpt5_jax.shapes.heads import Heads, init_heads, read_loss
from minigpt5_jax.shapes.texts import END, instruction, labels, question, recall
from minigpt5_jax.shapes.tokenizers import LLAMA_PIECES
from minigpt5_jax.shapes.world import Scene, all_scenes, caption, draw_scene

CONFIG = LlamaConfig(
    vocab_size=LLAMA_PIECES, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
)  # fmt: skip
FILLERS = 8
# Kinds of text -> (length of their batches, rows): most batches are short, which is half the work.
KINDS = {("plain",): (28, 64), ("instruction", "question", "recall"): (52, 24)}
SHORT_BATCHES = 3  # of plain captions, for each of the others
READ_WEIGHT = 1.0
IGNORE = -100

Rows = dict[str, np.ndarray]


def template() -> Template:
    """The tower; its new rows are not written."""
    return Template.of(lambda rngs: Llama(CONFIG, num_new_tokens=1, rngs=rngs))


def row(tokenizer: LlamaTokenizer, kind: str, scene: Scene, random: np.random.Generator):
    """(ids, labels of next tokens, filler positions) of one text; fillers have id 0."""
    if kind in ("question", "recall"):
        ask, answer = (question if kind == "question" else recall)(scene, random)
        source, target = tokenizer.encode(ask), tokenizer.encode(answer)
        ids = [tokenizer.bos_id, *source, *target]
        return ids, ids[1:] + [IGNORE], []
    plain = kind == "plain"
    text = clean_caption(caption(scene, random)) if plain else instruction(scene, random)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    end = tokenizer.encode(END)
    fillers = list(range(len(ids), len(ids) + FILLERS))
    nexts = ids[1:] + [IGNORE] * FILLERS + end + [IGNORE] * len(end)
    return ids + [0] * FILLERS + end, nexts, fillers


def empty_rows(scenes: Sequence[Scene], length: int) -> Rows:
    """Rows without text; ``read`` marks the last word before the fillers and the fillers."""
    size = (len(scenes), length)
    return {
        "ids": np.zeros(size, np.int32), "nexts": np.full(size, IGNORE, np.int32),
        "valid": np.zeros(size, np.int32), "filler": np.zeros(size, bool), "read": np.zeros(size, bool),
        "labels": labels(scenes),
    }  # fmt: skip


def fill_row(made: Rows, i: int, ids: list[int], nexts: list[int], fillers: list[int]) -> None:
    """Write one text."""
    made["ids"][i, : len(ids)], made["nexts"][i, : len(ids)], made["valid"][i, : len(ids)] = ids, nexts, 1
    if fillers:
        made["filler"][i, fillers] = made["read"][i, fillers] = True
        made["read"][i, fillers[0] - 1] = True


def batches(tokenizer: LlamaTokenizer, seed: int) -> Iterator[Rows]:
    """Endless rows, three batches of captions for each of the other kinds."""
    random = np.random.default_rng(seed)
    for number in itertools.count():
        kinds = tuple(KINDS)[number % (SHORT_BATCHES + 1) == SHORT_BATCHES]
        length, size = KINDS[kinds]
        scenes = [draw_scene(random) for _ in range(size)]
        made = empty_rows(scenes, length)
        for i, scene in enumerate(scenes):
            fill_row(made, i, *row(tokenizer, kinds[i % len(kinds)], scene, random))
        yield made


def states(model: Llama, rows: Rows, noise: jax.Array) -> jax.Array:
    """Final states; ``noise`` is that of the fillers, in standard deviations of the table."""
    table = jax.lax.stop_gradient(model.embed_tokens.embedding[...])
    filler = table.mean(0) + noise * table.std()
    embeds = jnp.where(rows["filler"][..., None], filler, model.embed(rows["ids"]))
    positions = jnp.broadcast_to(jnp.arange(rows["ids"].shape[1]), rows["ids"].shape)
    return model(embeds, positions=positions, segment_ids=rows["valid"])


def train(tokenizer: LlamaTokenizer, steps: int, seed: int) -> tuple[Params, Heads, float]:
    """(parameters, the head, seconds)."""
    tower = template()

    def loss(params, rows, key):
        noise_key, scale_key = jax.random.split(key)
        shape = (*rows["ids"].shape, CONFIG.hidden_size)
        scale = jax.random.uniform(scale_key, (shape[0], 1, 1))
        model = tower.bind(params["llm"])
        hidden = states(model, rows, scale * jax.random.normal(noise_key, shape))
        logits, _ = model.logit_blocks(hidden)
        due = rows["nexts"] != IGNORE
        text = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(rows["nexts"], 0))
        text = (text * due).sum() / due.sum()
        read, right = read_loss(params["head"], hidden, rows["labels"], rows["read"])
        return text + READ_WEIGHT * read, {"text": text, "read": read, "right": right}

    key = jax.random.key(seed)
    params: dict[str, Params | Heads] = {
        "llm": tower.init(key), "head": init_heads(jax.random.fold_in(key, 1), CONFIG.hidden_size),
    }  # fmt: skip
    fitted, seconds = fit(
        loss, params, batches(tokenizer, seed), steps=steps, learning_rate=2e-3, seed=seed, name="llama"
    )
    return fitted["llm"], fitted["head"], seconds


def measure(params: Params, heads: Heads, tokenizer: LlamaTokenizer, seed: int = 1) -> dict[str, float]:
    """Share of held-out captions whose whole scene can be read from every state the mapper is given."""
    random, tower = np.random.default_rng(seed), template()
    scenes = list(all_scenes(True))
    made = empty_rows(scenes, KINDS[("plain",)][0])
    for i, scene in enumerate(scenes):
        ids, nexts, fillers = row(tokenizer, "plain", scene, random)
        fill_row(made, i, ids, nexts, fillers)
        made["read"][i, fillers[-1]] = False  # the state on the last voken predicts the ending
    noise = jnp.zeros((*made["ids"].shape, CONFIG.hidden_size))
    hidden = jax.jit(lambda p, rows: states(tower.bind(p), rows, noise))(params, made)
    return {"scene read from voken states": float(read_loss(heads, hidden, made["labels"], made["read"])[1])}
