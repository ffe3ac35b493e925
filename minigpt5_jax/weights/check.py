"""Strict import of a pretrained tower: what of a file is used, checked tensor by tensor, and written again.

A source is read by its weight table.  Every key is consumed or ignored for a reason that the table gives;
every parameter is written once; shapes fit; no value is NaN or infinite.  The :class:`Coverage` says which
key went where.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minigpt5_jax.weights.formats.load import count_non_finite, is_floating
from minigpt5_jax.weights.table import Assignment, WeightTableError
from minigpt5_jax.weights.view import Tensors, View

COVERAGE_FILE = "coverage.json"
Shapes = Mapping[str, tuple[int, ...]]
NOT_SIZES = (
    "vocab_size",
    "initializer_range",
    "sample_size",
    "max_position_embeddings",
    "num_key_value_heads",
)
"""Fields of a ``config.json`` in which files of one model differ."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What an import did with each tensor of a source.

    Attributes:
      source: file or folder.  consumed: source key -> parameter paths.  ignored: source key -> reason.
      notes: what else is worth knowing.
    """

    source: str
    consumed: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[str, ...]:
        """Every parameter that was written, sorted (a stacked one once)."""
        return tuple(sorted({path for paths in self.consumed.values() for path in paths}))

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {len(self.consumed)} tensors used, {len(self.ignored)} ignored, "
            f"{len(self.written)} parameters written"
        ]
        for reason, count in Counter(self.ignored.values()).items():
            first = next(key for key, why in self.ignored.items() if why == reason)
            more = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  ignored {first}{more}: {reason}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "written": self.written}


def examine(
    name: str,
    tower: Any,
    source: Tensors,
    sizes: Any,
    *,
    others: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    values: bool = True,
) -> tuple[View, Coverage]:
    """Compare a source's keys with a tower, and prepare to read it.

    Args:
      name: of the tower under ``config.weights``.  tower: its ``models.tower.Tower``.  source: its tensors.
      sizes: the tower's.  others: records of other towers by name, for the likely cause of what does not fit.
      values: look for NaN too, not at shapes only.

    Returns:
      (the tensors that are used, under the names the tower's table reads; checked for shape and for
      NaN as each is read; coverage).

    Raises:
      WeightTableError: naming the keys that do not fit, and the likely cause.
    """
    where = str(getattr(source, "path", None) or name)

    def explain(text: str) -> str:
        return with_cause(f"{where}: {text}", name, tower, source, others)

    try:
        adapted = tower.adapt(source, sizes)
        table, shapes = tower.table(adapted, sizes), tower.shapes(sizes)
        plan = table.plan(list(adapted), shapes)
    except WeightTableError as error:
        raise WeightTableError(explain(str(error))) from None
    checked = check_tensors(plan, adapted, shapes, explain, values=values)
    ignored = {key: reason for key in adapted if (reason := table.reason(key)) is not None}
    return checked, Coverage(where, {item.key: item.targets for item in plan}, ignored, notes)


def check_tensors(
    plan: list[Assignment],
    source: Tensors,
    shapes: Shapes,
    explain: Callable[[str], str] = lambda text: text,
    *,
    values: bool = True,
) -> View:
    """The tensors of a plan; reading one raises WeightTableError if its shape or its values are wrong."""

    def checked(item: Assignment) -> np.ndarray:
        value = source[item.key]
        if not is_floating(value.dtype):
            raise WeightTableError(explain(f"{item.key!r} is {value.dtype}: quantised files are not read"))
        try:
            item.apply(value, shapes)
        except WeightTableError as error:
            raise WeightTableError(explain(str(error))) from None
        if values and (bad := count_non_finite(value)):
            raise WeightTableError(explain(f"{item.key!r} holds {bad} values that are NaN or infinite"))
        return value

    return View(source, {item.key: lambda item=item: checked(item) for item in plan})


QUANTIZED_MARKS = (".qweight", ".SCB", ".absmax", ".quant_state.bitsandbytes__nf4", ".weight_scale")
"""Ends of names in files that GPTQ, AWQ, bitsandbytes and others wrote."""


def quantized_already(about: Any = None) -> str:
    """That weights are quantised already, and the remedy; ``about``: what their ``config.json`` says."""
    method = f" ({about['quant_method']})" if isinstance(about, Mapping) and "quant_method" in about else ""
    return (
        f"these weights are quantised already{method}, and such files are not read: give them in 16 or 32 "
        "bits; they can be quantised when they are loaded (docs/weights.md)"
    )


def with_cause(
    message: str, name: str, tower: Any, source: Tensors, others: Mapping[str, Any] | None = None
) -> str:
    """``message`` about a source, and what the source probably is instead, told by a few names and shapes."""
    cause = quantized_already() if any(key.endswith(QUANTIZED_MARKS) for key in source) else ""
    if not cause and not any(key.startswith(tower.marks or ("\0",)) for key in source):
        for owner, other in (others or {}).items():
            if owner != name and other.marks and any(key.startswith(other.marks) for key in source):
                cause = cause or f"this is a file for weights.{owner}, not for weights.{name}"
    cause = cause or tower.cause(source, lambda key: source[key].shape if key in source else ())
    return f"{message}\nlikely cause: {cause}" if cause else message


def differing(sizes: Any, preset: Any) -> list[str]:
    """Each field in which sizes are not the preset's, with both values; but for ``NOT_SIZES``."""
    want = dataclasses.asdict(preset)
    return [
        f"{field} is {value}, not {want[field]}"
        for field, value in dataclasses.asdict(sizes).items()
        if value != want[field] and field not in NOT_SIZES
    ]
