"""Features of a configuration: made by its frozen towers, written by training, placed on the devices."""

from __future__ import annotations

import errno
import itertools
import math
import os

import numpy as np
import pytest

from minigpt5_jax.config import ConfigError, get_config, use_shapes_backbones, validate
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare import feature_writer
from minigpt5_jax.data.sources.features import FeatureStore
from minigpt5_jax.training.sharding import make_mesh, parameter_shardings
from minigpt5_jax.wiring import feature_cache, features
from minigpt5_jax.wiring.feature_cache import FeatureCache, checkpoint_bytes, open_features
from minigpt5_jax.wiring.features import load_towers, make_encoder, prepare_features, with_planned_features
from minigpt5_jax.wiring.inputs import batch_spec, make_batch_sharder, open_loader, open_sources
from minigpt5_jax.wiring.model import build, load_frozen

SAMPLES, BATCH = 20, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = get_config()
    use_shapes_backbones(config)
    config.run.workdir = str(tmp_path_factory.mktemp("features"))
    config.data.update(
        format="shapes",
        shapes_train=SAMPLES,
        shapes_validation=4,
        instruction_every=0,
        max_length=56,
        global_batch=BATCH,
        worker_count=0,
        index_cache=f"{config.run.workdir}/index",
    )
    return config


@pytest.fixture(scope="module")
def spec(base):
    return build(base)


@pytest.fixture(scope="module")
def source(base, spec):
    return open_sources(base, spec.sizes)[0]


@pytest.fixture(scope="module")
def encoder(base, spec):
    """The VAE's encoder, compiled once, on the eight devices of the tests."""
    return make_encoder(spec.template, "target", load_frozen(base, spec, only=("vae",)))


@pytest.fixture
def calls(monkeypatch, encoder):
    """Images of each call of the encoder, which every maker of features gets."""
    seen = []

    def make(*_):
        return lambda images: seen.append(len(images)) or encoder(images)

    for room in (features, feature_cache):
        monkeypatch.setattr(room, "make_encoder", make)
    return seen


@pytest.fixture
def config(base, tmp_path):
    config = base.copy_and_resolve_references()
    config.data.update(cache="on", features=str(tmp_path / "store"))
    return config


class Run:
    """The data of a run from ``step`` on, as training has them."""

    def __init__(self, config, spec, source, step=0):
        self.told = []
        opened, self.note = open_features(config, spec, source)
        self.towers = None if opened is None else set(opened.towers)
        self.loader = open_loader(config, spec, source, training=True, features=opened and opened.store)
        self.loader.restore(step)
        if opened is not None:
            self.cache = self.loader.complete = FeatureCache(
                opened,
                source,
                spec,
                {},
                self.loader,
                epoch_steps=math.ceil(SAMPLES / BATCH),
                tell=self.told.append,
                load=lambda kind: load_towers(config, spec, kind)[0],
            )

    def take(self, steps):
        batches = list(itertools.islice(self.loader, steps))
        self.loader.close()
        self.cache.close()
        return batches


def pixels(config, spec, source, steps):
    """The same batches with images."""
    loader = open_loader(config, spec, source, training=True)
    batches = list(itertools.islice(loader, steps))
    loader.close()
    return batches


def same(batches, plain, encoder):
    """Every moment is that of its image, bit for bit."""
    for got, want in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(got.target_moments, encoder(want.target))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert got.target.shape == (BATCH, 0, 0, 3)


@pytest.mark.parametrize("flip_mode", ["off", "independent", "shared"])
def test_the_first_epoch_writes_what_the_later_ones_read(flip_mode, config, spec, source, encoder, calls):
    config.data.flip_mode = flip_mode
    plain = pixels(config, spec, source, 7)
    run = Run(config, spec, source)
    assert run.note.startswith("features of 20 images to draw: 41.1 kB in ")
    assert run.note.endswith("; the first epoch writes them")
    same(run.take(7), plain, encoder)
    assert sum(calls) <= 24 + 8, "each image once, in batches of one size"
    assert run.told == [f"the features of all images are in {config.data.features}: they are encoded no more"]
    calls.clear()
    again = Run(config, spec, source, step=4)
    assert again.towers == set() and again.note.startswith("images are not encoded")
    same(again.take(3), plain[4:], encoder)
    assert not calls


