"""From words to ids: caption cleaning, prompts, label masks and the expanded sequence.  Pure functions.

A sample is two strings.  ``source`` is what the model reads, with ``<ImageHere>`` for each input image;
``target`` is what it writes, with the vokens where it draws and ``###`` at its end.  Everything follows
the fidelity 2.2, 2.3, 5.2 and 6.4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN, SPECIAL_PATTERN, LanguageTokenizer, voken_text

IGNORE = -100  # label of a position that is no target
END = "###"  # ends every turn
IMAGE = f"<Img>{IMAGE_TOKEN}</Img>"  # an input image as prompts spell it


def clean_caption(caption: str) -> str:
    """Lower case, the signs ``. ! " ( ) * # : ; ~`` to spaces, runs of white space to one space, stripped."""
    text = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def find_special(text: str) -> str | None:
    """The first added token that ``text`` spells out (``[IMG0]``, ``<ImageHere>``), or None.

    In a user's text it would be taken for an image, so sources refuse it.
    """
    found = SPECIAL_PATTERN.search(text)
    return found.group() if found else None


def target_text(text: str, *, draws: bool, num_vokens: int = 8, ends: bool = True) -> str:
    """What the model shall write: text, the vokens of an image where it ``draws``, ``###`` where it ends."""
    parts = (text, voken_text(num_vokens) if draws else "", END if ends else "")
    return " ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedSample:
    """One sample as the model reads it, t positions with BOS first.

    Attributes:
      tokens: i32[t]; an image is ``image_tokens`` times ``<ImageHere>``.
      labels: i32[t]; id of the token at this position where it is a target, else -100.
      images: which of the sample's images are left after truncation.
      image_start: first slot of each of these images.
      voken_start: position of ``[IMG0]``, None where the target draws nothing.
      dropped: positions cut off to fit.
    """

    tokens: Int32[np.ndarray, " t"]
    labels: Int32[np.ndarray, " t"]
    images: tuple[int, ...]
    image_start: tuple[int, ...]
    voken_start: int | None
    dropped: int


def label_ids(
    target: Sequence[int], first_voken_id: int, num_vokens: int, *, mask_all_inner_vokens: bool = False
) -> list[int]:
    """Labels of a target: its ids, but -100 on the vokens behind the first ``[IMG0]``.

    The original's slice ends one short, so ``[IMG(n-1)]`` stays a target (quirk Q1, kept for equal
    losses); ``mask_all_inner_vokens`` masks it as well.
    """
    labels = list(target)
    if first_voken_id in labels:
        start = labels.index(first_voken_id)
        stop = start + num_vokens - (0 if mask_all_inner_vokens else 1)
        labels[start + 1 : stop] = [IGNORE] * max(0, stop - start - 1)
    return labels


def _cut_target(target: list[int], room: int, first_voken_id: int) -> list[int]:
    """At most ``room`` ids of a target.  The vokens and what follows them stay; its text loses its end."""
    if len(target) <= room:
        return target
    text = target.index(first_voken_id) if first_voken_id in target else len(target)
    kept = room - (len(target) - text)
    if kept < 0:
        raise DataError(
            f"{room} positions are left for a target, its vokens and ending take {len(target) - text}; "
            "raise the length or the number of targets of a row"
        )
    return target[:kept] + target[text:]


def _cut_source(
    source: list[int], room: int, max_images: int | None, image_id: int, image_tokens: int, truncation: str
) -> list[int]:
    """Longest tail (``left_history``) or head (``right``) of source ids that fits, images kept whole."""
    ids = source[::-1] if truncation == "left_history" else source
    images = 0
    for kept, i in enumerate(ids):
        is_image = i == image_id
        room -= image_tokens if is_image else 1
        images += is_image
        if room < 0 or (max_images is not None and images > max_images):
            ids = ids[:kept]
            break
    return ids[::-1] if truncation == "left_history" else ids


_TURN = re.compile(r"###(?:Human|Assistant):")
_STEP = re.compile(r".*?</Img>", re.DOTALL)


def history_spans(source: str) -> list[tuple[int, int]]:
    """Parts of a source that may be left out, oldest first: whole turns of a dialogue, steps of a story.

    The turn or request that is answered is none of them.  They are found by ``###``, which no user's text may
    contain.  A story opens ``###Human:`` without a space and has its steps there, each with its image at its
    end (fidelity 5.3).
    """
    marks = [found.start() for found in _TURN.finditer(source)]
    if len(marks) != 2:
        return list(itertools.pairwise(marks[:-1]))
    start = _TURN.match(source, marks[0]).end()
    end = source.rfind("\n", start, marks[1])
    if end < 0 or source[start] == " ":
        return []
    steps = [found.span() for found in _STEP.finditer(source, start, end)]
    return [*steps[:-1], (steps[-1][0], end + 1)] if steps else []


