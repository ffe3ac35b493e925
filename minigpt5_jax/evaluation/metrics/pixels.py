"""Images as the towers of metrics read them: resizes, crops and normalisations of the published scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from minigpt5_jax.data.images import center_crop

INCEPTION_SIDE = 299
INCEPTION_RESIZES = ("tf1", "antialias", "torch", "clean")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _tf1(images: jax.Array, side: int) -> jax.Array:
    """Bilinear at ``i * in / out``, without the shift of half a pixel, as TensorFlow 1 did it."""

    def along(x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = at.astype(np.int32)
        shape = [side if a == axis else 1 for a in range(x.ndim)]
        weight = jnp.asarray((at - low.astype(np.float32)).reshape(shape))
        first = jnp.take(x, low, axis=axis)
        return first + (jnp.take(x, np.minimum(low + 1, size - 1), axis=axis) - first) * weight

    return along(along(images, 2), 1)


def inception_pixels(
    images: UInt8[Array, "n h w 3"], resize: str = "tf1", side: int = INCEPTION_SIDE
) -> Float[Array, "n side side 3"]:
    """Images as Inception reads them, resized and about -1 to 1.

    Args:
      resize: ``tf1`` (torch-fidelity, torchmetrics up to 1.7.4, hence the papers), ``antialias``
        (torchmetrics from 1.8), ``torch`` (pytorch-fid, with its own normalisation) or ``clean`` (clean-fid).
      side: of the result, 299 in every published score.

    Raises:
      ValueError: an unknown resize.
    """
    shape, pixels = (images.shape[0], side, side, 3), jnp.asarray(images, jnp.float32)
    if resize == "tf1":
        pixels = _tf1(pixels, side)
    elif resize in ("antialias", "torch"):
        pixels = jax.image.resize(pixels, shape, "linear", antialias=resize == "antialias")
    elif resize == "clean":
        pixels = jax.image.resize(pixels, shape, "cubic", antialias=True).clip(0, 255)
    else:
        raise ValueError(f"inception_resize={resize!r} is not one of {', '.join(INCEPTION_RESIZES)}")
    middle = 127.5 if resize == "torch" else 128.0
    return (pixels - middle) / middle


def clip_image(image: Image.Image, side: int = 224) -> UInt8[np.ndarray, "side side 3"]:
    """An RGB image as CLIP reads it: shorter side by PIL's bicubic resize, then the middle square.

    It stays on the host because PIL rounds between its two passes, which moves one pixel in six by a level.
    """
    short = min(image.size)
    if short != side:
        size = tuple(side if length == short else int(side * length / short) for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(center_crop(image, side))


def clip_pixels(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """Images normalised by CLIP's mean and deviation."""
    return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
