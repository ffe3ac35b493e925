"""Tensors of a source under other names, or in another form, still read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from minigpt5_jax.weights.table import Table, WeightTableError

Tensors = Mapping[str, Any]
"""Name -> array.  Reading may refuse one, so types are not looked at before that."""


class View(Mapping):
    """Names with a function each that reads the tensor; nothing is read before it is asked for.

    Args:
      source: what the functions read (its ``path`` names it in messages).
      readers: name -> function without arguments.
    """

    def __init__(self, source: Tensors, readers: Mapping[str, Callable[[], np.ndarray]]):
        self.path: Any = getattr(source, "path", None)
        self.source, self._readers = source, dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def subset(source: Tensors, names: Mapping[str, str]) -> View:
    """``names`` (new name -> name in the source), unchanged otherwise."""
    return View(source, {new: lambda old=old: source[old] for new, old in names.items()})


def replaced(source: Tensors, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> View:
    """The source with some tensors passed through a function when they are read."""

    def reader(name: str) -> Callable[[], np.ndarray]:
        if name in changes:
            return lambda: changes[name](source[name])
        return lambda: source[name]

    return View(source, {name: reader(name) for name in source})


def rename(table: Table, source: Tensors) -> View:
    """The source under the names a table of names gives (:mod:`minigpt5_jax.weights.foreign.ldm`).

    Raises:
      WeightTableError: naming source keys that no rule consumes, and names that two keys give.
    """
    readers: dict[str, Callable[[], np.ndarray]] = {}
    problems = []
    for key in source:
        if table.reason(key) is not None:
            continue
        assignment = table.resolve(key)
        if assignment is None:
            problems.append(f"source key {key!r} is consumed by no rule")
            continue
        for part, name in enumerate(assignment.targets):
            if name in readers:
                problems.append(f"{name!r} is given twice (again by {key!r})")
            readers[name] = lambda key=key, op=assignment.op, part=part: op.forward(source[key])[part]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise WeightTableError(f"{getattr(source, 'path', 'weights')} do not match:\n  {shown}")
    return View(source, readers)
