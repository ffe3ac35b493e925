"""Pictures: torchvision's rules computed by hand, flips by key, and every kind of broken file by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data import transforms
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.transforms import draw_flips, load_picture, prepare_picture


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
def test_input_picture_is_torchvisions(width, height, resized, offset):
    image = noise(width, height)
    want = image if image.size == resized else image.resize(resized, Image.Resampling.BILINEAR)
    want = want.crop((*offset, offset[0] + 64, offset[1] + 64))
    got = prepare_picture(encoded(image), 64, square=False, flip=False)
    np.testing.assert_array_equal(got, np.asarray(want))
    assert got.dtype == np.uint8
    mirrored = prepare_picture(encoded(image), 64, square=False, flip=True)
    np.testing.assert_array_equal(mirrored, got[:, ::-1])


def test_target_picture_gets_a_white_square(tmp_path):
    file = tmp_path / "a.png"
    noise(30, 17).save(file)
    white = np.full((30, 30, 3), 255, np.uint8)
    white[6:23] = np.asarray(noise(30, 17))  # (30 - 17) // 2 = 6
    want = Image.fromarray(white).resize((48, 48), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(prepare_picture(file, 48, square=True, flip=False), np.asarray(want))


def test_jpeg_decoding_is_pils(tmp_path):
    file = tmp_path / "a.jpg"
    noise(64, 64).save(file, quality=80)
    want = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(prepare_picture(str(file), 64, square=True, flip=False), want)


def test_kinds_of_pictures_that_are_read():
    base = noise(8, 8)
    np.testing.assert_array_equal(
        np.asarray(load_picture(encoded(base.convert("CMYK"), "TIFF"))), np.asarray(base)
    )
    grey16 = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    got = np.asarray(load_picture(encoded(Image.fromarray(grey16))))
    np.testing.assert_array_equal(got, np.repeat((grey16 >> 8)[..., None], 3, -1))
    palette = base.quantize(16)
    np.testing.assert_array_equal(
        np.asarray(load_picture(encoded(palette))), np.asarray(palette.convert("RGB"))
    )
    alpha = base.convert("RGBA")
    alpha.putalpha(0)
    np.testing.assert_array_equal(np.asarray(load_picture(encoded(alpha))), np.asarray(base))
    frames = [palette, noise(8, 8, 1).quantize(16)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(load_picture(animation)), np.asarray(palette.convert("RGB")))


def test_exif_orientation_is_ignored_as_in_the_original():
    image = noise(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert load_picture(encoded(image, "JPEG", exif=exif)).size == (8, 4)


def broken_files(folder):
    good = encoded(noise(64, 64), "JPEG")
    contents = {"zero.jpg": b"", "cut.jpg": good[: len(good) // 2], "text.jpg": b"<html>not found</html>"}
    png = encoded(noise(64, 64))
    contents["cut.png"] = png[: len(png) // 2]
    contents["damaged.png"] = png[:40] + bytes(20) + png[60:]
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [*contents, "missing.jpg"]


REASONS = {
    "zero.jpg": "empty",
    "cut.jpg": "broken",
    "text.jpg": "no known picture format",
    "cut.png": "broken",
    "damaged.png": "broken",
    "missing.jpg": "cannot be read",
}


def test_broken_pictures_are_named(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(SampleError, match=REASONS[name]) as caught:
            load_picture(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
        with pytest.raises(SampleError):
            if name != "missing.jpg":
                load_picture((tmp_path / name).read_bytes())
            else:
                load_picture(str(tmp_path / name))


def test_too_large_and_too_long_pictures_are_named(monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10_000)
    with pytest.raises(SampleError, match="picture of 200x60 has more than 10,000 pixels"):
        load_picture(encoded(noise(200, 60)))
    strip = encoded(noise(300, 1))
    for square in (False, True):
        with pytest.raises(SampleError, match="more than 10,000 pixels"):
            prepare_picture(strip, 64, square=square, flip=False)


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