def test_a_run_that_was_killed_goes_on_with_what_is_on_the_disk(config, spec, source, encoder, calls):
    plain = pixels(config, spec, source, 5)
    Run(config, spec, source).take(1)
    os.truncate(f"{config.data.features}/00000.target.keys", 8 * BATCH - 3)  # killed in the middle of a key
    calls.clear()
    run = Run(config, spec, source, step=1)
    assert run.note.startswith(f"features of {SAMPLES - BATCH + 1} images to draw")
    same(run.take(4), plain[1:], encoder)
    assert sum(calls) <= 3 * BATCH, "two steps, and what no step of this run had read"
    assert run.told
    assert len(FeatureStore(config.data.features)) == SAMPLES


def test_an_image_that_can_be_read_again_does_not_end_the_run(config, spec, source, encoder, calls, caplog):
    run = Run(config, spec, source)
    run.take(4)
    assert run.told and not calls.clear()
    size = config.model.generator.image_size
    pixels = np.full((2, size, size, 3), 7, np.uint8)
    fields = {"target_moments": np.zeros((2, *run.cache._store.spec.target), np.float32)}
    images = {"keys": np.array([2, 2], np.uint64), "pixels": pixels, "slots": np.arange(2)}
    run.cache(4, fields, {"target_moments": images})
    np.testing.assert_array_equal(fields["target_moments"], encoder(pixels))
    run.cache(6, fields, {"target_moments": images})  # another epoch: the others wait for nobody
    assert caplog.text.count("can be read now that could not when") == 1 and len(run.told) == 1


def test_a_store_without_its_manifest_is_refused(config, spec, source, calls):
    Run(config, spec, source).take(1)
    os.remove(f"{config.data.features}/manifest.json")
    for take in (open_features, lambda *_: prepare_features(config, source, config.data.features)):
        with pytest.raises(
            DataError, match="holds features without manifest.json; copy it whole or delete it"
        ):
            take(config, spec, source)


def test_towers_that_the_step_does_not_hold_are_counted(config, spec, source, calls):
    opened = open_features(config, spec, source)[0]
    whole = parameter_shardings(spec.template.shapes, spec.template.axes, make_mesh(8, 1, 1), spec.sharding)
    size = sum(value.nbytes for value in opened.towers["target"].values())
    assert opened.extra_bytes(spec, whole) == 0 < size
    assert opened.extra_bytes(spec.without({"vae"}), whole) == size


def test_a_store_of_prepare_features_is_read(config, spec, source, encoder, calls):
    said = []
    store = config.data.features
    assert prepare_features(config, source, store, tell=said.append, batch_size=BATCH) == (
        f"features of {SAMPLES} images in {store}; 0 images are unusable"
    )
    assert said[0].startswith("features of 20 images to draw: 41.1 kB in")
    config.data.cache = "off"
    run = Run(config, spec, source)
    assert run.towers == set()
    batch = make_batch_sharder(make_mesh(4, 1, 2), 1)(run.take(1)[0])
    same([batch], pixels(config, spec, source, 1), encoder)


def test_what_is_not_finished_and_shall_not_be_written_is_refused(config, spec, source, calls):
    Run(config, spec, source).take(1)
    config.data.cache = "off"
    with pytest.raises(DataError, match="not finished: features of 12 images to draw are missing.*cache=on"):
        open_features(config, spec, source)
    config.data.cache = "on"  # the remedy
    assert open_features(config, spec, source)[0].towers
    config.data.update(cache="off", features=f"{config.data.features}/nothing")
    with pytest.raises(DataError, match="no feature store in .*nothing"):
        open_features(config, spec, source)
    config.data.features = ""
    assert open_features(config, spec, source) == (None, "")


