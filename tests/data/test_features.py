"""Ready features: what is stored, for which samples, and that a batch of them is as good as its images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import original
from minigpt5_jax.data.batches.encode import EncodeConfig, feature_keys
from minigpt5_jax.data.batches.image_index import image_index
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import draw_flip, draw_flips, prepare_image
from minigpt5_jax.data.prepare import feature_writer
from minigpt5_jax.data.prepare.feature_writer import (
    FeatureWriter,
    any_readable,
    claim,
    room_for,
    write_missing,
)
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource, JsonlSource
from minigpt5_jax.data.sources import features as stored
from minigpt5_jax.data.sources.features import (
    FeatureSpec,
    FeatureStore,
    check_spec,
    image_fingerprint,
    image_id,
)
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.parts.backbones.minigpt4 import MiniGPT4

ROWS, BROKEN = 7, 4
ORACLE = Path(__file__).parents[1] / "oracle"


@functools.cache
def plain_config():
    llama = LlamaTokenizer(ORACLE / "tokenizer_llama" / "tokenizer.model")
    return EncodeConfig(llama, ClipTokenizer(ORACLE / "tokenizer_clip"))


def pooled(images):
    """Stands for a tower: the means of four quarters, as [n 2 2 6], by which an image is known again."""
    n, size = len(images), images.shape[1] // 2
    means = images.reshape(n, 2, size, 2, size, 3).astype(np.float32).mean((2, 4))
    return np.concatenate([means, 255 - means], -1)


def states(images):
    """Stands for the other tower: [n 3 4]."""
    return np.broadcast_to(pooled(images)[:, :1, 0, :4], (len(images), 3, 4))


@pytest.fixture
def folder(tmp_path):
    for i in range(ROWS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / f"{BROKEN}.png").write_bytes(b"broken")
    lines = ["caption\timage_path", *(f"dog {i}\t{i}.png" for i in range(ROWS))]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def pairs(folder):
    return Cc3mSource(folder / "pairs.tsv", rules=PairRules(instruction_every=3))


def spec_of(source, **changes):
    values = dict(
        image_fingerprint=image_fingerprint(source),
        samples=len(source),
        towers={"vae": "v" * 64},
        target=(2, 2, 6),
        image=None,
        target_size=8,
        image_size=4,
    )
    return FeatureSpec(**(values | changes))


def write(folder, source, spec, encoders, config=None, *, seed=0, **options):
    """All features that a folder lacks; (store, index of the images, images that cannot be read)."""
    config = config or plain_config()
    index = image_index(source, config, seed=seed, trees=False, folder=folder / "index")
    store = FeatureStore(folder / "store", spec)
    claim(folder / "store", spec)
    writer = FeatureWriter(store)
    try:
        bad = write_missing(source, index, store, writer, encoders, batch_size=3, **options)
    finally:
        writer.close()
    return FeatureStore(folder / "store"), index, bad


def key_of(source, index, config=None, seed=0):
    """Key of the image that a sample draws."""
    config = dataclasses.replace(config or plain_config(), image_root=source.image_root)
    return feature_keys(source.example(index), config, (seed, 0, index))[0]


def test_a_samples_features_are_those_of_its_image(folder, pairs):
    assert len(pairs) == ROWS + 3
    sizes = []
    store, index, bad = write(
        folder, pairs, spec_of(pairs), {"target": lambda x: sizes.append(len(x)) or pooled(x)}
    )
    assert bad == 1 and set(sizes) == {3}, "every call has the one compiled size"
    assert len(store) == ROWS - 1 and len(index.target) == ROWS, "an image of two samples is stored once"
    for i in range(len(pairs)):
        image, features = pairs.example(i, 2).target_image, store.find("target", key_of(pairs, i))
        if image.endswith(f"{BROKEN}.png"):
            assert features is None
            continue
        want = pooled(prepare_image(image, 8, square=True, flip=False)[None])[0]
        np.testing.assert_array_equal(features, want)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(
        again.find("target", key_of(pairs, 0)), store.find("target", key_of(pairs, 0))
    )
    assert not any_readable(pairs, index, store), "the broken image is all that is missing"


def test_an_image_is_the_same_wherever_its_folder_is(folder, pairs, tmp_path_factory):
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "here")
    there = Cc3mSource(moved / "pairs.tsv", rules=PairRules(instruction_every=3))
    keys = [key_of(pairs, i) for i in range(len(pairs))]
    assert [key_of(there, i) for i in range(len(pairs))] == keys and len(set(keys)) == ROWS
    assert image_id(b"bytes") != image_id(b"others") and image_id(b"bytes") % 2 == 0


def test_mirrored_images_have_features_of_their_own(folder, pairs):
    config = dataclasses.replace(plain_config(), flip_mode="independent")
    store, _, _ = write(folder, pairs, spec_of(pairs), {"target": pooled}, config)
    mirrored = set()
    for i in range(len(pairs)):
        image, key = pairs.example(i).target_image, key_of(pairs, i, config)
        if image.endswith(f"{BROKEN}.png"):
            continue
        mirrored.add(key & 1)
        pixels = prepare_image(image, 8, square=True, flip=bool(key & 1))
        np.testing.assert_array_equal(store.find("target", key), pooled(pixels[None])[0])
    assert mirrored == {0, 1}


def test_an_images_mirror_is_drawn_once_or_in_each_epoch(folder, pairs):
    once = dataclasses.replace(plain_config(), flip_mode="independent")
    each = dataclasses.replace(once, flip_each_epoch=True)

    def drawn(config, seed=0, epochs=range(8)):
        return [
            [feature_keys(pairs.example(i), config, (seed, e, i))[0] & 1 for i in range(ROWS)] for e in epochs
        ]

    assert len(set(map(tuple, drawn(once)))) == 1 and drawn(once) != drawn(once, seed=1)
    assert len(set(map(tuple, drawn(each)))) > 1
    assert drawn(each)[1] == [int(draw_flips("independent", (0, 1, i), 0).target) for i in range(ROWS)]
    shared = dataclasses.replace(once, flip_mode="shared")
    assert drawn(shared)[5] == [int(draw_flips("shared", (0, i), 0).target) for i in range(ROWS)]
    flips = [draw_flip(7, "target", image_id(bytes([i]))) for i in range(200)]
    assert 80 < sum(flips) < 120 and flips != [
        draw_flip(7, "image", image_id(bytes([i]))) for i in range(200)
    ]


def test_bfloat16_is_stored_in_half_the_bytes(folder, pairs):
    store, _, _ = write(folder, pairs, spec_of(pairs, target_dtype="bfloat16"), {"target": pooled})
    values = store.find("target", key_of(pairs, 0))
    want = pooled(prepare_image(folder / "0.png", 8, square=True, flip=False)[None])[0]
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(values, want.astype(ml_dtypes.bfloat16))
    assert (folder / "store/00000.target.values").stat().st_size == (ROWS - 1) * 24 * 2


def test_an_interrupted_run_continues(folder, pairs):
    calls = []

    def encoder(images):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return pooled(images)

    with pytest.raises(KeyboardInterrupt):
        write(folder, pairs, spec_of(pairs), {"target": encoder})
    assert len(FeatureStore(folder / "store")) == 3
    calls.clear()
    store, _, _ = write(folder, pairs, spec_of(pairs), {"target": lambda x: calls.append(1) or pooled(x)})
    assert len(calls) == 2 and len(store) == ROWS - 1, "what was there is not made again"
    assert sorted(path.name for path in (folder / "store").glob("*.values")) == [
        "00000.target.values",
        "00001.target.values",
    ], "a file is written by one run"


def test_a_kill_during_a_write_loses_what_was_being_written(folder, pairs, caplog):
    write(folder, pairs, spec_of(pairs), {"target": pooled})
    values, keys = folder / "store/00000.target.values", folder / "store/00000.target.keys"
    whole = values.read_bytes()
    last = int(np.fromfile(keys, np.uint64)[-1])
    os.truncate(keys, (ROWS - 2) * 8)  # values come first: theirs are there, and their key is not
    assert FeatureStore(folder / "store").find("target", last) is None and not caplog.records
    values.write_bytes(whole[: (ROWS - 2) * 96 + 5])
    os.truncate(keys, (ROWS - 2) * 8 - 3)
    store = FeatureStore(folder / "store")
    assert len(store) == ROWS - 3 and not caplog.records
    again, _, _ = write(folder, pairs, spec_of(pairs), {"target": pooled})
    assert len(again) == ROWS - 1
    want = np.frombuffer(whole[-96:], np.float32).reshape(2, 2, 6)
    np.testing.assert_array_equal(again.find("target", last), want)


def test_a_store_that_was_cut_short_is_made_whole_again(folder, pairs, caplog):
    write(folder, pairs, spec_of(pairs), {"target": pooled})
    os.truncate(folder / "store/00000.target.values", 2 * 96 + 7)
    assert len(FeatureStore(folder / "store")) == 2
    assert (
        "00000.target.values is cut short: 2 of 6 features are there; the others are made again"
        in caplog.text
    )
    assert len(write(folder, pairs, spec_of(pairs), {"target": pooled})[0]) == ROWS - 1
    (folder / "store/00000.target.values").unlink()
    assert len(write(folder, pairs, spec_of(pairs), {"target": pooled})[0]) == ROWS - 1


def test_processes_share_the_images_and_read_each_others(folder, pairs):
    made = []
    for index in (0, 1):
        share = {"process_index": index, "process_count": 2}
        store, _, _ = write(folder, pairs, spec_of(pairs), {"target": pooled}, **share)
        made.append(len(store))
    assert 0 < made[0] < made[1] == ROWS - 1


def test_a_reader_sees_what_was_added_when_an_epoch_begins(folder, pairs):
    reader = FeatureStore(folder / "store", spec_of(pairs))
    write(folder, pairs, spec_of(pairs), {"target": pooled})
    key = key_of(pairs, 0)
    reader.at_epoch(0)
    assert reader.find("target", key) is None
    reader.at_epoch(1)
    assert reader.find("target", key) is not None


def test_a_store_of_other_images_or_towers_is_refused_with_what_differs(folder, pairs):
    write(folder, pairs, spec_of(pairs), {"target": pooled})
    check_spec(folder / "store", spec_of(pairs))
    with pytest.raises(DataError, match=r"image: stored None, now \(3, 4\)"):
        check_spec(folder / "store", spec_of(pairs, image=(3, 4)))
    rules = PairRules(instruction_every=3, seed=9, prompt_set="release")
    check_spec(folder / "store", spec_of(Cc3mSource(folder / "pairs.tsv", rules=rules)))
    with pytest.raises(
        DataError, match=f"(?s)delete that folder or name.*towers: stored.*{'v' * 64}.*, now.*{'w' * 64}"
    ):
        check_spec(folder / "store", spec_of(pairs, towers={"vae": "w" * 64}))
    with pytest.raises(DataError, match="compute_dtype: stored 'float32', now 'bfloat16'"):
        check_spec(folder / "store", spec_of(pairs, compute_dtype="bfloat16"))
    with pytest.raises(DataError, match="target_size: stored 8, now 16"):
        check_spec(folder / "store", spec_of(pairs, target_size=16))
    with pytest.raises(DataError, match="images_as_shown: stored True, now False"):
        claim(folder / "store", spec_of(pairs, images_as_shown=False))
    (folder / "pairs.tsv").write_text("caption\timage_path\ndog\t0.png\n")
    changed = Cc3mSource(folder / "pairs.tsv", rules=PairRules(instruction_every=3))
    with pytest.raises(
        DataError, match="(?s)image_fingerprint: stored '.*', now '.*samples: stored 10, now 2"
    ):
        check_spec(folder / "store", spec_of(changed))
    # The remedy: another folder.
    write(folder / "other", changed, spec_of(changed), {"target": pooled})


def test_a_store_with_input_images_serves_a_run_that_reads_none(folder, stories):
    towers = {"vae": "v" * 64, "vit": "t" * 64}
    both = spec_of(stories, image=(3, 4), towers=towers, pad_input_square=True)
    write(folder, stories, both, {"target": pooled, "image": states})
    check_spec(folder / "store", spec_of(stories))
    with pytest.raises(DataError, match="towers: stored"):
        check_spec(folder / "store", spec_of(stories, towers={"vae": "x" * 64}))


def test_what_is_wrong_with_a_store_is_said(folder, pairs):
    with pytest.raises(DataError, match="no feature store in"):
        FeatureStore(folder)
    with pytest.raises(DataError, match="float32 or bfloat16, not 'int8'"):
        spec_of(pairs, target_dtype="int8")
    with pytest.raises(
        DataError, match=r"the target encoder gives features of \(2, 2, 6\), the store holds \(9,\)"
    ):
        write(folder, pairs, spec_of(pairs, target=(9,)), {"target": pooled})
    manifest = folder / "store" / "manifest.json"
    manifest.write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match="another version; delete the folder"):
        FeatureStore(folder / "store")
    manifest.write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        FeatureStore(folder / "store")


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(folder, pairs, monkeypatch):
    index = image_index(pairs, plain_config(), seed=0, trees=False, folder=folder / "index")
    store = FeatureStore(folder / "new" / "store", spec_of(pairs))
    fits, words = room_for(index, store)
    assert fits and words.startswith("features of 7 images to draw: 0.7 kB in ") and not store.folder.exists()
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 7 * (96 + 8))
    assert not room_for(index, store)[0]
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 7 * (96 + 8) + 1000)
    assert room_for(index, store, 999)[0]
    fits, words = room_for(index, store, 1000)
    assert not fits and words.endswith("where 1.7 kB are free and 1.0 kB are for checkpoints")


def test_writing_ends_where_it_would_take_the_place_of_checkpoints(folder, pairs, monkeypatch):
    claim(folder / "store", spec_of(pairs))
    writer = FeatureWriter(FeatureStore(folder / "store"), reserve=1000)
    keys, values = np.array([2], np.uint64), np.zeros((1, 2, 2, 6), np.float32)
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 1104)
    writer.append("target", keys, values)
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 1103)
    with pytest.raises(OSError, match="1.1 kB are free, and 1.0 kB are for checkpoints: .*store"):
        writer.append("target", keys + np.uint64(2), values)
    writer.close()
    assert len(FeatureStore(folder / "store")) == 1


def test_features_without_a_manifest_are_refused(folder, pairs):
    write(folder, pairs, spec_of(pairs), {"target": pooled})
    (folder / "store" / "manifest.json").unlink()
    other = spec_of(pairs, towers={"vae": "w" * 64})
    with pytest.raises(
        DataError, match="store holds features without manifest.json; copy it whole or delete it"
    ):
        claim(folder / "store", other)
    shutil.rmtree(folder / "store")  # the remedy
    claim(folder / "store", other)
    assert [path.name for path in (folder / "store").iterdir()] == ["manifest.json"]


def test_a_store_does_not_remember_every_feature_one_by_one(folder, pairs, monkeypatch):
    claim(folder / "store", spec_of(pairs))
    store = FeatureStore(folder / "store")
    writer = FeatureWriter(store)
    monkeypatch.setattr(stored, "RECENT", 2)
    for key, held in ((2, 1), (4, 2), (6, 3), (8, 1)):
        writer.append("target", np.array([key], np.uint64), np.full((1, 2, 2, 6), key, np.float32))
        writer.wait()
        assert len(store._recent["target"]) == held and store.find("target", 2)[0, 0, 0] == 2
    writer.close()
    assert len(store) == 4


@pytest.fixture
def stories(folder):
    def turn(role, *parts):
        content = [
            {"type": "image", "path": p} if p.endswith(".png") else {"type": "text", "text": p} for p in parts
        ]
        return {"role": role, "content": content}

    lines = [
        [turn("user", "a dog", "1.png", "and", "2.png"), turn("assistant", "a cat", "3.png")],
        [turn("user", "hello"), turn("assistant", "a dog")],
        [turn("user", "a dog", "1.png"), turn("assistant", "a cat", "1.png")],
    ]
    (folder / "stories.jsonl").write_text("\n".join(json.dumps({"turns": turns}) for turns in lines))
    return JsonlSource(folder / "stories.jsonl")


@pytest.fixture
def config():
    return plain_config()


def batch_spec(**changes):
    values = dict(
        rows=2, length=96, items=2, images=4, targets=8, image_size=4, target_size=8, image_tokens=3
    )
    return BatchSpec(**(values | changes))


def fill(store, encoders, seen=None):
    """What :attr:`Loader.complete` is in training, without keeping anything."""

    def complete(step, fields, uncached):
        for field, images in uncached.items():
            kind = {"target_moments": "target", "image_states": "image"}[field]
            if seen is not None:
                seen.append((step, field, len(images["keys"])))
            values = encoders[kind](images["pixels"])
            flat = fields[field].reshape(-1, *values.shape[1:])
            flat[images["slots"]] = values

    return complete


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", [True, False])
def test_batches_hold_features_in_the_place_of_images(folder, stories, config, workers, kept):
    spec, seen = spec_of(stories, image=(3, 4), target_dtype="bfloat16", image_dtype="bfloat16"), []
    encoders = {"target": pooled, "image": states}
    config = dataclasses.replace(config, flip_mode="independent")
    store = FeatureStore(folder / "store", spec)
    if kept:
        store = write(folder, stories, spec, encoders, config)[0]
    ready = batch_spec(
        target_moments=(2, 2, 6), image_states=(3, 4), moments_dtype="bfloat16", states_dtype="bfloat16"
    )
    kwargs = dict(global_batch=4, accumulation=2, shuffle=False, num_epochs=1)
    loader = make_loader(
        stories, dataclasses.replace(config, features=store), ready, worker_count=workers, **kwargs
    )
    loader.complete = fill(store, encoders, seen)
    plain = make_loader(stories, config, batch_spec(), **kwargs)
    for got, want in zip(loader, plain, strict=True):
        assert got.target.shape == (2, 2, 0, 0, 3) and got.images.shape == (2, 4, 0, 0, 3)
        assert got.target_moments.dtype == got.image_states.dtype == ml_dtypes.bfloat16
        for item in zip(*np.nonzero(want.item_mask)):
            moments = pooled(want.target[item][None])[0].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(got.target_moments[item], moments)
        for slot in zip(*np.nonzero(want.image_mask)):
            state = states(want.images[slot][None])[0].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(got.image_states[slot], state)
        assert not got.target_moments[~want.item_mask].any()
        for name in ("tokens", "labels", "voken_start", "image_start", "item_mask", "image_mask"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    loader.close()
    assert sorted(seen) == ([] if kept else [(0, "image_states", 3), (0, "target_moments", 2)])


def test_an_image_that_could_not_be_read_is_a_sample_left_out(folder, pairs, config):
    store = write(folder, pairs, spec_of(pairs), {"target": pooled})[0]
    store.complete = True
    for image in folder.glob("*.png"):
        image.unlink()  # a complete store stands for all of them
    ready = batch_spec(rows=2, items=2, images=0, target_moments=(2, 2, 6))
    kwargs = dict(global_batch=2, shuffle=False, num_epochs=1, error_budget=1)
    loader = make_loader(pairs, dataclasses.replace(config, features=store), ready, **kwargs)
    batches = list(loader)
    assert sum(int(batch.item_mask.sum()) for batch in batches) == len(pairs) - 1
    assert str(loader.skipped[0]).endswith("as it could not be read when they were made")


def test_settings_that_do_not_go_together(folder, stories, config):
    store = write(folder, stories, spec_of(stories), {"target": pooled})[0]
    each = dataclasses.replace(config, flip_mode="shared", flip_each_epoch=True, features=store)
    with pytest.raises(DataError, match="mirrored once; set data.flip_each_epoch=False"):
        make_loader(stories, each, batch_spec(target_moments=(2, 2, 6)), global_batch=2)
    with pytest.raises(DataError, match="holds precomputed features .* gives images"):
        next(
            make_loader(stories, config, batch_spec(target_moments=(2, 2, 6)), global_batch=2, shuffle=False)
        )


# The model.


def test_images_and_their_moments_give_equal_losses(tiny_template, tiny_params, tiny_batch):
    batch = jax.tree.map(jnp.asarray, tiny_batch(rows=2))

    @jax.jit
    def losses(params, batch):
        model = tiny_template.bind(params)
        draws = StepRandomness.from_key(jax.random.key(3), batch, model.generator, cfg_dropout=0.1)
        return model.losses(batch, draws, LossOptions({"image": 1.0}))[0]["image"]

    moments = jax.jit(lambda p, x: tiny_template.bind(p).generator.moments(x))(tiny_params, batch.target)
    ready = dataclasses.replace(batch, target=batch.target[:, :0, :0], target_moments=moments)
    want, got = losses(tiny_params, batch), losses(tiny_params, ready)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    other = losses(tiny_params, dataclasses.replace(ready, target_moments=moments[::-1]))
    assert abs(float(other[0] - want[0])) > 1e-3 * abs(float(want[0]))


def test_input_images_and_their_states_give_equal_embeddings(oracle_configs, tiny_batch):
    vit = dataclasses.replace(original.eva_config(oracle_configs["eva_vit"]), num_hidden_layers=1)
    qformer = QFormerConfig.from_hf(
        oracle_configs["qformer_bert"] | {"num_hidden_layers": 1},
        encoder_hidden_size=vit.hidden_size,
        num_query_tokens=4,
        cross_attention_frequency=1,
    )
    llm = LlamaConfig.from_hf(oracle_configs["llama"] | {"num_hidden_layers": 1})
    template = Template.of(lambda rngs: MiniGPT4(llm=llm, vit=vit, qformer=qformer, rngs=rngs))
    random = np.random.default_rng(1)
    params = {
        p: jnp.asarray(0.1 * random.standard_normal(s.shape), s.dtype) for p, s in template.shapes.items()
    }
    embed = jax.jit(lambda batch: template.bind(params).embed(batch))
    image_states = jax.jit(lambda images: template.bind(params).image_states(images))
    images = np.random.default_rng(0).integers(0, 256, (2, vit.image_size, vit.image_size, 3), dtype=np.uint8)
    batch = dataclasses.replace(
        tiny_batch(rows=2),
        images=images,
        image_row=np.array([0, 1]),
        image_start=np.array([2, 5]),
        image_mask=np.array([True, True]),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    want = embed(batch)
    ready = dataclasses.replace(
        batch, images=batch.images[:, :0, :0], image_states=image_states(batch.images)
    )
    np.testing.assert_allclose(embed(ready), want, rtol=1e-5)
    empty = dataclasses.replace(batch, image_mask=jnp.zeros(2, bool))
    assert np.abs(np.asarray(embed(empty) - want)).max() > 1e-3
