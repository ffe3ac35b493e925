"""What the backbones are trained on, and the loop that trains them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt5_jax.data.text.templates import IGNORE
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.shapes.backbones import llama_data as data
from minigpt5_jax.shapes.backbones import train_llama, train_text, train_unet, train_vae, train_vision
from minigpt5_jax.shapes.backbones.fields import (
    CLASSES,
    UNTOLD,
    ask,
    by_turns,
    fields_of_place,
    labels,
    scenes_of,
    training_contents,
)
from minigpt5_jax.shapes.backbones.fit import fit
from minigpt5_jax.shapes.backbones.heads import init_heads, read, read_loss
from minigpt5_jax.shapes.backbones.tokenizers import write_clip_tokenizer, write_llama_tokenizer
from minigpt5_jax.shapes.render import object_of
from minigpt5_jax.shapes.wording import understand
from minigpt5_jax.shapes.world import HELD_OUT, Object, Scene, draw_scene

IMAGE_TOKENS = train_vision.QFORMER.num_query_tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(folder)
    return ClipTokenizer(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    write_llama_tokenizer(path, texts=200)
    return LlamaTokenizer(path)


@pytest.fixture(scope="module")
def histories(tmp_path_factory, llama):
    return data.Histories(tmp_path_factory.mktemp("histories"), "train", llama, 8, 12, seed=0)


# -- the loop --


def quadratic(params, batch, key):
    error = jnp.square(params["x"] - batch).sum() + 0 * jax.random.uniform(key)
    return error, {"error": error}


def minimise(steps, **kwargs):
    target = np.array([1.0, -2.0, 3.0], np.float32)
    settings = {"learning_rate": 0.1, "seed": 0, "name": "test", "weight_decay": 0.0, "ema_decay": 0.9}
    found, seconds = fit(
        quadratic, {"x": jnp.zeros(3)}, lambda step: target + step % 2, steps=steps, **settings | kwargs
    )
    return np.asarray(found["x"]), seconds


def test_fit_finds_a_minimum_and_repeats_itself():
    first, seconds = minimise(300)
    assert seconds > 0
    np.testing.assert_allclose(first, [1.5, -1.5, 3.5], atol=0.2)  # the mean
    assert (first == minimise(300)[0]).all()


def test_a_stopped_fit_gives_what_an_undisturbed_one_gives(tmp_path, monkeypatch):
    whole, _ = minimise(20)
    monkeypatch.setattr("minigpt5_jax.shapes.backbones.fit.SAVE_EVERY", -1.0)  # every step
    calls = []

    def stop(step):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return np.array([1.0, -2.0, 3.0], np.float32) + step % 2

    settings = {"learning_rate": 0.1, "seed": 0, "name": "test", "weight_decay": 0.0, "ema_decay": 0.9}
    with pytest.raises(KeyboardInterrupt):
        fit(quadratic, {"x": jnp.zeros(3)}, stop, steps=20, checkpoint=tmp_path / "x.npz", **settings)
    again, seconds = fit(
        quadratic, {"x": jnp.zeros(3)}, stop, steps=20, checkpoint=tmp_path / "x.npz", **settings
    )
    assert calls == [*range(8), *range(7, 20)]  # the step that was stopped is done again, no other
    assert (np.asarray(again["x"]) == whole).all() and seconds > 0


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    minimise(3, checkpoint=tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz is of a fit with other settings; delete it"):
        minimise(4, checkpoint=tmp_path / "x.npz")


# -- what is asked --


def test_labels_are_the_whole_scene():
    random = np.random.default_rng(0)
    scenes = [draw_scene(random, count=1 + i % 3) for i in range(30)]
    made = labels(scenes)
    assert made.shape == (30, len(CLASSES)) and (made < np.array(CLASSES)).all()
    assert scenes_of(made) == scenes
    one = labels([Scene(2, (Object(4, 1, 0, 2, 3),))])[0]
    assert one.tolist() == [2, 5, -1, -1, -1, 5, -1, -1, -1, 5, -1, -1, -1, 4, 1, 0, 2]


def test_positions_are_asked_their_own_place():
    fields = by_turns(6)
    assert (fields[5] == fields_of_place(1)).all() and fields[5].sum() == 5
    states = np.array([[True, False, True, True, True, True]])
    asked = ask(labels([draw_scene(np.random.default_rng(0), count=3)]), states, fields)
    assert (asked[0, 1] == UNTOLD).all()
    assert (asked[0, 0] == asked[0, 4]).all() and (asked[0, 0, 0] == asked[0, :, 0])[states[0]].all()


def test_heads_read_what_is_linearly_there():
    scenes = [draw_scene(np.random.default_rng(seed), count=2) for seed in range(5)]
    want, count = labels(scenes), sum(CLASSES)
    states, start = np.zeros((5, 2, count), np.float32), 0
    for number, classes in enumerate(CLASSES):
        rows = np.flatnonzero(want[:, number] >= 0)
        states[rows, 0, start + want[rows, number]] = 30.0
        start += classes
    heads = init_heads(jax.random.key(0), count) | {"kernel": jnp.eye(count)}
    asked = np.stack([want, np.full_like(want, UNTOLD)], axis=1)
    loss, right = read_loss(heads, jnp.asarray(states), asked)
    assert float(loss) < 1e-6 and float(right) == 1.0
    found = np.asarray(read(heads, jnp.asarray(states[:, 0])))
    assert scenes_of(found) == scenes
    loss, right = read_loss(heads, jnp.asarray(states), asked[:, ::-1])
    assert float(loss) > 5.0 and float(right) < 0.3


# -- batches --


def test_the_vae_never_sees_a_held_out_kind():
    objects = [object_of(int(index), 0) for index in training_contents()]
    assert len(set(objects)) == 160
    assert not {item.kind for item in objects} & HELD_OUT


def test_batches_are_functions_of_the_step(clip, llama, histories):
    look = lambda images: np.zeros((len(images), IMAGE_TOKENS, 128), np.float32)  # noqa: E731
    made = {
        "vae": train_vae.batches(2, seed=0),
        "text": train_text.batches(clip, 2, seed=0),
        "vision": train_vision.batches(2, seed=0),
        "gathering": train_llama.batches(llama, data.kinds_of_batches(histories), look, seed=0),
        "describing": train_llama.batches(llama, data.kinds_of_describing(histories), look, seed=0),
    }
    for name, batch in made.items():  # steps of one kind: kinds take turns of 4 and 5
        first, again, other = (jax.tree.leaves(batch(step)) for step in (5, 5, 25))
        assert all((a == b).all() for a, b in zip(first, again, strict=True)), name
        assert any((a != b).any() for a, b in zip(first, other, strict=True)), name


def test_caption_batches_hold_two_wordings_and_ask_paddings_and_objects(clip):
    batch = train_text.batches(clip, 6, seed=0)(0)
    assert (batch["ids"][:6] != batch["ids"][6:]).any()
    chosen = batch["positions"]
    assert len(chosen) == train_text.WORDS_AT_MOST + train_text.PADS_PER_STEP == len(set(chosen))
    assert not batch["mask"][:, train_text.WORDS_AT_MOST :].any()  # padding positions only
    asked = (batch["pads"] >= 0).any(-1)
    assert (asked == (batch["mask"] == 0)).all()
    assert (batch["pads"][:6, -1] == batch["pads"][6:, -1]).all()
    ends = (batch["words"] >= 0).any(-1)
    filled = batch["pads"][..., 1::4]
    assert (1 <= ends.sum(1)).all() and (ends.sum(1) <= 3).all() and filled.max() == 5
    assert (batch["mask"][:, : train_text.WORDS_AT_MOST][ends] == 1).all()


def test_the_last_word_of_an_object_is_asked_that_object(clip):
    batch = train_text.batches(clip, 12, seed=1)(0)
    place_words = set(clip.encode(["left right"])[0][0][1:3].tolist())
    at = np.argwhere((batch["words"] >= 0).any(-1))
    last = [int(batch["ids"][row, position]) for row, position in at]
    assert np.mean([word in place_words for word in last]) > 0.3  # "... at the top left"


def test_contexts_keep_padding_positions_and_have_empty_ones():
    count, width = 40, 4
    scenes = tuple(draw_scene(np.random.default_rng(i)) for i in range(count))
    number = {id(scene): i for i, scene in enumerate(scenes)}

    def encode(chosen, random):
        features = np.zeros((len(chosen), 77, width), np.float32)
        features += np.array([number[id(scene)] for scene in chosen], np.float32)[:, None, None]
        return features, np.broadcast_to(np.arange(77) < 16, (len(chosen), 77)).astype(np.int32)

    moments = np.concatenate(
        [
            np.broadcast_to(np.arange(count)[:, None, None, None], (count, 8, 8, 4)),
            np.full((count, 8, 8, 4), -60.0),
        ],
        -1,
    ).astype(np.float32)
    examples = train_unet.Examples(scenes, moments, encode, np.full((77, width), -9.0, np.float32))
    batch = train_unet.batches(examples, 400, seed=0)(0)
    scene, context = batch["latents"][:, 0, 0, 0], batch["context"]
    empty = (context == -9.0).all((1, 2))
    assert 20 <= empty.sum() <= 65  # a tenth
    pads, words = context[~empty, 16:].mean((1, 2)), context[~empty, :16].mean((1, 2))
    np.testing.assert_allclose(pads, scene[~empty], atol=0.3)  # disturbed by noise only
    assert 0.4 < (abs(words - scene[~empty]) > 0.5).mean() < 0.75


# -- rows of the language model --


def rows_of(llama, samples, length=208):
    return data.make_rows(llama, samples, length, 5 * len(samples), IMAGE_TOKENS)


def test_language_rows_predict_words_and_ask_the_scene_of_fillers(llama):
    random = np.random.default_rng(0)
    scene = draw_scene(random, count=2)
    sample = data.plain(scene, random)
    made, scenes = rows_of(llama, [sample])
    assert scenes == []
    ids, nexts = made["ids"][0], made["nexts"][0]
    size, fillers = int(made["valid"].sum()), np.flatnonzero(made["filler"])
    assert ids[0] == llama.bos_id and len(fillers) == data.FILLERS
    words = llama.encode(sample.source)
    assert ids[1 : 1 + len(words)].tolist() == words == nexts[: len(words)].tolist()
    assert (nexts[fillers[:-1]] == IGNORE).all() and nexts[fillers[0] - 1] == IGNORE
    assert nexts[fillers[-1]] == ids[fillers[-1] + 1] and size == fillers[-1] + 2  # the ending
    asked = made["asked"][0]
    whole = np.flatnonzero(asked[:, 0] >= 0)
    assert whole.tolist() == [fillers[0] - 1, *fillers]
    assert (asked[whole] == labels([scene])).all()
    ends = np.flatnonzero((made["words"][0] >= 0).any(-1))
    assert len(ends) == 2 and (made["words"][0, ends, 0] < 0).all()  # two objects, no background
    for row in made["words"][0, ends]:
        (only,) = scenes_of(np.maximum(row, 0)[None])[0].objects
        assert only in scene.objects


def test_histories_become_rows_with_all_their_images(llama, histories):
    random, drawn = np.random.default_rng(1), 0
    for _ in range(12):
        samples = [histories.sample(random) for _ in range(6)]
        made, scenes = rows_of(llama, samples)
        assert (made["valid"].sum(1) < made["ids"].shape[1]).all()  # nothing was cut
        for i, sample in enumerate(samples):
            mine = made["image_row"] == i
            assert [scenes[k] for k in made["image"][mine]] == list(sample.scenes)
            for start, scene in zip(made["image_start"][mine], sample.scenes, strict=True):
                assert (made["ids"][i, start : start + IMAGE_TOKENS] == 0).all()
                assert (made["asked"][i, start + IMAGE_TOKENS] == labels([scene])[0]).all()
            assert made["filler"][i].any() == (sample.drawn is not None)
            drawn += sample.drawn is not None
    assert 10 < drawn < 70


def test_answers_are_learnt_and_questions_are_not(llama):
    random = np.random.default_rng(3)
    scene = draw_scene(random, count=3)
    sample = data.Sample(*data.description(scene, random), scenes=(scene,))
    made, _ = rows_of(llama, [sample])
    learnt = np.flatnonzero(made["nexts"][0] != IGNORE)
    answer = llama.encode(sample.target)
    assert made["nexts"][0, learnt].tolist() == answer
    assert learnt[-1] == made["valid"].sum() - 2


def test_two_fifths_of_what_follows_tell_what_is_seen(llama, histories):
    kinds, random = data.kinds_of_describing(histories), np.random.default_rng(5)
    told = [kind for kind in kinds if (kind.rows, kind.images) == (32, 32)]
    assert len(told) == 2 and len(kinds) == 5
    samples = [told[0].draw(random) for _ in range(200)]
    assert all(len(sample.scenes) == 1 and sample.drawn is None for sample in samples)
    described = [sample for sample in samples if understand(sample.target).scene() == sample.scenes[0]]
    assert 0.6 < len(described) / len(samples) < 0.9
    made, _ = rows_of(llama, samples, told[0].length)
    assert (made["valid"].sum(1) < told[0].length).all()  # nothing was cut


def test_images_stand_where_their_rows_say(llama):
    random = np.random.default_rng(4)
    samples = [data.told(draw_scene(random), random) for _ in range(40)]
    made, scenes = rows_of(llama, samples, 104)
    template = train_llama.template()
    look = lambda images: 1.0 + np.zeros((len(images), IMAGE_TOKENS, 128), np.float32)  # noqa: E731
    rows = train_llama.with_states(made, scenes, look)
    params = template.init(jax.random.key(0))
    params |= {"llama_proj/kernel": jnp.zeros((128, 128)), "llama_proj/bias": jnp.full(128, 7.0)}
    noise = jnp.zeros((*made["ids"].shape, 128))
    embeds = np.asarray(jax.jit(lambda p, r: template.bind(p).embed(r, noise))(params, rows))
    images = (embeds == 7.0).all(-1)
    assert images.sum() == IMAGE_TOKENS * sum(len(sample.scenes) for sample in samples) > 0
    assert not images[made["nexts"] >= 0].any() or (made["ids"][images] == 0).all()
