"""Ready features: what is stored, for which samples, and that a batch of them is as good as its images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import original
from minigpt5_jax.data.batches.collate import BatchSpec, EncodeConfig
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import prepare_image
from minigpt5_jax.data.prepare.feature_writer import write_features
from minigpt5_jax.data.samples.example import Ready
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource, JsonlSource, Source
from minigpt5_jax.data.sources.features import FeatureSource, FeatureSpec, FeatureStore, image_fingerprint
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.parts.backbones.minigpt4 import MiniGPT4

ROWS, BROKEN = 7, 4


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
        dtype="float32",
        shard_samples=4,
    )
    return FeatureSpec(**(values | changes))


def test_a_samples_features_are_those_of_its_image(folder, pairs):
    assert len(pairs) == ROWS + 3
    missing = write_features(folder / "store", pairs, spec_of(pairs), {"target": pooled}, batch_size=3)
    assert missing == 1
    source = FeatureSource(pairs, FeatureStore(folder / "store"))
    assert isinstance(source, Source) and len(source) == len(pairs)
    for i in range(len(pairs)):
        plain = pairs.example(i, 2)
        if plain.target_image.endswith(f"{BROKEN}.png"):
            with pytest.raises(SampleError, match=f"pairs.tsv:{BROKEN + 2}: cc3m_{BROKEN}.*{BROKEN}.png"):
                source.example(i)
            continue
        ready = source.example(i, 2)
        want = pooled(prepare_image(plain.target_image, 8, square=True, flip=False)[None])[0]
        assert isinstance(ready.target_image, Ready)
        np.testing.assert_array_equal(ready.target_image.values, want)
        assert dataclasses.replace(ready, target_image=plain.target_image) == plain
        assert source.texts(i) == pairs.texts(i)
    assert (
        source.fingerprint() != pairs.fingerprint()
        and "precomputed features (target 2x2x6)" in source.describe()
    )
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[0].target_image.values, source[0].target_image.values)


def test_a_store_of_an_earlier_version_is_read_and_has_the_same_fingerprint(folder, pairs):
    write_features(folder / "store", pairs, spec_of(pairs), {"target": pooled}, batch_size=3)
    now = FeatureSource(pairs, FeatureStore(folder / "store"))
    manifest = folder / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"image_fingerprint"', '"pictures"'))
    then = FeatureSource(pairs, FeatureStore(folder / "store"))
    assert then.features == now.features and then.fingerprint() == now.fingerprint()
    spec = {**dataclasses.asdict(then.features), "pictures": then.features.image_fingerprint}
    del spec["image_fingerprint"]
    written = f"features {pairs.fingerprint()} {json.dumps(spec, sort_keys=True)}"
    assert then.fingerprint() == hashlib.sha256(written.encode()).hexdigest(), "as checkpoints have it"


def test_an_image_of_two_samples_is_stored_once(folder, pairs):
    calls = []
    write_features(
        folder / "store",
        pairs,
        spec_of(pairs, shard_samples=100),
        {"target": lambda x: calls.append(len(x)) or pooled(x)},
        batch_size=2,
    )
    assert np.load(folder / "store" / "00000.target.npy").shape == (ROWS - 1, 2, 2, 6)
    assert set(calls) == {2} and len(calls) == 4  # every call has the one compiled size


def test_bfloat16_is_stored_in_half_the_bytes(folder, pairs):
    write_features(folder / "store", pairs, spec_of(pairs, dtype="bfloat16"), {"target": pooled})
    values = FeatureStore(folder / "store").target(0)
    want = pooled(prepare_image(folder / "0.png", 8, square=True, flip=False)[None])[0]
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(values, want.astype(ml_dtypes.bfloat16))


def test_an_interrupted_run_continues(folder, pairs):
    store, calls = folder / "store", []

    def encoder(images):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return pooled(images)

    with pytest.raises(KeyboardInterrupt):
        write_features(store, pairs, spec_of(pairs), {"target": encoder}, batch_size=4)
    with pytest.raises(DataError, match="store is not finished: 1 of 3 shards are missing"):
        FeatureStore(store)
    assert not list(store.glob("*.part"))
    calls.clear()
    write_features(store, pairs, spec_of(pairs), {"target": encoder}, batch_size=4)
    assert len(calls) == 1
    write_features(folder / "other", pairs, spec_of(pairs), {"target": pooled})
    got, want = FeatureStore(store), FeatureStore(folder / "other")
    for i in set(range(len(pairs))) - {6}:  # sample 6 is the broken image's
        np.testing.assert_array_equal(got.target(i), want.target(i))


def test_processes_share_the_shards(folder, pairs):
    for index in (0, 1):
        write_features(
            folder / "store", pairs, spec_of(pairs), {"target": pooled}, process_index=index, process_count=2
        )
    assert FeatureStore(folder / "store").target(len(pairs) - 1) is not None


def test_a_store_of_other_images_or_towers_is_refused_with_both_fingerprints(folder, pairs):
    write_features(folder / "store", pairs, spec_of(pairs), {"target": pooled})
    store = FeatureStore(folder / "store")
    store.check(spec_of(pairs, dtype="bfloat16", image=(3, 4), image_size=99))
    rules = PairRules(instruction_every=3, seed=9, prompt_set="release")
    reworded = Cc3mSource(folder / "pairs.tsv", rules=rules)
    store.check(spec_of(reworded))
    other = f"'{'w' * 64}'"
    with pytest.raises(DataError, match=f"(?s)again:.*towers: stored.*'{'v' * 64}'.*, now.*{other}"):
        store.check(spec_of(pairs, towers={"vae": "w" * 64}))
    with pytest.raises(DataError, match="target_size: stored 8, now 16"):
        store.check(spec_of(pairs, target_size=16))
    (folder / "pairs.tsv").write_text("caption\timage_path\ndog\t0.png\n")
    changed = Cc3mSource(folder / "pairs.tsv", rules=PairRules(instruction_every=3))
    mine, theirs = image_fingerprint(pairs), image_fingerprint(changed)
    with pytest.raises(
        DataError, match=f"image_fingerprint: stored '{mine}', now '{theirs}'\n  samples: stored 10, now 2"
    ):
        store.check(spec_of(changed))
    with pytest.raises(DataError, match="holds other features.*\n.*towers: stored"):
        write_features(folder / "store", pairs, spec_of(pairs, towers={"vae": "w" * 64}), {"target": pooled})


def test_what_is_wrong_with_a_store_is_said(folder, pairs):
    with pytest.raises(DataError, match="no feature store in"):
        FeatureStore(folder)
    with pytest.raises(DataError, match="float32, not 'int8'|not 'int8'"):
        spec_of(pairs, dtype="int8")
    with pytest.raises(
        DataError, match=r"the target encoder gives features of \(2, 2, 6\), the store holds \(9,\)"
    ):
        write_features(folder / "store", pairs, spec_of(pairs, target=(9,)), {"target": pooled})
    manifest = folder / "store" / "manifest.json"
    manifest.write_text(json.dumps({"format": 0}))
    with pytest.raises(DataError, match="another version"):
        FeatureStore(folder / "store")
    manifest.write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        FeatureStore(folder / "store")


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


def test_input_images_in_their_order(folder, stories):
    spec = spec_of(stories, image=(3, 4), shard_samples=2)
    write_features(folder / "store", stories, spec, {"target": pooled, "image": states}, batch_size=2)
    source = FeatureSource(stories, FeatureStore(folder / "store"))
    for i, (names, target) in enumerate([((1, 2), 3), ((), None), ((1,), 1)]):
        example = source[i]
        assert (example.target_image is None) == (target is None)
        assert len(example.images) == len(names)
        for name, ready in zip(names, example.images):
            pixels = prepare_image(folder / f"{name}.png", 4, square=False, flip=False)
            np.testing.assert_array_equal(ready.values, states(pixels[None])[0])


@pytest.fixture
def config(oracle_dir):
    llama = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    return EncodeConfig(llama, ClipTokenizer(oracle_dir / "tokenizer_clip"))


def batch_spec(**changes):
    values = dict(
        rows=2, length=96, items=2, images=4, targets=8, image_size=4, target_size=8, image_tokens=3
    )
    return BatchSpec(**(values | changes))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_features_in_the_place_of_images(folder, stories, config, workers):
    spec = spec_of(stories, image=(3, 4), dtype="bfloat16")
    write_features(folder / "store", stories, spec, {"target": pooled, "image": states})
    kwargs = dict(global_batch=2, shuffle=False, num_epochs=1)
    ready = batch_spec(target_moments=(2, 2, 6), image_states=(3, 4), feature_dtype="bfloat16")
    source = FeatureSource(stories, FeatureStore(folder / "store"))
    loader = make_loader(source, config, ready, worker_count=workers, **kwargs)
    plain = make_loader(stories, config, batch_spec(), **kwargs)
    for got, want in zip(loader, plain, strict=True):
        assert got.target.shape == (2, 0, 0, 3) and got.images.shape == (4, 0, 0, 3)
        assert got.target_moments.dtype == got.image_states.dtype == ml_dtypes.bfloat16
        for item in np.flatnonzero(want.item_mask):
            moments = pooled(want.target[item][None])[0].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(got.target_moments[item], moments)
        for slot in np.flatnonzero(want.image_mask):
            state = states(want.images[slot][None])[0].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(got.image_states[slot], state)
        assert not got.target_moments[~want.item_mask].any()
        for name in (
            "tokens",
            "labels",
            "voken_start",
            "image_start",
            "item_mask",
            "image_mask",
            "caption_ids",
        ):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    loader.close()


def test_settings_that_do_not_go_together(folder, stories, config):
    write_features(folder / "store", stories, spec_of(stories), {"target": pooled})
    source = FeatureSource(stories, FeatureStore(folder / "store"))
    flips = dataclasses.replace(config, flip_mode="shared")
    with pytest.raises(DataError, match="never mirrored; set flip_mode to 'off', it is 'shared'"):
        make_loader(source, flips, batch_spec(target_moments=(2, 2, 6)), global_batch=2)
    for data, spec, reason in [
        (source, batch_spec(), "the batch holds images, the data gives features"),
        (
            stories,
            batch_spec(target_moments=(2, 2, 6)),
            "holds precomputed features .* gives images",
        ),
        (source, batch_spec(target_moments=(4, 4, 6)), r"features of shape \(4, 4, 6\), the data gives"),
    ]:
        with pytest.raises(DataError, match=reason):
            next(make_loader(data, config, spec, global_batch=2, shuffle=False))


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
