"""Encoded samples as one numpy Batch of static shapes, every index worked out on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from minigpt5_jax.data.batches.encode import EncodeConfig, Sample, Uncached
from minigpt5_jax.data.batches.spec import BatchSpec, empty_arrays
from minigpt5_jax.data.batches.tree import image_keys, plant
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.templates import IGNORE


def collate(
    samples: Sequence[Sequence[Sample | None]],
    spec: BatchSpec,
    numbers: Int[np.ndarray, "r p"],
    config: EncodeConfig,
    first_row: int = 0,
    uncached: list[tuple[str, int, Uncached]] | None = None,
) -> dict[str, np.ndarray]:
    """Fields of a :class:`~minigpt5_jax.batch.Batch`: ``spec.rows`` rows of ``spec.pack`` samples.

    A place without a sample (None: it could not be read) is padding, its items and images masked out.
    Slots of items and images belong to places, so that what a row holds does not depend on its
    neighbours nor on how rows are shared among processes.

    Args:
      samples: by row and place.
      spec: shapes of this part of the batch.
      numbers: i64[r p] global number of each sample; it is the item's number too, and the first one of
        a row is the row's.
      first_row: row of the whole micro-batch where this part begins; ``image_row`` and ``voken_row``
        count from the whole's first row.
      uncached: takes (field, slot, image) of those whose features are still to be made; theirs are zeros.
    """
    if len(samples) != spec.rows or numbers.shape != (spec.rows, spec.pack):
        raise DataError(f"{len(samples)} rows and {numbers.shape} numbers for {spec.rows} x {spec.pack}")
    arrays, uncached = empty_arrays(spec), [] if uncached is None else uncached
    arrays["tokens"][:] = config.tokenizer.pad_id
    empty_ids, empty_mask = config.caption_tokenizer.encode([""])
    arrays["caption_ids"][:], arrays["caption_mask"][:] = empty_ids, empty_mask
    numbers = numbers % 2**31  # int32 on the device; distinct within any step
    arrays["row_id"][:] = numbers[:, 0]
    rows = first_row + np.arange(spec.rows)
    arrays["image_row"][:] = np.repeat(rows, spec.image_places // spec.rows)
    arrays["voken_row"][:] = np.repeat(rows, spec.items // spec.rows)
    if spec.tree is not None:
        for row, places in enumerate(samples):
            there = [(int(n), sample) for n, sample in zip(numbers[row], places) if sample is not None]
            _fill_tree(arrays, row, first_row, there, spec, uncached)
        return arrays
    if spec.items:
        arrays["item_id"][:] = numbers.ravel()
    if spec.split:
        arrays["voken_row"][:] = first_row * spec.pack + np.arange(spec.items)
    for row, places in enumerate(samples):
        start = 0  # of the next sample in its row
        for place, sample in enumerate(places):
            if sample is not None:
                slot = row * spec.pack + place
                length = len(sample.text.tokens) - spec.apart
                _fill_row(arrays, row, place, slice(start, start + length), sample)
                if spec.split:
                    _fill_continuation(arrays, slot, start + length, spec.apart, sample)
                else:
                    _fill_labels(arrays, row, place * spec.targets, start, sample.text.labels)
                _fill_images(arrays, slot * (spec.images // spec.samples), start, sample, uncached)
                if sample.target is not None:
                    _fill_item(arrays, slot, sample, uncached)
                    if not spec.split:
                        arrays["voken_start"][slot] = start + sample.text.voken_start
                start += length
    return arrays


def _fill_row(arrays: dict[str, np.ndarray], row: int, place: int, here: slice, sample: Sample) -> None:
    length = here.stop - here.start
    arrays["tokens"][row, here] = sample.text.tokens[:length]
    arrays["positions"][row, here] = np.arange(length)
    arrays["segment_ids"][row, here] = 1 + place


def _fill_labels(
    arrays: dict[str, np.ndarray], line: int, slot: int, start: int, labels: Int32[np.ndarray, " t"]
) -> None:
    """Labels of a sample from position ``start`` of a line on, their positions from ``slot`` on."""
    arrays["labels"][line, start : start + len(labels)] = labels
    found = np.flatnonzero(labels != IGNORE)
    arrays["label_positions"][line, slot : slot + len(found)] = start + found


def _fill_continuation(
    arrays: dict[str, np.ndarray], slot: int, end: int, apart: int, sample: Sample
) -> None:
    labels, start = sample.text.labels, sample.text.voken_start
    if start is None or len(labels) - start != apart or (labels[:start] != IGNORE).any():
        raise DataError(
            "a sample does not end in its vokens and one token after them; set data.split_vokens=False"
        )
    _fill_labels(arrays, slot, 0, 1, labels[start:])
    arrays["prompt_end"][slot] = end


def _fill_images(
    arrays: dict[str, np.ndarray], first: int, start: int, sample: Sample, uncached: list
) -> None:
    slots = slice(first, first + len(sample.images))
    for slot, values in enumerate(sample.images, first):
        _fill_values(arrays, "image_states", "images", slot, values, uncached)
    arrays["image_start"][slots] = start + np.asarray(sample.text.image_start, np.int32)
    arrays["image_mask"][slots] = True


def _fill_values(
    arrays: dict[str, np.ndarray],
    ready: str,
    pixels: str,
    slot: int,
    values: np.ndarray | Uncached,
    uncached: list,
) -> None:
    if isinstance(values, Uncached):
        uncached.append((ready, slot, values))
    else:
        arrays[ready if ready in arrays else pixels][slot] = values


def _fill_item(arrays: dict[str, np.ndarray], slot: int, sample: Sample, uncached: list) -> None:
    _fill_values(arrays, "target_moments", "target", slot, sample.target, uncached)
    arrays["item_mask"][slot] = True
    arrays["caption_ids"][slot] = sample.caption_ids
    arrays["caption_mask"][slot] = sample.caption_mask
    arrays["has_caption"][slot] = sample.has_caption


def _fill_tree(
    arrays: dict[str, np.ndarray],
    row: int,
    first_row: int,
    samples: list[tuple[int, Sample]],
    spec: BatchSpec,
    uncached: list,
) -> None:
    """A row whose samples (number, sample) are a tree; an item has its sample's number, as elsewhere."""
    images: dict[
        int, tuple[int, np.ndarray | Uncached]
    ] = {}  # id of an image's values -> its slot in the row, and they
    for _, sample in samples:
        for values in sample.images:
            images.setdefault(id(values), (len(images), values))
    slots = [[images[id(values)][0] for values in sample.images] for _, sample in samples]
    keys = [
        image_keys(sample.text.tokens, sample.text.image_start, own, spec.image_tokens)
        for (_, sample), own in zip(samples, slots, strict=True)
    ]
    tree, due, places = plant(keys), [], {}
    paths = [(sample.text, path) for (_, sample), path in zip(samples, tree.paths, strict=True)]
    for (text, path), own in zip(paths, slots, strict=True):
        due.extend(path[text.labels != IGNORE].tolist())  # a target of several samples counts for each
        places.update(zip(path[list(text.image_start)].tolist(), own, strict=True))
    items = [
        (path, number, sample)
        for (number, sample), path in zip(samples, tree.paths, strict=True)
        if sample.target is not None
    ]
    _check_room(spec, len(tree.before), len(due), len(items), len(images), len(places))

    for text, path in paths:
        arrays["tokens"][row, path], arrays["positions"][row, path] = text.tokens, np.arange(len(path))
        targets = text.labels != IGNORE
        arrays["labels"][row, path[targets]] = text.labels[targets]
    here = slice(0, len(tree.before))
    arrays["segment_ids"][row, here] = 1
    arrays["subtree_end"][row, here], arrays["before"][row, here] = tree.ends, tree.before
    arrays["label_positions"][row, : len(due)] = due
    first = row * (spec.items // spec.rows)
    for slot, (path, number, sample) in enumerate(items, first):
        _fill_item(arrays, slot, sample, uncached)
        arrays["item_id"][slot], arrays["voken_start"][slot] = number, path[sample.text.voken_start]
    first = row * (spec.images // spec.rows)
    for slot, values in images.values():
        _fill_values(arrays, "image_states", "images", first + slot, values, uncached)
    first_image = first_row * (spec.images // spec.rows) + first
    for place, (start, slot) in enumerate(places.items(), row * spec.tree.image_places):
        arrays["image_start"][place], arrays["image_index"][place] = start, first_image + slot
        arrays["image_mask"][place] = True


def _check_room(spec: BatchSpec, *sizes: int) -> None:
    """DataError where the tree of a story is larger than the index of its source said."""
    names = ("length", "target positions", "images to draw", "input images", "places of input images")
    per_row = (spec.items // spec.rows, spec.images // spec.rows)
    rooms = (spec.length, spec.tree.labels, *per_row, spec.tree.image_places)
    for name, size, room in zip(names, sizes, rooms, strict=True):
        if size > room:
            raise DataError(
                f"a story's tree has {name} {size}, its row has room for {room}: the words or images of the "
                "source are not those that were measured; set data.packing=shuffled"
            )
