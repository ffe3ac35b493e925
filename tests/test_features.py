"""Ready features of a configuration: the small world's VAE, batches on the devices, refusals."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from minigpt5_jax.config import ConfigError, get_config, use_shapes_backbones, validate
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.sources.features import FeatureStore
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.wiring.features import (
    open_features,
    prepare_features,
    with_features,
    with_planned_features,
)
from minigpt5_jax.wiring.inputs import batch_spec, encode_config, make_batch_sharder, open_sources
from minigpt5_jax.wiring.model import build


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = get_config()
    use_shapes_backbones(config)
    config.run.workdir = str(tmp_path_factory.mktemp("features"))
    config.data.update(
        format="shapes", shapes_train=12, shapes_validation=4, max_length=56, global_batch=8, flip_mode="off"
    )
    return config


@pytest.fixture(scope="module")
def spec(config):
    return build(config)


@pytest.fixture(scope="module")
def source(config, spec):
    return open_sources(config, spec.sizes)[0]


@pytest.fixture(scope="module")
def folder(config, source):
    path = f"{config.run.workdir}/store"
    said = prepare_features(config, source, path, dtype="float32", batch_size=8, threads=1)
    assert said.startswith(f"features of {len(source):,} samples in {path}; 0 samples are unusable")
    return path


def test_moments_on_the_devices_are_those_of_the_images(config, spec, source, folder):
    ready = open_features(config, spec, source, folder)
    shapes = batch_spec(config, spec, 8)
    words = encode_config(config, spec.sizes, training=True)
    place = make_batch_sharder(make_mesh(4, 1, 2), 1)
    plain = next(make_loader(source, words, shapes, global_batch=8))
    batch = place(next(make_loader(ready, words, with_features(shapes, ready.features), global_batch=8)))
    side = config.model.generator.image_size // 8
    assert batch.target.shape == (8, 0, 0, 3) and batch.target_moments.shape == (8, side, side, 8)
    again = prepare_once(config, spec, plain.target)
    np.testing.assert_allclose(np.asarray(batch.target_moments), again, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch.tokens, plain.tokens)
    assert jax.tree.structure(batch) != jax.tree.structure(plain)


def prepare_once(config, spec, images):
    """Moments straight from the tower."""
    from minigpt5_jax.wiring.model import load_frozen

    params = load_frozen(config, spec, only=("vae",))

    @jax.jit
    def moments(params, images):
        return spec.template.bind({**spec.template.shapes, **params}).generator.moments(images)

    return moments(params, images)


def test_what_does_not_belong_together_is_refused(config, spec, source, folder):
    flipped = config.copy_and_resolve_references()
    flipped.data.flip_mode = "shared"
    with pytest.raises(DataError, match="never mirrored; set data.flip_mode=off, it is 'shared'"):
        open_features(flipped, spec, source, folder)
    thinned = config.copy_and_resolve_references()
    thinned.data.context_dropout = 0.2
    with pytest.raises(DataError, match="of whole contexts.*set data.context_dropout=0, it is 0.2"):
        open_features(thinned, spec, source, folder)
    with pytest.raises(DataError, match="of whole contexts"):
        prepare_features(thinned, source, folder)
    thinned.data.update(format="vist", features=str(folder))
    with pytest.raises(ConfigError, match="data.features are of whole contexts"):
        validate(thinned)
    fewer = config.copy_and_resolve_references()
    fewer.data.instruction_every = 2
    with pytest.raises(DataError, match="(?s)not belong to this run.*image_fingerprint: stored '.*', now '"):
        open_features(fewer, spec, open_sources(fewer, spec.sizes)[0], folder)
    reworded = config.copy_and_resolve_references()
    reworded.run.seed = 7  # another order, other wordings, other scenes
    reworded.data.update(format="cc3m", train=f"{config.run.workdir}/data/shapes_train.tsv")
    assert len(open_features(reworded, spec, open_sources(reworded, spec.sizes)[0], folder)) == len(source)


def test_another_vae_is_refused(config, spec, source, folder, monkeypatch):
    import minigpt5_jax.wiring.features as room

    load = room.load_frozen

    def other(*args, **kwargs):
        params = load(*args, **kwargs)
        path = next(path for path in params if path.startswith("generator/vae/encoder/"))
        return {**params, path: params[path] + 1e-3}

    monkeypatch.setattr(room, "load_frozen", other)
    with pytest.raises(DataError, match=r"towers: stored \{'vae': '\w{64}.*now \{'vae': '\w{64}"):
        open_features(config, spec, source, folder)


def test_the_tower_they_stand_for_need_not_be_there(config, spec, source, folder, tmp_path, caplog):
    """A run that never uses the VAE trains from its store without it, with a warning; others do not."""
    away = config.copy_and_resolve_references()
    away.weights.vae = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"weights.vae: .*nowhere does not exist"):
        open_features(away, spec, source, folder)
    assert len(open_features(away, spec.without({"vae"}), source, folder)) == len(source)
    assert "taken to be those of this run's weights.vae, which cannot be compared" in caplog.text
    away.data.features = folder
    shapes = batch_spec(away, spec, 8)
    assert with_planned_features(away, spec, shapes).feature_dtype == "float32"
    away.data.features = str(tmp_path)
    planned = with_planned_features(away, spec, shapes)
    assert planned.target_moments == FeatureStore(folder).spec.target and planned.image_states is None


def test_features_of_input_images_only_where_the_batch_reads_any(config, spec, source, folder):
    ready = open_features(config, spec, source, folder)
    shapes = batch_spec(config, spec, 8)
    assert with_features(shapes, ready.features).image_states is None
    both = dataclasses.replace(ready.features, image=(32, 768))
    assert with_features(dataclasses.replace(shapes, images=8), both).image_states == (32, 768)
