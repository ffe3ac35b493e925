"""Images: torchvision's rules computed by hand, the same from torch's own resize, and flips by key."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data import images as transforms
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import double, draw_flips, prepare_image


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, fmt="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


# width, height -> size after the resize, crop offsets (left, top) at 64 pixels, worked out by hand:
# long side int(64 * long / short), offset round-half-even((side - 64) / 2).
BY_HAND = [
    (64, 64, (64, 64), (0, 0)),
    (100, 50, (128, 64), (32, 0)),
    (50, 77, (64, 98), (0, 17)),
    (64, 97, (64, 97), (0, 16)),  # 16.5 rounds to 16
    (99, 64, (99, 64), (18, 0)),  # 17.5 rounds to 18
    (31, 97, (64, 200), (0, 68)),  # 200.26 is cut to 200
    (1, 1, (64, 64), (0, 0)),
]


@pytest.mark.parametrize("width, height, resized, offset", BY_HAND)
def test_input_image_is_torchvisions(width, height, resized, offset):
    image = noise(width, height)
    want = image if image.size == resized else image.resize(resized, Image.Resampling.BILINEAR)
    want = want.crop((*offset, offset[0] + 64, offset[1] + 64))
    got = prepare_image(encoded(image), 64, square=False, flip=False)
    np.testing.assert_array_equal(got, np.asarray(want))
    assert got.dtype == np.uint8
    mirrored = prepare_image(encoded(image), 64, square=False, flip=True)
    np.testing.assert_array_equal(mirrored, got[:, ::-1])


def test_target_image_gets_a_white_square(tmp_path):
    file = tmp_path / "a.png"
    noise(30, 17).save(file)
    white = np.full((30, 30, 3), 255, np.uint8)
    white[6:23] = np.asarray(noise(30, 17))  # (30 - 17) // 2 = 6
    want = Image.fromarray(white).resize((48, 48), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(prepare_image(file, 48, square=True, flip=False), np.asarray(want))


def test_jpeg_decoding_is_pils(tmp_path):
    file = tmp_path / "a.jpg"
    noise(64, 64).save(file, quality=80)
    want = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(prepare_image(str(file), 64, square=True, flip=False), want)


def independent(image, size, square):
    """The original's transform in a few lines: numpy for the white square, torch for the resize."""
    import torch

    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if square:
        side = max(width, height)
        white = np.full((side, side, 3), 255, np.uint8)
        left, top = (side - width) // 2, (side - height) // 2
        white[top : top + height, left : left + width] = pixels
        pixels, width, height = white, side, side
    scale = [int(size * n / min(width, height)) for n in (height, width)]
    grid = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    if min(width, height) != size:
        grid = torch.nn.functional.interpolate(
            grid, scale, mode="bilinear", antialias=True, align_corners=False
        )
    top, left = (round((n - size) / 2) for n in grid.shape[2:])
    return grid[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()


ODD_SIZES = [(256, 256), (257, 255), (301, 97), (90, 333), (512, 384), (63, 64), (32, 32), (1, 3), (200, 7)]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("width, height", ODD_SIZES)
def test_jpegs_of_odd_sizes_are_as_torch_resizes_them(width, height, square):
    """PIL rounds after rows and after columns, torch not at all: half a level apart for each."""
    data = encoded(noise(width, height, width), "JPEG", quality=90)
    for size in (64, 48):
        want = independent(Image.open(io.BytesIO(data)).convert("RGB"), size, square)
        got = prepare_image(data, size, square=square, flip=False)
        assert np.abs(got - want).max() <= 1.01


@pytest.mark.parametrize("width, height", [(1, 1), (2, 1), (1, 5), (33, 20), (100, 67), (256, 256)])
def test_doubling_is_pils_resize_to_the_last_pixel(width, height):
    image = noise(width, height)
    want = np.asarray(image.resize((2 * width, 2 * height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(double(np.asarray(image)), want)


@pytest.mark.parametrize("width, height", [(32, 32), (32, 9), (48, 48)])
def test_a_mirrored_image_is_the_image_mirrored(width, height):
    data = encoded(noise(width, height))
    got = prepare_image(data, 64, square=True, flip=True)
    np.testing.assert_array_equal(got, prepare_image(data, 64, square=True, flip=False)[:, ::-1])


def test_flips_are_a_function_of_the_key():
    keys = [(7, 0, i) for i in range(400)]
    first = [draw_flips("independent", key, 2) for key in keys]
    assert first == [draw_flips("independent", key, 2) for key in keys]
    assert first != [draw_flips("independent", (8, 0, i), 2) for i in range(400)]
    assert first != [draw_flips("independent", (7, 1, i), 2) for i in range(400)]
    bits = np.array([[f.target, *f.images] for f in first])
    assert np.all(np.abs(bits.mean(0) - 0.5) < 0.1)
    assert np.all(np.abs(np.corrcoef(bits.T.astype(float)) - np.eye(3)) < 0.2)


def test_flip_modes():
    shared = [draw_flips("shared", (0, 0, i), 3) for i in range(50)]
    assert all(set(f.images) == {f.target} for f in shared)
    assert {f.target for f in shared} == {True, False}
    assert draw_flips("off", (0, 0, 0), 2) == transforms.Flips(False, (False, False))
    with pytest.raises(DataError, match="independent, shared, off; got 'both'"):
        draw_flips("both", (0, 0, 0), 2)
