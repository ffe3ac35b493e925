"""Resizes and crops of metrics against what they are named after, on odd sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minigpt5_jax.data.images import resize_shorter
from minigpt5_jax.evaluation.metrics.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    clip_image,
    clip_pixels,
    inception_pixels,
)

SIDE = 45  # 299 in use; the code has one for both


def image(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], -1)
    return (127 + 90 * waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)


def ours(pixels: np.ndarray, resize: str) -> np.ndarray:
    """Back in 0 to 255."""
    middle = 127.5 if resize == "torch" else 128.0
    return np.asarray(inception_pixels(jnp.asarray(pixels[None]), resize, SIDE)[0]) * middle + middle


def tf1_by_loops(pixels: np.ndarray) -> np.ndarray:
    """TensorFlow 1's bilinear resize, one pixel at a time."""
    height, width, _ = pixels.shape
    out, x = np.zeros((SIDE, SIDE, 3)), pixels.astype(np.float64)
    for row in range(SIDE):
        for column in range(SIDE):
            y, z = row * height / SIDE, column * width / SIDE
            top, left = int(y), int(z)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = x[top, left] + (x[top, right] - x[top, left]) * (z - left)
            lower = x[below, left] + (x[below, right] - x[below, left]) * (z - left)
            out[row, column] = upper + (lower - upper) * (y - top)
    return out


def torch_resize(pixels: np.ndarray, antialias: bool) -> np.ndarray:
    x = torch.tensor(pixels.transpose(2, 0, 1)[None]).float()
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=antialias)
    return x[0].permute(1, 2, 0).numpy()


def pil_float(pixels: np.ndarray) -> np.ndarray:
    """clean-fid's: each channel alone, in floats."""
    channels = [Image.fromarray(pixels[..., c].astype(np.float32), "F") for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels]
    return np.stack(resized, -1).clip(0, 255)


@pytest.mark.parametrize("size", [(31, 40), (64, 97), (45, 45)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_resizes_are_those_they_are_named_after(size):
    pixels = image(*size)
    wanted = {
        "tf1": (tf1_by_loops(pixels), 1e-3),
        "antialias": (torch_resize(pixels, True), 2e-3),
        "torch": (torch_resize(pixels, False), 1e-3),
        "clean": (pil_float(pixels), 5e-3),
    }
    for name, (want, tolerance) in wanted.items():
        assert np.abs(ours(pixels, name) - want).max() < tolerance, name
    if size == (64, 97):  # they are four, not one
        assert np.abs(ours(pixels, "tf1") - ours(pixels, "antialias")).max() > 5
        assert np.abs(ours(pixels, "torch") - ours(pixels, "antialias")).max() > 5


def test_an_unknown_resize_is_named():
    with pytest.raises(ValueError, match="'pil' is not one of tf1, antialias, torch, clean"):
        jax.eval_shape(lambda x: inception_pixels(x, "pil"), jax.ShapeDtypeStruct((1, 9, 9, 3), jnp.uint8))


def test_clip_takes_the_middle_of_pil_s_bicubic():
    pixels = Image.fromarray(image(30, 47))
    resized = pixels.resize((31, 20), Image.Resampling.BICUBIC)  # int(20 * 47 / 30)
    left = round((31 - 20) / 2)
    assert np.array_equal(clip_image(pixels, 20), np.asarray(resized)[:, left : left + 20])
    assert np.array_equal(clip_image(pixels.rotate(90, expand=True), 20).shape, (20, 20, 3))
    assert np.array_equal(clip_image(pixels.crop((0, 0, 20, 20)), 20), np.asarray(pixels)[:20, :20])
    scaled = np.asarray(clip_pixels(jnp.asarray(clip_image(pixels, 20)[None])))[0]
    want = (clip_image(pixels, 20) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert np.abs(scaled - want).max() < 1e-5


def test_the_size_before_fid_is_truncated():
    assert resize_shorter(Image.new("RGB", (640, 427)), 256).size == (383, 256)
