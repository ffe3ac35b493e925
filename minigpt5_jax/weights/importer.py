"""Strict import of a pretrained tower: what of a file is used, checked tensor by tensor, and written again.

A source is read by its weight table.  Every key is consumed or ignored for a reason that the table gives;
every parameter is written once; shapes fit; no value is NaN or infinite.  The :class:`Coverage` says which
key went where.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.load import Weights, count_non_finite, is_floating, open_weights
from minigpt5_jax.weights.maps import llama
from minigpt5_jax.weights.table import Assignment, Table, WeightTableError
from minigpt5_jax.weights.towers import TOWERS, Shapes
from minigpt5_jax.weights.view import Tensors, View, replaced

COVERAGE_FILE = "coverage.json"


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


def open_source(name: str, path: Path) -> Weights:
    """A tower's published file or folder, no tensor read yet; where in a file of PyTorch its tensors are is
    found out.

    Raises:
      FileNotFoundError, WeightFileError: as :func:`minigpt5_jax.weights.load.open_weights`.
    """
    failure: WeightFileError | None = None
    for key in (None,) if path.is_dir() else dict.fromkeys((TOWERS[name].key, "model", "state_dict", None)):
        try:
            return open_weights(path, key)
        except WeightFileError as error:
            failure = failure or error
    raise failure or WeightFileError(f"{path} cannot be read")


def examine(
    name: str,
    source: Tensors,
    sizes: Any,
    *,
    notes: tuple[str, ...] = (),
    values: bool = True,
) -> tuple[View, Coverage]:
    """Compare a source's keys with a tower, and prepare to read it.

    Args:
      name: tower, as under ``config.weights``.  source: tensors by name.  sizes: the tower's.
      values: look for NaN too, not at shapes only.

    Returns:
      (the tensors that are used, under the names the tower's table reads; checked for shape and for
      NaN as each is read; coverage).

    Raises:
      WeightTableError: naming the keys that do not fit, and the likely cause.
    """
    tower = TOWERS[name]
    where = str(getattr(source, "path", None) or name)
    try:
        adapted = tower.adapt(source, sizes)
        table, shapes = tower.table(adapted, sizes), tower.shapes(sizes)
        plan = table.plan(list(adapted), shapes)
    except WeightTableError as error:
        raise WeightTableError(with_cause(f"{where}: {error}", name, source)) from None
    checked = check_tensors(
        plan, adapted, shapes, lambda text: with_cause(f"{where}: {text}", name, source), values=values
    )
    return checked, coverage_of(where, table, plan, adapted, notes)


def coverage_of(
    where: str, table: Table, plan: list[Assignment], keys: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> Coverage:
    """Coverage of a plan made of ``table`` and ``keys``."""
    ignored = {key: reason for key in keys if (reason := table.reason(key)) is not None}
    return Coverage(where, {item.key: item.targets for item in plan}, ignored, notes)


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
            parts = item.op.forward(value)
        except (ValueError, IndexError, WeightTableError) as error:
            raise WeightTableError(explain(f"{item.key!r} of shape {value.shape}: {error}")) from None
        for path, part in zip(item.targets, parts, strict=True):
            want = tuple(shapes[path])[0 if item.index is None else 1 :]
            if part.shape != want:
                raise WeightTableError(
                    explain(f"{item.key!r} gives shape {part.shape} for {path!r}, the model has {want}")
                )
        if values and (bad := count_non_finite(value)):
            raise WeightTableError(explain(f"{item.key!r} holds {bad} values that are NaN or infinite"))
        return value

    return View(source, {item.key: lambda item=item: checked(item) for item in plan})


def trim_vocabulary(source: Tensors, rows: int) -> Tensors:
    """A language model without the rows its tokenizer has no piece for.

    Vicuna v0's deltas carry a ``[PAD]`` row behind LLaMA's 32000 (reference 1.5); the original overwrites
    it with ``[IMG0]``.
    """
    return replaced(source, {key: lambda x: x[:rows] for key in (llama.EMBED, llama.HEAD)})


def read_sizes(name: str, path: Path | None) -> Any:
    """Sizes of a tower from a ``config.json``, or its preset without one.

    Raises:
      WeightFileError: the file is no JSON, or has a value that is not implemented.
    """
    tower = TOWERS[name]
    if path is None:
        return tower.preset
    try:
        values = json.loads(path.read_text())
        if tower.section and tower.section in values:  # BLIP-2 whole
            width = values.get("vision_config", {}).get("hidden_size")
            more = {"encoder_hidden_size": width} if name == "qformer" and width else {}
            queries = values.get("num_query_tokens")
            more |= {"num_query_tokens": queries} if name == "qformer" and queries else {}
            values = {**more, **values[tower.section]}
        return tower.from_hf(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightFileError(f"{path}: {error}") from None


def with_cause(message: str, name: str, source: Tensors) -> str:
    """``message`` about a source, and what the source probably is instead (:func:`likely_cause`)."""
    cause = likely_cause(name, source)
    return f"{message}\nlikely cause: {cause}" if cause else message


def likely_cause(name: str, source: Tensors) -> str:
    """What a source probably is, where it is not what the tower wants; '' for no idea.

    Told by a few names and shapes; only called once something does not fit.
    """

    def shape(key: str) -> tuple[int, ...]:
        return source[key].shape if key in source else ()

    keys = set(source)
    for owner, marks in _MARKS.items():
        if owner != name and any(key.startswith(marks) for key in keys):
            if not any(key.startswith(_MARKS.get(name, ("\0",))) for key in keys):
                return f"this is a file for weights.{owner}, not for weights.{name}"
    if name == "llm":
        rows = shape(llama.EMBED)
        if rows[1:] and rows[1] in LLAMA_SIZES and rows[1] != 4096:
            return f"hidden size {rows[1]} is LLaMA-{LLAMA_SIZES[rows[1]]}; MiniGPT-5 stands on the 7B model"
        if rows and rows[0] == 32001:
            return "32001 rows: Vicuna v0 as its delta gives it, with a [PAD] row; `convert llm` takes it off"
        if any(".lora_" in key or key.startswith("base_model.") for key in keys):
            return "these are LoRA factors, not a language model; merge them first, or give the base model"
    if name == "llama_proj" and shape("llama_proj.weight")[:1] == (5120,):
        return "MiniGPT-4's projection for Vicuna-13B; MiniGPT-5 takes the one for 7B"
    if name == "unet":
        if shape("conv_in.weight")[1:2] == (9,):
            return "nine input channels: an inpainting model; take stable-diffusion-2-1-base"
        context = next((shape(k)[1] for k in keys if k.endswith("attn2.to_k.weight")), 1024)
        if context in (768, 2048):
            which = "1.x" if context == 768 else "XL"
            return f"cross-attention of width {context}: Stable Diffusion {which}; take 2.1-base (1024)"
    if name == "vit" and shape("pos_embed")[2:] == (1024,):
        return "width 1024 is EVA or CLIP ViT-L; MiniGPT-4 uses ViT-g (1408)"
    return ""


LLAMA_SIZES = {5120: "13B", 6656: "33B", 8192: "65B or 70B", 3200: "3B"}
_MARKS: dict[str, tuple[str, ...]] = {
    "llm": ("model.layers.", "model.embed_tokens"),
    "vit": ("blocks.", "visual_encoder.", "vision_model."),
    "qformer": ("Qformer.", "qformer."),
    "llama_proj": ("llama_proj.",),
    "unet": ("down_blocks.", "up_blocks."),
    "vae": ("encoder.down_blocks", "quant_conv"),
    "text_encoder": ("text_model.",),
}
