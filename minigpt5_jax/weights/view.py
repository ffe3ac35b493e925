"""Tensors of a source under other names, or in another form, still read one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.weights.table import Table, WeightTableError, listed

Tensors = Mapping[str, Any]
"""Name -> array.  Reading may refuse one, so types are not looked at before that."""


class View(Mapping):
    """Names with a function each that reads the tensor; nothing is read before it is asked for.

    Args:
      source: what the functions read, a mapping or a path (``path`` names it in messages).
      readers: name -> function without arguments.  metadata: strings stored with the tensors.
    """

    def __init__(
        self,
        source: Tensors | Path,
        readers: Mapping[str, Callable[[], np.ndarray]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path: Any = source if isinstance(source, Path) else getattr(source, "path", None)
        self.source, self._readers, self.metadata = source, dict(readers), dict(metadata or {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def made(source: Tensors, names: Iterable[str], read: Callable[[str], np.ndarray]) -> View:
    """``names``, each with the tensor that ``read`` makes of it."""
    return View(source, {name: functools.partial(read, name) for name in names})


def replaced(source: Tensors, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> View:
    """The source with some tensors passed through a function when they are read."""
    return made(source, source, lambda name: changes.get(name, lambda value: value)(source[name]))


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
        raise WeightTableError(f"{getattr(source, 'path', 'weights')} do not match:{listed(problems)}")
    return View(source, readers)