def _drop_turns(
    tokenizer: LanguageTokenizer,
    source: str,
    ids: list[int],
    room: int,
    max_images: int | None,
    image_tokens: int,
) -> list[int]:
    """Ids of a source without as many of its oldest turns as must go; what is left may still be too long."""
    spans = history_spans(source)
    for first in range(len(spans) + 1):
        if first:
            ids = tokenizer.encode(source[: spans[0][0]] + source[spans[first - 1][1] :])
        images = ids.count(tokenizer.image_id)
        if len(ids) + images * (image_tokens - 1) <= room and (max_images is None or images <= max_images):
            break
    return ids


def _place_images(source: Sequence[int], image_id: int, image_tokens: int) -> tuple[list[int], list[int]]:
    """(source ids with each image's placeholder ``image_tokens`` times, the first slots of these)."""
    tokens, starts = [], []
    for i in source:
        if i == image_id:
            starts.append(len(tokens))
            tokens.extend([i] * image_tokens)
        else:
            tokens.append(i)
    return tokens, starts


def expand(
    tokenizer: LanguageTokenizer,
    source: str,
    target: str,
    *,
    image_tokens: int,
    max_length: int,
    max_images: int | None = None,
    max_targets: int | None = None,
    truncation: str = "left_history",
    mask_all_inner_vokens: bool = False,
) -> TokenizedSample:
    """Ids, labels and positions of one sample (fidelity 2.2, 2.3); an empty target gives a prompt.

    Source and target are tokenised on their own and joined behind BOS.  What does not fit
    ``max_length`` is cut here and reported in ``dropped``: first the source, its oldest turns
    (``left_history``: system prompt and instruction stay, and of a single turn that is too long the end) or
    from the right (as the original's tokenizer, quirk Q23), whole images only; then the end of the
    target's text.  The vokens, and
    the ``###`` behind them, always survive; the original could lose them.

    Args:
      image_tokens: positions of one input image, 32 for MiniGPT-4's Q-Former.
      max_length: positions at most, BOS included.
      max_images: images at most; None for no limit.
      max_targets: labels at most; None for no limit.

    Raises:
      DataError: ``max_length`` cannot hold BOS, the vokens and the ending, or ``max_targets`` not
        their labels.
    """
    if truncation not in ("left_history", "right"):
        raise DataError(f"truncation must be 'left_history' or 'right', got {truncation!r}")
    image_id, voken = tokenizer.image_id, tokenizer.first_voken_id
    source_ids, target_ids = tokenizer.encode(source), tokenizer.encode(target)
    mask = functools.partial(
        label_ids,
        first_voken_id=voken,
        num_vokens=tokenizer.num_vokens,
        mask_all_inner_vokens=mask_all_inner_vokens,
    )
    target_room = max_length - 1
    if max_targets is not None:
        target_room = min(target_room, max_targets + mask(target_ids).count(IGNORE))
    kept_target = _cut_target(target_ids, target_room, voken)
    room = max_length - 1 - len(kept_target)
    kept_source, total = source_ids, source_ids.count(image_id)
    if len(source_ids) + total * (image_tokens - 1) > room or (max_images is not None and total > max_images):
        if truncation == "left_history":
            kept_source = _drop_turns(tokenizer, source, source_ids, room, max_images, image_tokens)
        kept_source = _cut_source(kept_source, room, max_images, image_id, image_tokens, truncation)

    head, starts = _place_images([tokenizer.bos_id, *kept_source], image_id, image_tokens)
    left = len(starts)
    first = total - left if truncation == "left_history" else 0
    full = 1 + len(source_ids) + total * (image_tokens - 1) + len(target_ids)
    return TokenizedSample(
        tokens=np.asarray(head + kept_target, np.int32),
        labels=np.asarray([IGNORE] * len(head) + mask(kept_target), np.int32),
        images=tuple(range(first, first + left)),
        image_start=tuple(starts),
        voken_start=len(head) + kept_target.index(voken) if voken in kept_target else None,
        dropped=full - len(head) - len(kept_target),
    )
