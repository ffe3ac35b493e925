"""Packed rows train as unpacked ones do: equal losses and gradients from the same samples."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.lengths import measure
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.training.step import StepOptions, accumulate_gradients

WORDS = ["a dog", "the small dog ran over the hill", "we", "one red dog and two", "the end of the day", "so"]


@pytest.fixture(scope="module")
def template():
    return tiny.make_tiny_template(vocab_size=1000, caption_vocab_size=528)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["caption\timage_path"]
    for i, words in enumerate(WORDS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{words}\t{i}.png")
    (folder / "pairs.tsv").write_text("\n".join(lines))
    return Cc3mSource(folder / "pairs.tsv", rules=PairRules(training=False))


def batch(source, oracle_dir, pack, split=False):
    tokenizer = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    config = EncodeConfig(tokenizer, ClipTokenizer(oracle_dir / "tokenizer_clip", 12))
    spec = BatchSpec(
        rows=6 // pack,
        length=28 * pack,
        items=6,
        images=0,
        targets=3,
        image_size=0,
        target_size=16,
        caption_length=12,
        pack=pack,
        split=split,
    )
    loader = make_loader(
        source,
        config,
        spec,
        global_batch=6,
        shuffle=False,
        num_epochs=1,
        prefetch=0,
        index=measure(source, tokenizer, 32),
    )
    made = next(loader)
    loader.close()
    return made


@pytest.fixture(scope="module")
def gradients(template):
    """``gradients(batch) -> (gradients, loss, sums)``, compiled for each layout."""
    params = tiny.make_tiny_params(template)
    trainable = {p: v for p, v in params.items() if p.startswith("mapper/") or p.endswith("/voken")}
    frozen = {p: v for p, v in params.items() if p not in trainable}
    options = StepOptions(LossOptions({"text": 1.0, "image": 1.0, "caption": 1.0}), cfg_dropout=0.3)
    generator = template.bind(template.shapes).generator

    @jax.jit
    def compute(trainable, frozen, batch):
        def draw(micro):
            return StepRandomness.from_key(jax.random.key(5), micro, generator, cfg_dropout=0.3)

        return accumulate_gradients(template, trainable, frozen, batch, draw, options)

    return lambda batch: compute(trainable, frozen, batch)


@pytest.fixture(scope="module")
def apart(gradients, source, oracle_dir):
    """Of one sample to a row."""
    return gradients(batch(source, oracle_dir, 1))


@pytest.mark.parametrize("pack, split", [(2, False), (3, False), (1, True), (3, True)])
def test_every_layout_gives_equal_losses_and_gradients(gradients, apart, source, oracle_dir, pack, split):
    grads, loss, sums = apart
    packed_grads, packed_loss, packed_sums = gradients(batch(source, oracle_dir, pack, split))
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for name in ("text", "image", "caption"):
        np.testing.assert_allclose(packed_sums[name][0], sums[name][0], rtol=1e-5, err_msg=name)
        assert packed_sums[name][1] == sums[name][1] > 0
    largest = max(np.abs(value).max() for value in grads.values())
    for path, value in grads.items():
        if path.endswith("k_proj/bias"):  # softmax does not see it: all that is there is rounding
            assert max(np.abs(value).max(), np.abs(packed_grads[path]).max()) < 1e-7 * largest
            continue
        scale = np.abs(value).max()
        assert scale > 1e-5 * largest, path
        np.testing.assert_allclose(packed_grads[path], value, atol=1e-5 * scale, err_msg=path)
