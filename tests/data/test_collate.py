"""One batch, every field checked against what the contract says of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches import encode as encoding
from minigpt5_jax.data.batches.collate import collate
from minigpt5_jax.data.batches.encode import EncodeConfig, encode
from minigpt5_jax.data.batches.spec import BatchSpec, empty_arrays
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import draw_flips, prepare_image
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text.templates import IGNORE, IMAGE, target_text
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer

SPEC = BatchSpec(
    rows=3, length=40, items=3, images=6, targets=8, image_size=16, target_size=24, image_tokens=3
)


@pytest.fixture(scope="module")
def config(oracle_dir):
    llama = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    return EncodeConfig(llama, ClipTokenizer(oracle_dir / "tokenizer_clip"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(4)]


def in_rows(samples):
    """One sample to a row."""
    return [[sample] for sample in samples]


def numbers(row_ids):
    return np.asarray(row_ids, np.int64)[:, None]


def example(source, text, images=(), target=None, caption=None):
    return Example(
        source, target_text(text, draws=target is not None), images, target, caption, "t", "id", "f:1"
    )


@pytest.fixture(scope="module")
def examples(images):
    return [
        example("the lake", "", target=images[0], caption="a red dog"),
        example(f"one{IMAGE}two{IMAGE}", "we", (images[1], images[2]), images[3]),
        example("the lake", "we went"),
    ]


def test_batch_fields(examples, config, images, oracle_cases):
    samples = [encode(e, config, SPEC, (0, 0, i)) for i, e in enumerate(examples)]
    row_ids = [7, 2**31 + 5, 9]
    batch = Batch(**collate(in_rows(samples), SPEC, numbers(row_ids), config, first_row=6))

    for row, sample in enumerate(samples):
        n = len(sample.text.tokens)
        assert batch.tokens[row, :n].tolist() == sample.text.tokens.tolist() and batch.tokens[row, 0] == 1
        assert set(batch.tokens[row, n:].tolist()) <= {config.tokenizer.pad_id}
        assert batch.positions[row].tolist() == [*range(n), *[0] * (40 - n)]
        assert batch.segment_ids[row].tolist() == [1] * n + [0] * (40 - n)
        places = np.flatnonzero(batch.labels[row] != IGNORE).tolist()
        assert batch.label_positions[row].tolist() == places + [0] * (8 - len(places))
        np.testing.assert_array_equal(batch.labels[row, places], batch.tokens[row, places])
    assert batch.row_id.tolist() == [7, 5, 9] and batch.item_id.tolist() == [7, 5, 9]

    # Row and item numbers count within the whole micro-batch, whose sixth row is the first here.
    assert batch.item_mask.tolist() == [True, True, False]
    assert batch.voken_row.tolist() == [6, 7, 8]
    for item in (0, 1):
        start = batch.voken_start[item]
        assert batch.tokens[item, start : start + 8].tolist() == list(config.tokenizer.voken_ids)
    assert batch.voken_start[2] == 1
    np.testing.assert_array_equal(batch.target[0], prepare_image(images[0], 24, square=True, flip=False))
    assert not batch.target[2].any()

    assert batch.image_mask.tolist() == [False, False, True, True, False, False]
    assert batch.image_row.tolist() == [6, 6, 7, 7, 8, 8]
    for slot in (2, 3):
        start = batch.image_start[slot]
        assert batch.tokens[1, start : start + 3].tolist() == [config.tokenizer.image_id] * 3
        want = prepare_image(images[slot - 1], 16, square=False, flip=False)
        np.testing.assert_array_equal(batch.images[slot], want)
    assert (batch.tokens == config.tokenizer.image_id).sum() == 6

    assert batch.has_caption.tolist() == [True, False, False]
    ids, mask = config.caption_tokenizer.encode(["a red dog", ""])
    np.testing.assert_array_equal(batch.caption_ids, ids[[0, 1, 1]])
    np.testing.assert_array_equal(batch.caption_mask, mask[[0, 1, 1]])


def test_static_shapes_and_dtypes(examples, config):
    shapes = {name: (a.shape, a.dtype) for name, a in empty_arrays(SPEC).items()}
    needed = {f.name for f in dataclasses.fields(Batch) if f.default is dataclasses.MISSING}
    assert set(shapes) == needed
    for count in range(4):
        samples = [encode(e, config, SPEC, (0, 0, 0)) for e in examples[:count]] + [None] * (3 - count)
        arrays = collate(in_rows(samples), SPEC, numbers([0, 1, 2]), config)
        assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == shapes
    kinds = {str(dtype) for _, dtype in shapes.values()}
    assert kinds == {"int32", "uint8", "bool"}


def test_a_row_without_a_sample_is_padding(examples, config):
    samples = [None, encode(examples[1], config, SPEC, (0, 0, 0)), None]
    batch = Batch(**collate(in_rows(samples), SPEC, numbers([0, 1, 2]), config))
    assert batch.item_mask.tolist() == [False, True, False]
    for row in (0, 2):
        assert not batch.segment_ids[row].any() and (batch.labels[row] == IGNORE).all()
        assert not batch.label_positions[row].any()
    assert batch.image_mask.tolist() == [False, False, True, True, False, False]
    # What a row holds does not depend on its neighbours.
    samples = in_rows(encode(e, config, SPEC, (0, 0, 0)) for e in examples)
    full = Batch(**collate(samples, SPEC, numbers([0, 1, 2]), config))
    np.testing.assert_array_equal(full.tokens[1], batch.tokens[1])
    np.testing.assert_array_equal(full.target[1], batch.target[1])
    np.testing.assert_array_equal(full.images[2:4], batch.images[2:4])


def test_rows_with_more_images_than_slots_keep_the_last_ones(examples, config, images):
    one = dataclasses.replace(SPEC, images=3)
    sample = encode(examples[1], config, one, (0, 0, 0))
    assert sample.text.dropped and sample.text.images == (1,)
    want = prepare_image(images[2], 16, square=False, flip=False)
    np.testing.assert_array_equal(sample.images, want[None])


def test_flips_follow_the_key(examples, config, images):
    flipping = dataclasses.replace(config, flip_mode="independent", flip_each_epoch=True)
    for key in ((1, 0, i) for i in range(4)):
        sample, flips = encode(examples[1], flipping, SPEC, key), draw_flips("independent", key, 2)
        np.testing.assert_array_equal(
            sample.target, prepare_image(images[3], 24, square=True, flip=flips.target)
        )
        for i in (0, 1):
            want = prepare_image(images[1 + i], 16, square=False, flip=flips.images[i])
            np.testing.assert_array_equal(sample.images[i], want)


@pytest.mark.parametrize(
    "mode, each_epoch, hashed", [("off", False, 0), ("independent", True, 0), ("independent", False, 3)]
)
def test_images_are_hashed_only_where_their_number_is_used(
    examples, config, monkeypatch, mode, each_epoch, hashed
):
    asked = []
    monkeypatch.setattr(encoding, "image_id", lambda image, root: asked.append(image) or 2)
    encode(
        examples[1], dataclasses.replace(config, flip_mode=mode, flip_each_epoch=each_epoch), SPEC, (0, 0, 1)
    )
    assert len(asked) == hashed


def test_square_padding_of_input_images_on_request(examples, config, images):
    sample = encode(examples[1], dataclasses.replace(config, pad_input_square=True), SPEC, (0, 0, 0))
    np.testing.assert_array_equal(sample.images[0], prepare_image(images[1], 16, square=True, flip=False))


def test_samples_that_do_not_add_up(examples, config, images, tmp_path):
    more = dataclasses.replace(examples[0], images=(images[0],))
    with pytest.raises(SampleError, match="f:1: id has 0 image placeholders and 1 images"):
        encode(more, config, SPEC, (0, 0, 0))
    lenient = dataclasses.replace(config, strict_image_count=False)
    assert encode(more, lenient, SPEC, (0, 0, 0)).images == ()
    with pytest.raises(SampleError, match="2 image placeholders and 0 images"):
        encode(dataclasses.replace(examples[1], images=()), lenient, SPEC, (0, 0, 0))
    with pytest.raises(SampleError, match="2 image placeholders and 1 images"):
        encode(dataclasses.replace(examples[1], images=(images[0],)), config, SPEC, (0, 0, 0))
    with pytest.raises(SampleError, match="vokens exactly where it has a target"):
        encode(dataclasses.replace(examples[0], target_image=None), config, SPEC, (0, 0, 0))
    with pytest.raises(SampleError, match="the batch holds text only"):
        encode(examples[0], config, dataclasses.replace(SPEC, items=0), (0, 0, 0))
    (tmp_path / "zero.jpg").write_bytes(b"")
    broken = dataclasses.replace(examples[0], target_image=str(tmp_path / "zero.jpg"))
    with pytest.raises(SampleError, match=r"f:1: id: .*zero\.jpg: image file is empty"):
        encode(broken, config, SPEC, (0, 0, 0))


def test_text_only_shapes(examples, config):
    spec = dataclasses.replace(SPEC, items=0, images=0)
    samples = [[encode(examples[2], config, spec, (0, 0, 0))], [None], [None]]
    arrays = collate(samples, spec, numbers([0, 1, 2]), config)
    assert arrays["target"].shape == (0, 24, 24, 3) and arrays["images"].shape == (0, 16, 16, 3)
    assert arrays["caption_ids"].shape == (0, 77)


def test_input_images_are_not_dropped_for_want_of_room(examples, config):
    with pytest.raises(DataError, match=r"f:1: id reads 2 images.*set data.max_images"):
        encode(examples[1], config, dataclasses.replace(SPEC, images=0), (0, 0, 0))


def test_shapes_that_do_not_go_together(config):
    for change, message in [
        ({"items": 4}, "items = 4 is neither 0 nor one for each of 3 samples"),
        ({"images": 7}, "images = 7 is no multiple of the 3 samples"),
        ({"targets": 41}, "targets must be 1 ... length = 40, got 41"),
        ({"rows": 0}, "at least 1 row"),
        ({"pack": 0}, "at least 1 sample, got pack = 0"),
    ]:
        with pytest.raises(DataError, match=message):
            dataclasses.replace(SPEC, **change)
    with pytest.raises(DataError, match="3 rows of a micro-batch cannot be shared among 2 processes"):
        SPEC.part(2)
    assert dataclasses.astuple(SPEC.part(3))[:4] == (1, 40, 1, 2)
    with pytest.raises(DataError, match="tokenizer has 8 vokens, the batch 4"):
        config.check(dataclasses.replace(SPEC, num_vokens=4))
    with pytest.raises(DataError, match="pads to 77 ids, the batch has caption_length = 20"):
        config.check(dataclasses.replace(SPEC, caption_length=20))
    with pytest.raises(DataError, match="got 'sometimes'"):
        dataclasses.replace(config, flip_mode="sometimes")
