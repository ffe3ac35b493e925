"""A story as one tree trains as its samples do apart: equal losses and LoRA gradients, fewer positions."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.collate import collate
from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.image_index import image_index
from minigpt5_jax.data.batches.pipeline import StepReader, make_loader
from minigpt5_jax.data.batches.plan import EMPTY_SLOT, Shape
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.batches.stories import TreePlan, measure_stories
from minigpt5_jax.data.batches.tree import plant
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.prepare.feature_writer import FeatureWriter, claim, write_missing
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import VistSource
from minigpt5_jax.data.sources.features import FeatureSpec, FeatureStore, image_fingerprint
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.training.step import StepOptions, accumulate_gradients

STEPS = ["we went to the lake", "a dog ran", "the end of the day"]


def test_nodes_are_shared_and_see_their_ancestors():
    sequences = [[1, 2, 3, 4], [1, 5], [1, 2, 6], [1, 2, 3, 4], [1, 2]]
    tree = plant(sequences)
    assert len(tree.before) == 6
    keys = {}
    for path, own in zip(tree.paths, sequences, strict=True):
        for node, key in zip(path.tolist(), own, strict=True):
            assert keys.setdefault(node, key) == key
        for node in path.tolist():
            seen = [j for j in range(6) if j <= node < tree.ends[j]]
            assert seen == [n for n in path.tolist() if n <= node]  # its ancestors and itself
        assert tree.before[path[1:]].tolist() == path[:-1].tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, stories = tmp_path_factory.mktemp("stories"), {}
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    for name, count in (("a", 3), ("b", 2), ("c", 3)):
        stories[name] = [
            {"caption": f"{STEPS[n]} {name}", "image_id": str(n), "sequence_index": n} for n in range(count)
        ]
    (folder / "cleaned.json").write_text(json.dumps(stories))
    (folder / "image_mapping.json").write_text(json.dumps({str(n): f"{n}.png" for n in range(3)}))
    return VistSource(folder / "cleaned.json", rules=StoryRules())


@pytest.fixture(scope="module")
def config(oracle_dir):
    tokenizer = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    return EncodeConfig(tokenizer, ClipTokenizer(oracle_dir / "tokenizer_clip", 12), flip_mode="independent")


PLACES, ROWS = 7, 3
SPEC = BatchSpec(
    rows=ROWS,
    length=160,
    items=ROWS * PLACES,
    images=ROWS * PLACES * 3,
    targets=24,
    image_size=28,
    target_size=16,
    caption_length=12,
    image_tokens=4,
    pack=PLACES,
)


@pytest.fixture(scope="module")
def index(source, config):
    return measure_stories(source, config, SPEC)


def as_tree(source, config, index) -> Batch:
    """The first step: all three stories."""
    loader = make_loader(source, config, SPEC, global_batch=ROWS * PLACES, stories=index, prefetch=0, seed=3)
    batch = next(loader)
    loader.close()
    return batch


def apart(source, config, index) -> Batch:
    """The same samples, one to a row, their images mirrored as the loader's."""
    config = dataclasses.replace(config, image_root=source.image_root)
    plan = TreePlan(index, limit=SPEC.length, seed=3, num_epochs=None, shape=Shape(1, ROWS, PLACES))
    reader = StepReader(source, config, plan, plan.shapes(SPEC), 0, 3)
    numbers = plan.step(0).numbers[0]
    kept = numbers.ravel() != EMPTY_SLOT
    limits = [SPEC.length] * numbers.size
    samples = reader._read(numbers.ravel().tolist(), limits, reader.parts[-1], [])
    count = int(kept.sum())
    single = dataclasses.replace(SPEC, rows=count, pack=1, items=count, images=3 * count)
    rows = [[sample] for sample in samples if sample is not None]
    return Batch(**collate(rows, single, numbers.reshape(-1, 1)[kept], config))


def test_a_tree_gives_the_losses_and_gradients_of_its_samples(source, config, index):
    tree, plain = as_tree(source, config, index), apart(source, config, index)
    assert tree.tokens.shape[0] == ROWS and tree.item_mask.shape[0] == ROWS * 5  # 5 of 7 samples draw
    assert (tree.segment_ids > 0).sum() < 0.5 * (plain.segment_ids > 0).sum()
    assert (
        tree.images.shape[0] == ROWS * 3 and tree.image_mask.sum() == 4 + 2 + 4
    )  # read once, in many places
    assert tree.item_mask.sum() == plain.item_mask.sum()
    template = tiny.make_tiny_template(vocab_size=1000, caption_vocab_size=528, sees=True)
    params = tiny.make_tiny_params(template)
    trains = ("mapper/", "voken", "lora_a", "lora_b")
    trainable = {p: v for p, v in params.items() if p.startswith(trains) or p.endswith(trains)}
    frozen = {p: v for p, v in params.items() if p not in trainable}
    options = StepOptions(LossOptions({"text": 1.0, "image": 1.0}), cfg_dropout=0.3)
    generator = template.bind(template.shapes).generator

    @jax.jit
    def gradients(trainable, frozen, batch):
        def draw(micro):
            return StepRandomness.from_key(jax.random.key(5), micro, generator, cfg_dropout=0.3)

        return accumulate_gradients(template, trainable, frozen, batch, draw, options)

    want, loss, sums = gradients(trainable, frozen, plain)
    got, tree_loss, tree_sums = gradients(trainable, frozen, tree)
    np.testing.assert_allclose(tree_loss, loss, rtol=1e-5)
    for name in ("text", "image"):
        np.testing.assert_allclose(tree_sums[name][0], sums[name][0], rtol=1e-5, err_msg=name)
        assert tree_sums[name][1] == sums[name][1] > 0
    largest = max(np.abs(value).max() for value in want.values())
    assert any("lora_b" in path for path in want)
    for path, value in want.items():
        if path.endswith("k_proj/bias"):  # softmax does not see it: all that is there is rounding
            continue
        scale = max(np.abs(value).max(), 1e-3 * largest)
        np.testing.assert_allclose(got[path], value, atol=1e-5 * scale, err_msg=path)


