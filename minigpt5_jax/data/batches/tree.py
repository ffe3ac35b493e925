"""Sequences as one tree: what they begin with alike stands, and is computed, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """The n nodes of a tree in depth-first order.

    Attributes:
      before: i32[n] parent of each node; 0 for the root.
      ends: i32[n] the place after a node's last descendant: node i lies below node j, or is it, where
        j <= i < ends[j].
      paths: the nodes of each sequence, in its order.
    """

    before: Int32[np.ndarray, " n"]
    ends: Int32[np.ndarray, " n"]
    paths: list[Int32[np.ndarray, " _"]]


def plant(sequences: Sequence[Sequence[int]]) -> Tree:
    """The tree of sequences of keys (a trie): two share a node where they are alike up to it."""
    before: list[int] = []
    ends: list[int] = []
    paths: dict[int, list[int]] = {}
    path: list[int] = []
    last: Sequence[int] = ()
    # In sorted order a sequence shares with the one before all that it shares with any before, so that new
    # nodes come in depth-first order.
    for number in sorted(range(len(sequences)), key=lambda n: sequences[n]):
        own = sequences[number]
        shared = common(last, own)
        for node in path[shared:]:
            ends[node] = len(before)
        path = path[:shared]
        for _ in own[shared:]:
            before.append(path[-1] if path else 0)
            ends.append(0)
            path.append(len(before) - 1)
        paths[number], last = path, own
    for node in path:
        ends[node] = len(before)
    found = [np.asarray(paths[number], np.int32) for number in range(len(sequences))]
    return Tree(np.asarray(before, np.int32), np.asarray(ends, np.int32), found)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many keys two sequences begin with alike."""
    for place, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return place
    return min(len(first), len(second))


def image_keys(
    tokens: Int32[np.ndarray, " t"], starts: Iterable[int], images: Iterable[int], image_tokens: int
) -> list[int]:
    """Token ids as keys of a tree: a slot of an image is named by its image (a number) and its place in it.

    The ids of all slots of all images are the same.  Ids are not negative, and keys of slots are.
    """
    keys = tokens.tolist()
    for start, image in zip(starts, images, strict=True):
        first = 1 + image * image_tokens
        keys[start : start + image_tokens] = range(-first, -first - image_tokens, -1)
    return keys


def count_images(keys: Iterable[int], image_tokens: int) -> int:
    """First slots of images among keys."""
    return sum(key < 0 and (-key - 1) % image_tokens == 0 for key in keys)
