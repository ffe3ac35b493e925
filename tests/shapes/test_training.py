"""What the backbones are trained on, and the loop that trains them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.shapes import files, train_llama, train_text, train_unet, train_vae
from minigpt5_jax.shapes.fit import fit
from minigpt5_jax.shapes.heads import init_heads, read_loss
from minigpt5_jax.shapes.render import object_of
from minigpt5_jax.shapes.texts import VALUES, labels
from minigpt5_jax.shapes.world import HELD_OUT, draw_scene


def test_fit_finds_a_minimum_and_repeats_itself():
    def loss(params, batch, key):
        error = jnp.square(params["x"] - batch).sum() + 0 * jax.random.uniform(key)
        return error, {"error": error}

    def run():
        start = {"x": jnp.zeros(3)}
        target = np.array([1.0, -2.0, 3.0], np.float32)
        found, seconds = fit(
            loss, start, itertools.repeat(target), steps=300, learning_rate=0.1, seed=0, name="test",
            weight_decay=0.0, ema_decay=0.9,
        )  # fmt: skip
        assert seconds > 0
        return np.asarray(found["x"])

    first = run()
    np.testing.assert_allclose(first, [1.0, -2.0, 3.0], atol=0.05)
    assert (first == run()).all()


def test_the_vae_never_sees_a_held_out_kind():
    objects = [object_of(int(index), 0) for index in train_vae.train_contents()]
    assert len(set(objects)) == 160
    assert not {item.kind for item in objects} & HELD_OUT


def test_language_rows_predict_words_and_mark_fillers():
    tokenizer = LlamaTokenizer(files.ASSETS / "llama/tokenizer.model")
    random = np.random.default_rng(0)
    for kind in itertools.chain.from_iterable(train_llama.KINDS):
        ids, nexts, fillers = train_llama.row(tokenizer, kind, draw_scene(random), random)
        assert ids[0] == tokenizer.bos_id and len(ids) == len(nexts)
        for place, following in enumerate(nexts):
            if following != train_llama.IGNORE and place + 1 not in fillers:
                assert ids[place + 1] == following
        assert len(fillers) == (train_llama.FILLERS if kind in ("plain", "instruction") else 0)
        if fillers:  # nothing is predicted into the fillers, the ending behind them is
            assert all(nexts[place - 1] == train_llama.IGNORE for place in fillers)
            assert nexts[fillers[-1]] == ids[fillers[-1] + 1]


def test_language_batches_read_before_and_on_fillers():
    tokenizer = LlamaTokenizer(files.ASSETS / "llama/tokenizer.model")
    made = next(train_llama.batches(tokenizer, seed=0))
    assert (made["filler"].sum(1) == train_llama.FILLERS).all()
    assert (made["read"].sum(1) == train_llama.FILLERS + 1).all()
    assert not (made["read"] & (made["valid"] == 0)).any()


def test_caption_batches_hold_two_wordings_of_each_scene():
    tokenizer = ClipTokenizer(files.ASSETS / "sd/tokenizer")
    batch = next(train_text.batches(tokenizer, 6, seed=0))
    assert (batch["labels"][:6] == batch["labels"][6:]).all()
    assert (batch["ids"][:6] != batch["ids"][6:]).any()
    chosen = batch["positions"]
    assert len(chosen) == train_text.WORDS_AT_MOST + train_text.PADS_PER_STEP == len(set(chosen))
    assert not batch["mask"][:, train_text.WORDS_AT_MOST :].any()  # padding positions only


def test_contexts_keep_padding_positions_and_have_empty_ones():
    count, width = 40, 4
    features = np.zeros((count, train_unet.WORDINGS, 77, width), np.float16)
    features += np.arange(count, dtype=np.float16)[:, None, None, None]
    masks = np.zeros(features.shape[:3], bool)
    masks[..., :16] = True
    moments = np.concatenate([np.broadcast_to(np.arange(count)[:, None, None, None], (count, 8, 8, 4)),
                              np.full((count, 8, 8, 4), -60.0)], -1).astype(np.float32)  # fmt: skip
    examples = train_unet.Examples(moments, features, masks, np.full((77, width), -9.0, np.float32))
    batch = next(train_unet.batches(examples, 400, seed=0))
    scene, context = batch["latents"][:, 0, 0, 0], batch["context"]
    empty = (context == -9.0).all((1, 2))
    assert 20 <= empty.sum() <= 65  # a tenth
    pads, words = context[~empty, 16:].mean((1, 2)), context[~empty, :16].mean((1, 2))
    np.testing.assert_allclose(pads, scene[~empty], atol=0.3)  # disturbed by noise only
    assert 0.4 < (abs(words - scene[~empty]) > 0.5).mean() < 0.75


def test_heads_read_what_is_linearly_there():
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(5)]
    want, count = labels(scenes), sum(map(len, VALUES.values()))
    states, start = np.zeros((5, 2, count), np.float32), 0
    for number, values in enumerate(VALUES.values()):
        states[np.arange(5), 0, start + want[:, number]] = 30.0
        start += len(values)
    heads = init_heads(jax.random.key(0), count) | {"kernel": jnp.eye(count)}
    first = np.array([[True, False]] * 5)
    loss, right = read_loss(heads, jnp.asarray(states), want, first)
    assert float(loss) < 1e-6 and float(right) == 1.0
    assert float(read_loss(heads, jnp.asarray(states), want, ~first)[0]) > 5.0
