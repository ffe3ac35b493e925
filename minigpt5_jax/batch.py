"""The batch: the only contract between the data layer and the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = Any  # numpy on the host, jax.Array or an abstract value on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One (micro-)batch with static shapes; b rows of t tokens, i input images, m target images.

    Every index is made on the host and relative to this batch.  With gradient accumulation each
    array has one more leading axis, and indices are relative to their micro-batch.

    Where only the vokens have gradients they stand apart from what precedes them (``prompt_end``): rows hold
    prompts alone, m / b each, and every target image has a continuation of n + 2 places: its prompt's last
    token, the n vokens and the token after them.  ``labels`` and ``label_positions`` are of the m
    continuations instead of the b rows, ``voken_row`` counts continuations and ``voken_start`` is 1.

    A row may hold several samples as a tree (``subtree_end``), a token that they share once: tokens stand in
    depth-first order, the token before one is its parent (``before``) and not its left neighbour, and several
    places may read one input image (``image_index``).

    Attributes:
      tokens: i32[b t].  BOS first; an image is ``image_tokens`` slots of ``<ImageHere>``.
      labels: i32[b t].  Id of the token *at* this position, -100 where it is no target (unshifted,
        as the original's).
      label_positions: i32[b l].  Positions of the row's targets, sample by sample; 0 fills unused slots
        (position 0 is BOS and never a target).  The text loss makes logits at these places only.
      positions: i32[b t].  Position inside its segment.
      segment_ids: i32[b t].  1, 2, ... for packed samples of a row; 0 is padding.
      row_id: i32[b].  Global sample number of the row; seeds LoRA dropout.
      images: u8[i H W 3].  Input images, resized and cropped, not normalised.
      image_row, image_start: i32[p].  Row and first slot of each image's tokens; p is i but for trees.
      image_mask: bool[p].  False for an empty place of the static shape.
      target: u8[m H W 3].  Images to draw.
      voken_row, voken_start: i32[m].  Row and position of ``[IMG0]`` of each target image
        (``voken_start >= 1``; the mapper reads positions ``voken_start - 1 ... + n - 2``).
      item_id: i32[m].  Global number of the target image; seeds every draw made for it.
      item_mask: bool[m].  False for an empty slot.
      caption_ids: i32[m c].  CLIP ids of the caption.
      caption_mask: i32[m c].  1 on real tokens (BOS and EOS included), 0 on padding.
      has_caption: bool[m].  False where the item takes no part in the caption loss.
      prompt_end: i32[m].  Position after the prompt of each target image, which stands in row k // (m / b);
        None where vokens stand in the rows.
      subtree_end: i32[b t].  Of rows that are trees: the position after a token's last descendant, 0 for
        padding; None where rows are sequences.
      before: i32[b t].  Of rows that are trees: the position of the token before; None elsewhere.
      image_index: i32[p].  Of rows that are trees: which of ``images`` stands in each place; None elsewhere.
      target_moments: f32 or bf16[m h w 2c].  Precomputed posterior moments of the images to draw, None where
        images travel; ``target`` then is u8[m 0 0 3].
      image_states: f32 or bf16[i q c].  Precomputed states of the input images before the projection into
        the language model, None where images travel; ``images`` then is u8[i 0 0 3].
    """

    tokens: Array
    labels: Array
    label_positions: Array
    positions: Array
    segment_ids: Array
    row_id: Array
    images: Array
    image_row: Array
    image_start: Array
    image_mask: Array
    target: Array
    voken_row: Array
    voken_start: Array
    item_id: Array
    item_mask: Array
    caption_ids: Array
    caption_mask: Array
    has_caption: Array
    prompt_end: Array | None = None
    subtree_end: Array | None = None
    before: Array | None = None
    image_index: Array | None = None
    target_moments: Array | None = None
    image_states: Array | None = None