def test_a_disk_that_is_too_small(config, spec, source, monkeypatch):
    reserve = checkpoint_bytes(config, spec)
    config.run.keep_latest += 1
    assert checkpoint_bytes(config, spec) == reserve * 5 // 4, "two, the best, and one more"
    config.run.keep_latest -= 1
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 41_000)
    opened, note = open_features(config, spec, source)
    assert opened is None and not os.path.exists(config.data.features)
    assert note.startswith(
        "images are encoded in each step, as the disk is too small for features of 20 images"
    )
    assert "41.1 kB" in note and "where 41.0 kB are free" in note and note.endswith("data.features")
    with pytest.raises(DataError, match="the disk is too small for features of 20.*name a folder on another"):
        prepare_features(config, source, config.data.features)
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 41_000 + reserve)
    assert open_features(config, spec, source)[0] is None
    monkeypatch.setattr(feature_writer, "free_bytes", lambda folder: 42_000 + reserve)
    assert open_features(config, spec, source)[0].reserve == reserve > 0


def test_a_disk_that_fills_up_ends_the_writing_and_not_the_run(
    config, spec, source, encoder, calls, monkeypatch, caplog
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    plain = pixels(config, spec, source, 5)
    run = Run(config, spec, source)
    with monkeypatch.context() as patch:
        patch.setattr(feature_writer.os, "fdatasync", full)
        same(run.take(5), plain, encoder)
    assert "features are no longer written: [Errno 28]" in caplog.text and not run.told
    assert len(FeatureStore(config.data.features)) == 0
    same(Run(config, spec, source).take(5), plain, encoder)


def test_images_of_another_form_in_each_epoch(config, spec, source):
    config.data.features = ""
    config.data.flip_each_epoch = True
    assert open_features(config, spec, source) == (
        None,
        "images are encoded in each step, as data.flip_each_epoch=True draws mirrors again each epoch",
    )
    config.data.update(flip_mode="off", context_dropout=0.2)
    assert "data.context_dropout=0.2 chooses other images" in open_features(config, spec, source)[1]
    with pytest.raises(DataError, match="same images in each epoch.*set .* data.context_dropout=0"):
        prepare_features(config, source, "x")
    config.data.update(format="vist", features="x")
    with pytest.raises(ConfigError, match="data.features are of whole contexts"):
        validate(config)


def test_a_store_of_other_towers_or_transforms_is_refused(config, spec, source, calls, monkeypatch):
    Run(config, spec, source).take(1)
    config.data.images_as_shown = False
    with pytest.raises(DataError, match="(?s)delete that folder.*images_as_shown: stored True, now False"):
        open_features(config, spec, source)
    config.data.images_as_shown = True
    with monkeypatch.context() as patch:

        def other(*args, **kwargs):
            params = load_frozen(*args, **kwargs)
            path = next(path for path in params if path.startswith("generator/vae/encoder/"))
            return {**params, path: params[path] + 1e-3}

        patch.setattr(features, "load_frozen", other)
        with pytest.raises(DataError, match=r"towers: stored \{'vae': '\w{64}.*now \{'vae': '\w{64}"):
            open_features(config, spec, source)
        config.data.features += "2"  # the remedy
        assert open_features(config, spec, source)[0].towers


def test_the_tower_they_stand_for_need_not_be_there(config, spec, source, calls, tmp_path, caplog):
    """A run that never uses the VAE trains from its store without it, with a warning; others do not."""
    Run(config, spec, source).take(1)
    vae, config.weights.vae = config.weights.vae, str(tmp_path / "nowhere")
    for model in (spec, spec.without({"vae"})):
        with pytest.raises(ConfigError, match=r"weights.vae: .*nowhere does not exist"):
            open_features(config, model, source)
    config.weights.vae = vae
    prepare_features(config, source, config.data.features, tell=lambda _: None, batch_size=BATCH)
    config.weights.vae = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"weights.vae: .*nowhere does not exist"):
        open_features(config, spec, source)
    assert open_features(config, spec.without({"vae"}), source)[0].store.complete
    assert "taken to be those of this run's weights.vae, which cannot all be compared" in caplog.text


def test_shapes_of_batches_with_features(config, spec):
    shapes = batch_spec(config, spec, BATCH)
    side = config.model.generator.image_size // 8
    planned = with_planned_features(config, spec, shapes)
    assert planned.target_moments == (side, side, 8) and planned.image_states is None
    config.loss.image = 0.0  # then nothing reads the images to draw
    assert with_planned_features(config, build(config), shapes).target_moments is None
