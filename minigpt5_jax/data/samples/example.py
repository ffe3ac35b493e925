"""One sample between its source and the templates."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from minigpt5_jax.data.images import ImageSource


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """An image that went through its frozen tower beforehand, in the place of the image.

    Attributes:
      values: moments [h w 2c] of an image to draw, states [q c] of an input image.
    """

    values: Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample before tokenisation.

    Attributes:
      source: what the model reads; ``<ImageHere>`` once for each of ``images``.
      target: what it writes; the vokens exactly where there is a ``target_image``.
      images: input images, in the order of their placeholders; paths, encoded bytes or precomputed features.
      target_image: the image to draw, or None.
      caption: text of the caption loss, or None where the sample takes no part in it.
      task: what kind of sample this is (``cc3m``, ``cc3m-instruction``, ``dialog``).
      item_id: name of the sample in reports and predictions (``cc3m_17``).
      where: place in its file (``train.tsv:18``).
    """

    source: str
    target: str
    images: tuple[ImageSource | Ready, ...]
    target_image: ImageSource | Ready | None
    caption: str | None
    task: str
    item_id: str
    where: str

    @property
    def words(self) -> tuple[str, str]:
        """Source and target."""
        return self.source, self.target
