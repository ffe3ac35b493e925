"""What every format writes from: a trained model whose pretrained tensors are read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.weights.load import is_floating
from minigpt5_jax.weights.maps import llama
from minigpt5_jax.weights.table import Assignment, Table, WeightTableError
from minigpt5_jax.weights.view import Tensors

LLM = "backbone/llm/"
TABLE_DECAY = f"{LLM}table_decay"
LLM_TABLES = {llama.EMBED: "embed_tokens", llama.HEAD: "lm_head"}
"""The two tables of words under Hugging Face's names, and their modules here."""


class ExportError(ValueError):
    """A model has no place in the format that was asked for; the message says what has."""


class PretrainedTower(Mapping):
    """A pretrained tower as the model computes with it, under the names of its file.

    A tensor is read, and cast to the dtype of the parameter it fills, when it is asked for.

    Args:
      table: rules from names to paths.  source: tensors by name.
      shapes: path -> what has ``shape`` and ``dtype`` (``Template.shapes``), without the tower's prefix.
      own: path -> value of parameters that the run has in a form of its own, in place of the source's.

    Raises:
      WeightTableError: naming keys and paths that do not match.
    """

    def __init__(
        self,
        table: Table,
        source: Tensors,
        shapes: Mapping[str, Any],
        own: Mapping[str, np.ndarray],
    ):
        self._source, self._shapes, self._own = source, shapes, own
        plan = table.plan(list(source), {path: shape.shape for path, shape in shapes.items()})
        self._by_key = {item.key: item for item in plan}
        self._by_path: dict[str, list[tuple[Assignment, int]]] = {}
        for item in sorted(plan, key=lambda item: item.index or 0):
            for number, path in enumerate(item.targets):
                self._by_path.setdefault(path, []).append((item, number))

    def _parts(self, item: Assignment) -> tuple[np.ndarray, ...]:
        """Values of an assignment's targets."""
        if all(path in self._own for path in item.targets):
            whole = [np.asarray(self._own[path]) for path in item.targets]
            return tuple(value if item.index is None else value[item.index] for value in whole)
        values = item.op.forward(self._source[item.key])
        for path, value in zip(item.targets, values, strict=True):
            want = tuple(self._shapes[path].shape)[0 if item.index is None else 1 :]
            if value.shape != want:
                raise WeightTableError(f"{item.key!r} gives {value.shape} for {path!r}, the model has {want}")
        return tuple(
            value.astype(self._shapes[path].dtype, copy=False) for path, value in zip(item.targets, values)
        )

    def __getitem__(self, key: str) -> np.ndarray:
        item = self._by_key[key]
        return np.ascontiguousarray(item.op.backward(self._parts(item)))

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def paths(self) -> tuple[str, ...]:
        """Paths of every parameter."""
        return tuple(self._by_path)

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """A parameter in pieces along its first axis: one per layer where it is stacked."""
        for item, number in self._by_path[path]:
            yield self._parts(item)[number]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The language model's tokenizer.

    Attributes:
      model_file: sentencepiece ``tokenizer.model``.
      added: new tokens in the order of their ids.  first_id: of the first one, rows of the old vocabulary.
      bos_id: put in front of every sample.  eos_ids: ids that end a text, the tokenizer's own first.
    """

    model_file: Path
    added: tuple[str, ...]
    first_id: int
    bos_id: int
    eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model for export.

    Attributes:
      params: path -> value of everything that comes from training and from no pretrained file.
      trainable: which of them the last stage trained.
      towers: pretrained towers (those the format needs) by their names under ``config.weights``.
      sizes: of every tower and of the mapper, by the same names.
      lora, prefix: how the language model was tuned in stage 2.
      num_vokens: of a picture.  tokens: of the language model.
      clip_tokenizer: folder of the generator's tokenizer.
      scheduler: noise schedule in Hugging Face field names.
      caption_ids: special ids of the generator's tokenizer in Hugging Face field names.
      voken_state_shift: 1 if the states before the vokens feed the mapper, 0 for those on them.
      dtype: of frozen weights.  step: updates done.
      hyper_parameters: of the run, under the original's names.
      llm_source: where the language model came from, as the configuration has it.
    """

    params: Mapping[str, np.ndarray]
    trainable: frozenset[str]
    towers: Mapping[str, PretrainedTower]
    sizes: Mapping[str, Any]
    lora: LoraConfig | None
    prefix: PrefixConfig | None
    num_vokens: int
    tokens: Tokens | None
    clip_tokenizer: Path | None
    scheduler: Mapping[str, Any]
    caption_ids: Mapping[str, int]
    voken_state_shift: int
    dtype: np.dtype
    step: int
    hyper_parameters: Mapping[str, Any]
    llm_source: str

    def table(self, key: str, dtype: Any = np.float32) -> np.ndarray:
        """A table of words under its Hugging Face name: old rows, then new ones, [V + n, d]."""
        new = self.params[f"{LLM}{LLM_TABLES[key]}/voken"]
        return np.concatenate([self.old_rows(key, dtype), new.astype(dtype)])

    def old_rows(self, key: str, dtype: Any = np.float32) -> np.ndarray:
        """The same without the new rows, as weight decay left them (Q3)."""
        rows, decay = self.towers["llm"][key], self.params.get(TABLE_DECAY)
        if decay is not None:
            rows = rows.astype(np.float32) * (1 - np.float32(decay))
        return rows.astype(dtype, copy=False)

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """Trained parameters below ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.params.items() if k.startswith(prefix)}


def cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    """Floating values in ``dtype``; others, and everything for None, as they are."""
    return value.astype(dtype, copy=False) if dtype is not None and is_floating(value.dtype) else value
