"""Weight tables: invertible, strict rules between foreign tensor names and our parameter paths.

A table is a list of rules.  A rule pairs one source key pattern with one target path pattern:

>>> Rule("model.layers.{i}.self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", LINEAR)

``{i}``, ``{j}`` and so on match integers; ``{2i}`` and ``{2i+1}`` match even and odd ones.  A
placeholder that the target does not repeat is the index into the target's leading (stacked)
axis.  Both directions are strict: a source key no rule consumes and a target leaf no rule writes
are errors that name the key.  Tables hold no arrays, so one plan serves import, export and
streaming.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PLACEHOLDER = re.compile(r"\{(\d*)([a-z])(?:\+(\d+))?\}")
NUMBER = re.compile(rf"{PLACEHOLDER.pattern}|\d+")


class WeightTableError(ValueError):
    """Source and target do not match; the message names every offending key."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible change of layout: one source array <-> one array per target of the rule."""

    name: str
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    backward: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _single(name: str, forward, backward) -> Op:
    return Op(name, lambda x: (forward(x),), lambda xs: backward(xs[0]))


COPY = _single("copy", lambda x: x, lambda x: x)
LINEAR = _single("linear", lambda x: x.T, lambda x: x.T)
CONV = _single("conv", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
SQUEEZED_LINEAR = _single(  # a 1x1 convolution that is a dense layer here
    "conv1x1", lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
)


def split(count: int, op: Op = COPY) -> Op:
    """Cut the source into ``count`` equal parts on axis 0 (stacked q, k, v) and apply ``op`` to each."""

    def forward(x):
        if x.shape[0] % count:
            raise WeightTableError(f"axis 0 of shape {x.shape} does not split into {count} parts")
        return tuple(op.forward(part)[0] for part in np.split(x, count))

    return Op(f"split{count}({op.name})", forward, lambda xs: np.concatenate([op.backward((x,)) for x in xs]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """``source`` key pattern <-> ``target`` path pattern (or one pattern per output of ``op``)."""

    source: str
    target: str | tuple[str, ...]
    op: Op = COPY

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


def linear_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """A torch ``Linear`` with bias <-> :class:`~minigpt5_jax.models.common.Linear`."""
    return Rule(f"{source}.weight", f"{target}/kernel", LINEAR), Rule(f"{source}.bias", f"{target}/bias")


def norm_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """A torch ``LayerNorm`` or ``GroupNorm`` <-> ours (``weight`` is called ``scale``)."""
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def each(
    rules: Callable[[str, str], Iterable[Rule]], source: str, target: str, names: Iterable[str]
) -> tuple[Rule, ...]:
    """``rules`` (as :func:`linear_rules`) of names behind both prefixes; ``NAME>OURS`` where they differ."""
    pairs = [(old, new or old) for old, _, new in (name.partition(">") for name in names)]
    return tuple(rule for old, new in pairs for rule in rules(source + old, target + new))


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One resolved rule: source tensor ``key`` fills ``targets`` (at ``index`` of the stacked axis)."""

    key: str
    targets: tuple[str, ...]
    index: int | None
    op: Op

    def apply(self, value: np.ndarray, shapes: Mapping[str, Sequence[int]]) -> tuple[np.ndarray, ...]:
        """The values of ``targets``, views of the tensor where the operation allows.

        Raises:
          WeightTableError: their shapes are not those of ``shapes`` (path -> shape, with the stacked axis).
        """
        try:
            parts = self.op.forward(value)
        except (ValueError, IndexError) as error:  # fewer dimensions than the operation permutes
            raise WeightTableError(f"{self.key!r} of shape {value.shape}: {error}") from None
        for path, part in zip(self.targets, parts, strict=True):
            want = tuple(shapes[path])[0 if self.index is None else 1 :]
            if part.shape != want:
                raise WeightTableError(
                    f"{self.key!r} gives shape {part.shape} for {path!r}, the model has {want}"
                )
        return parts


def listed(problems: Sequence[str]) -> str:
    """The first problems, one a line, and how many more there are."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "".join(f"\n  {problem}" for problem in [*problems[:20], *more])


def _skeleton(name: str) -> str:
    """The name, or pattern, with ``#`` for each number: a name fits only patterns of the same skeleton."""
    return NUMBER.sub("#", name)


@functools.cache  # the rules of a stack are asked about each of its layers
def _regex(pattern: str) -> re.Pattern[str]:
    parts, last = [], 0
    for match in PLACEHOLDER.finditer(pattern):
        parts += [re.escape(pattern[last : match.start()]), f"(?P<{match[2]}>\\d+)"]
        last = match.end()
    return re.compile("".join(parts) + re.escape(pattern[last:]))


def _match(pattern: str, name: str) -> dict[str, int] | None:
    """Values of the placeholders if ``name`` fits ``pattern``, else None."""
    found = _regex(pattern).fullmatch(name)
    if found is None:
        return None
    values = {}
    for factor, letter, offset in PLACEHOLDER.findall(pattern):
        quotient, rest = divmod(int(found[letter]) - int(offset or 0), int(factor or 1))
        if rest or quotient < 0:
            return None
        values[letter] = quotient
    return values


def _fill(pattern: str, values: Mapping[str, int]) -> str:
    return PLACEHOLDER.sub(lambda m: str(int(m[1] or 1) * values[m[2]] + int(m[3] or 0)), pattern)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rules of one architecture, and source keys that are deliberately not read (regex -> reason).

    ``ignored`` comes before the rules: a table may leave out layers its rules would match.
    """

    rules: tuple[Rule, ...]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def prefixed(self, source: str = "", target: str = "") -> Table:
        """The same table with every source key and target path prefixed."""
        rules = tuple(Rule(source + r.source, tuple(target + t for t in r.targets), r.op) for r in self.rules)
        ignored = {re.escape(source) + pattern: why for pattern, why in self.ignored.items()}
        return Table(rules, ignored)

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, {**self.ignored, **other.ignored})

    @functools.cached_property
    def _by_skeleton(self) -> dict[str, list[Rule]]:
        found: dict[str, list[Rule]] = {}
        for rule in self.rules:
            found.setdefault(_skeleton(rule.source), []).append(rule)
        return found

    def resolve(self, key: str) -> Assignment | None:
        """The assignment of a source key, None where no rule matches; ``ignored`` is not looked at."""
        for rule in self._by_skeleton.get(_skeleton(key), ()):
            values = _match(rule.source, key)
            if values is None:
                continue
            letters = {m[1] for m in PLACEHOLDER.findall(rule.targets[0])}
            stacked = [v for letter, v in values.items() if letter not in letters]
            if len(stacked) > 1:
                raise WeightTableError(f"rule {rule.source!r} stacks more than one index")
            targets = tuple(_fill(t, values) for t in rule.targets)
            return Assignment(key, targets, stacked[0] if stacked else None, rule.op)
        return None

    def reason(self, key: str) -> str | None:
        """Why a source key is not read; None for one that must be."""
        return next((why for pattern, why in self.ignored.items() if re.fullmatch(pattern, key)), None)

    def plan(self, keys: Sequence[str], targets: Mapping[str, Sequence[int]]) -> list[Assignment]:
        """Resolve every source key against the target shapes (path -> shape); strict both ways."""
        plan, problems, written = [], [], {}
        for key in sorted(keys):
            if self.reason(key) is not None:
                continue
            assignment = self.resolve(key)
            if assignment is None:
                problems.append(f"source key {key!r} is consumed by no rule")
                continue
            plan.append(assignment)
            for path in assignment.targets:
                slots = written.setdefault(path, set())
                if path not in targets:
                    problems.append(f"source key {key!r} maps to {path!r}, which the model does not have")
                elif assignment.index in slots:
                    problems.append(f"target {path!r} is written twice (again by {key!r})")
                elif assignment.index is not None and assignment.index >= targets[path][0]:
                    problems.append(
                        f"source key {key!r} is layer {assignment.index} of {path!r}, "
                        f"which has {targets[path][0]}"
                    )
                slots.add(assignment.index)
        for path, shape in targets.items():
            slots = written.get(path, set())
            missing = set() if None in slots else set(range(shape[0] if slots else 0)) - slots
            if not slots:
                problems.append(f"target {path!r} is written by no source key")
            elif missing:
                problems.append(f"target {path!r} lacks layers {sorted(missing)}")
        if problems:
            raise WeightTableError(f"weights do not match the model:{listed(problems)}")
        return plan

    def to_params(
        self, source: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, np.ndarray]:
        """Import: ``{path: array}`` for every path of ``shapes``, dtypes as in the source (name -> array).

        Raises:
          WeightTableError: naming keys that are missing, unexpected, or of another shape.
        """
        params: dict[str, np.ndarray] = {}
        for item in self.plan(list(source), shapes):
            for path, value in zip(item.targets, item.apply(np.asarray(source[item.key]), shapes)):
                if item.index is None:
                    params[path] = value
                    continue
                stacked = params.setdefault(path, np.empty(tuple(shapes[path]), value.dtype))
                if stacked.dtype != value.dtype:  # assigning would round in silence
                    raise WeightTableError(
                        f"{item.key!r} is {value.dtype}, other layers of {path!r} are "
                        f"{stacked.dtype}; cast the source to one dtype"
                    )
                stacked[item.index] = value
        return params

    def to_source(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Export, the exact inverse of :meth:`to_params`; every path of ``params`` must be covered."""
        source, covered, paths_of = {}, set(), {}
        for path in params:
            paths_of.setdefault(_skeleton(path), []).append(path)
        for rule in self.rules:
            likely = paths_of.get(_skeleton(rule.targets[0]), ())
            matches = ((path, _match(rule.targets[0], path)) for path in likely)
            found = [(path, values) for path, values in matches if values is not None]
            for path, values in found:
                paths = [path] + [_fill(t, values) for t in rule.targets[1:]]
                covered.update(paths)
                arrays = [np.asarray(params[p]) for p in paths]
                stacked = {m[1] for m in PLACEHOLDER.findall(rule.source)} - set(values)
                if stacked:
                    for i in range(arrays[0].shape[0]):
                        key = _fill(rule.source, {**values, stacked.copy().pop(): i})
                        source[key] = np.asarray(rule.op.backward(tuple(a[i] for a in arrays)), order="C")
                else:
                    # asarray, because ascontiguousarray makes a scalar a vector
                    source[_fill(rule.source, values)] = np.asarray(
                        rule.op.backward(tuple(arrays)), order="C"
                    )
        if uncovered := sorted(set(params) - covered):
            raise WeightTableError(f"no rule exports {uncovered[:20]}")
        return source
