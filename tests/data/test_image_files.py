"""Real files of every awkward kind: prepared as the module says, or one error that names the file."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data import images as transforms
from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.images import load_image, prepare_image


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width, height):
    """An image that JPEG keeps almost as it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def encoded(image, fmt="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def png(width, height, pixels=b"", text=b""):
    """A PNG by hand, so that its header can promise any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    note = chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + header + note + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def same(got, want):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# Kinds that are read.


def test_cmyk_is_read_by_pils_rule():
    base = noise(8, 8)
    same(load_image(encoded(base.convert("CMYK"), "TIFF")), base)


def test_adobes_inverted_cmyk_jpeg_has_the_right_colours(tmp_path):
    """PIL writes CMYK JPEGs as Adobe does, numbers inverted, and takes every one it reads for such."""
    base = smooth(64, 64)
    data = encoded(base.convert("CMYK"), "JPEG", quality=95)
    assert data[6:11] == b"Adobe"
    for name, content in {"a.jpg": data, "unmarked.jpg": data.replace(b"Adobe", b"Adobf", 1)}.items():
        (tmp_path / name).write_bytes(content)
        got = np.asarray(load_image(tmp_path / name)).astype(int)
        assert np.abs(got - np.asarray(base)).max() <= 4


def test_16_bits_are_brought_to_8_by_their_high_byte():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    want = np.repeat((grey >> 8)[..., None], 3, -1)
    same(load_image(encoded(Image.fromarray(grey))), want)
    same(load_image(encoded(Image.fromarray(grey), "TIFF")), want)
    header = b"P5 8 8 65535\n"
    same(load_image(header + grey.astype(">u2").tobytes()), want)


@pytest.mark.filterwarnings("ignore:Palette images")
def test_transparency_is_white_and_on_request_left_out_as_in_the_original():
    original = functools.partial(load_image, as_shown=False)
    palette = noise(8, 8).quantize(16)
    same(load_image(encoded(palette)), palette.convert("RGB"))
    same(original(encoded(palette, transparency=3)), palette.convert("RGB"))
    same(original(encoded(palette, transparency=bytes(range(0, 160, 10)))), palette.convert("RGB"))
    white = np.where(np.asarray(palette)[..., None] == 3, 255, np.asarray(palette.convert("RGB")))
    same(load_image(encoded(palette, transparency=3)), white)
    alpha = noise(8, 8).convert("RGBA")
    alpha.putalpha(0)
    same(original(encoded(alpha)), noise(8, 8))
    same(load_image(encoded(alpha), notes=(notes := [])), np.full((8, 8, 3), 255))
    assert notes == [transforms.ON_WHITE]
    alpha.putalpha(255)
    same(load_image(encoded(alpha)), noise(8, 8))
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    same(load_image(encoded(grey.convert("LA"))), grey.convert("RGB"))
    same(
        load_image(encoded(grey.point(lambda x: 255 * (x > 30)).convert("1"))),
        np.asarray(grey.point(lambda x: 255 * (x > 30)).convert("RGB")),
    )


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(fmt):
    frames = [noise(8, 8, seed).quantize(16) if fmt == "GIF" else noise(8, 8, seed) for seed in (0, 1, 2)]
    lossless = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    same(load_image(data), frames[0].convert("RGB"))


def test_exif_orientation_turns_the_image_and_on_request_does_not_as_in_the_original():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    image = smooth(8, 4)
    turned, plain = encoded(image, "JPEG", exif=exif), load_image(encoded(image, "JPEG"))
    same(load_image(turned, as_shown=False), plain)
    same(load_image(turned, notes=(notes := [])), plain.transpose(Image.Transpose.ROTATE_270))
    assert notes == [transforms.TURNED]
    same(prepare_image(turned, 4, square=False, flip=False, as_shown=False), plain.crop((2, 0, 6, 4)))


def test_large_texts_in_a_png_are_not_read():
    pixels = bytes(4 * 13)
    same(load_image(png(4, 4, pixels, text=bytes(2 * 10**6)), notes=(notes := [])), np.zeros((4, 4, 3)))
    assert notes == [transforms.TEXT_LEFT_OUT]


def test_pipes_devices_and_large_files_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(SampleError, match="cannot be read .it is no regular file"):
            load_image(path)
    monkeypatch.setattr(transforms, "MAX_BYTES", 10)
    (tmp_path / "large.png").write_bytes(encoded(noise(8, 8)))
    with pytest.raises(SampleError, match=r"cannot be read .* bytes, more than 10"):
        load_image(tmp_path / "large.png")


def test_one_pixel_fills_the_image():
    data = encoded(Image.new("RGB", (1, 1), (10, 20, 30)))
    for square in (False, True):
        same(prepare_image(data, 64, square=square, flip=True), np.full((64, 64, 3), (10, 20, 30)))


def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path):
    (tmp_path / "really_a_png.jpg").write_bytes(encoded(noise(8, 8)))
    (tmp_path / "no_extension").write_bytes(encoded(noise(8, 8), "WEBP", lossless=True))
    for name in ("really_a_png.jpg", "no_extension"):
        same(load_image(tmp_path / name), noise(8, 8))


def test_a_pillow_without_a_format_reads_the_others(monkeypatch):
    monkeypatch.setattr(transforms, "FORMATS", ("FORMAT OF TOMORROW", "PNG"))
    transforms._formats.cache_clear()
    same(load_image(encoded(noise(8, 8))), noise(8, 8))
    with pytest.raises(SampleError, match="no known image format"):
        load_image(encoded(noise(8, 8), "BMP"))
    transforms._formats.cache_clear()


def test_a_wide_image_within_the_limit_is_prepared():
    wide = encoded(smooth(20_000, 100))
    got = prepare_image(wide, 64, square=False, flip=False)
    same(got, smooth(20_000, 100).resize((12_800, 64), Image.Resampling.BILINEAR).crop((6368, 0, 6432, 64)))


# Files that cannot be used.


def damaged_files():
    jpeg, whole = encoded(noise(64, 64), "JPEG"), encoded(noise(64, 64))
    progressive = encoded(noise(64, 64), "JPEG", progressive=True)
    webp = encoded(noise(64, 64), "WEBP")
    gif = encoded(noise(64, 64).quantize(64), "GIF")
    tiff = encoded(noise(64, 64), "TIFF")
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    return {
        "empty.jpg": (b"", r"empty \(0 bytes\)"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "broken .*truncated"),
        "cut_progressive.jpg": (progressive[: len(progressive) // 3], "broken .*truncated"),
        "head_only.jpg": (jpeg[:20], "broken|no known image format"),
        "cut.png": (whole[: len(whole) // 2], "broken .*truncated"),
        "cut.webp": (webp[: len(webp) // 2], "broken"),
        "cut.gif": (gif[: len(gif) // 2], "broken"),
        "cut.tif": (tiff[: len(tiff) // 2], "broken|no known image format"),
        "damaged.png": (whole[:60] + bytes(20) + whole[80:], "broken"),
        "page.jpg": (b"<html>404 not found</html>", "no known image format"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known image format"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known image format"),
        "floats.tif": (encoded(floats, "TIFF"), "floating-point"),
        "bomb.png": (png(60_000, 60_000), "more than 89,478,485 pixels"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_is_named(tmp_path, name):
    data, reason = damaged_files()[name]
    (tmp_path / name).write_bytes(data)
    for image in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(SampleError, match=reason) as caught:
            prepare_image(image, 64, square=True, flip=False)
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(SampleError, match=reason) as caught:
        prepare_image(data, 64, square=False, flip=False)
    assert caught.value.where == f"<{len(data)} bytes in memory>"


def test_missing_files_and_folders_are_named(tmp_path):
    for image in (tmp_path / "missing.jpg", tmp_path, tmp_path / "a\0.jpg"):
        with pytest.raises(SampleError, match="cannot be read") as caught:
            load_image(image)
        assert caught.value.where == str(image)


def test_a_wide_image_whose_square_is_too_large_is_refused(tmp_path):
    """20,000 pixels wide: the white square of a target would have 400 million pixels."""
    file = tmp_path / "panorama.png"
    smooth(20_000, 100).save(file)
    with pytest.raises(SampleError, match="panorama.png: image of 20000x20000 has more than 89,478,485"):
        prepare_image(file, 64, square=True, flip=False)
    Image.new("RGB", (20_000, 1)).save(file)  # the shorter side goes to 80, the longer to 1,600,000
    with pytest.raises(SampleError, match="panorama.png: image of 80x1600000"):
        prepare_image(file, 80, square=False, flip=False)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_between_pils_warning_and_its_error_is_refused(tmp_path):
    (tmp_path / "large.png").write_bytes(png(10_000, 9_000))
    with pytest.raises(SampleError, match="large.png: image of 10000x9000 has more than 89,478,485"):
        load_image(tmp_path / "large.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_random_damage_gives_an_image_or_a_sample_error(fmt, monkeypatch):
    """Nothing but SampleError leaves the decoder, whatever bytes are wrong."""
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10**6)
    random = np.random.default_rng(0)
    good = np.frombuffer(
        encoded(smooth(40, 30).quantize(32) if fmt == "GIF" else smooth(40, 30), fmt), np.uint8
    )
    failed = 0
    for _ in range(60):
        data = good.copy()
        places = random.integers(0, min(len(data), 400), random.integers(1, 6))
        data[places] = random.integers(0, 256, len(places))
        try:
            image = load_image(data[: random.integers(len(data) // 2, len(data) + 1)].tobytes())
        except SampleError:
            failed += 1
        else:
            assert image.mode == "RGB"
    assert failed