def test_precomputed_features_stand_for_the_images_of_trees(source, config, index, tmp_path):
    def target(images):
        return images[:, ::8, ::8].astype(np.float32)

    def states(images):
        return images[:, ::7, 0].astype(np.float32)

    spec = FeatureSpec(
        image_fingerprint=image_fingerprint(source),
        samples=len(source),
        towers={},
        target=(2, 2, 3),
        image=(4, 3),
        target_size=16,
        image_size=28,
    )
    images = image_index(source, config, seed=3, trees=True, folder=tmp_path / "index")
    claim(tmp_path / "store", spec)
    store = FeatureStore(tmp_path / "store", spec)
    writer = FeatureWriter(store)
    write_missing(source, images, store, writer, {"target": target, "image": states}, batch_size=3)
    writer.close()
    kwargs = {"global_batch": ROWS * PLACES, "stories": index, "prefetch": 0, "seed": 3}
    ready = dataclasses.replace(SPEC, target_moments=(2, 2, 3), image_states=(4, 3))
    stored = dataclasses.replace(config, features=FeatureStore(tmp_path / "store"))
    got = next(make_loader(source, stored, ready, **kwargs))
    want = next(make_loader(source, config, SPEC, **kwargs))
    items, places = want.item_mask, np.unique(want.image_index[want.image_mask])
    np.testing.assert_array_equal(got.target_moments[items], target(want.target[items]))
    np.testing.assert_array_equal(got.image_states[places], states(want.images[places]))
    for name in ("tokens", "subtree_end", "item_mask", "image_mask", "image_index", "voken_row"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)


def test_an_epoch_of_trees_reads_every_sample_once(index):
    plan = TreePlan(index, limit=160, seed=0, num_epochs=1, shape=Shape(1, 2, PLACES))
    assert plan.num_steps == 2 and index.starts.tolist() == [0, 7, 11, 18]
    assert index.items.tolist() == [5, 3, 5] and index.images.tolist() == [3, 2, 3]
    numbers = np.concatenate([plan.step(step).numbers.reshape(-1, PLACES) for step in range(2)])
    found = [plan.find(int(number)) for number in numbers.ravel() if number != EMPTY_SLOT]
    assert sorted(found) == [(0, place) for place in range(18)]
    for row in numbers:  # a row is one story
        there = row[row != EMPTY_SLOT]
        assert not len(there) or there.tolist() in ([*range(7)], [*range(7, 11)], [*range(11, 18)])
    with pytest.raises(DataError, match="a story has 7 samples, a row 5 places"):
        TreePlan(index, limit=160, seed=0, num_epochs=1, shape=Shape(1, 2, 5))


def test_samples_too_long_for_their_limit_are_cut_and_shared_less(source, config, index):
    short = dataclasses.replace(SPEC, length=80)
    cut = measure_stories(source, config, short)
    loader = make_loader(source, config, short, global_batch=ROWS * PLACES, stories=cut, prefetch=0, seed=3)
    batch = next(loader)
    loader.close()
    assert loader.truncated > 0 and batch.positions.max() < 80 and batch.item_mask.sum() == 13
    assert cut.lengths.max() >= (batch.segment_ids > 0).sum(1).max()


def test_each_process_reads_its_stories(source, config, index):
    whole = as_tree(source, config, index)
    kwargs = {"global_batch": ROWS * PLACES, "stories": index, "prefetch": 0, "seed": 3, "process_count": 3}
    parts = []
    for process in range(3):
        loader = make_loader(source, config, SPEC, process_index=process, **kwargs)
        parts.append(next(loader))
        loader.close()
    for field in dataclasses.fields(Batch):
        if getattr(whole, field.name) is not None:
            joined = np.concatenate([getattr(part, field.name) for part in parts])
            masked = whole.image_mask if field.name == "image_index" else slice(None)
            np.testing.assert_array_equal(joined[masked], getattr(whole, field.name)[masked], field.name)
