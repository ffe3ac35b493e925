"""What every format writes from: a trained model whose pretrained tensors are read one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.weights.table import Assignment, Table
from minigpt5_jax.weights.view import Tensors, View

WORD_TABLES = {llama.EMBED: "embed_tokens", llama.HEAD: "lm_head"}
"""The two tables of words under Hugging Face's names, and their modules here."""


class ExportError(ValueError):
    """A model has no place in the format that was asked for; the message says what has."""


class PretrainedTower(View):
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
        self, table: Table, source: Tensors, shapes: Mapping[str, Any], own: Mapping[str, np.ndarray]
    ):
        self._own, self._dtypes = own, {path: shape.dtype for path, shape in shapes.items()}
        self._shapes = {path: shape.shape for path, shape in shapes.items()}
        plan = table.plan(list(source), self._shapes)
        super().__init__(source, {item.key: functools.partial(self._read, item) for item in plan})
        self._by_path: dict[str, list[tuple[Assignment, int]]] = {}
        for item in sorted(plan, key=lambda item: item.index or 0):
            for number, path in enumerate(item.targets):
                self._by_path.setdefault(path, []).append((item, number))

    def _parts(self, item: Assignment) -> tuple[np.ndarray, ...]:
        """Values of an assignment's targets."""
        if all(path in self._own for path in item.targets):
            whole = [np.asarray(self._own[path]) for path in item.targets]
            return tuple(value if item.index is None else value[item.index] for value in whole)
        values = item.apply(self.source[item.key], self._shapes)
        return tuple(v.astype(self._dtypes[path], copy=False) for path, v in zip(item.targets, values))

    def _read(self, item: Assignment) -> np.ndarray:
        return np.ascontiguousarray(item.op.backward(self._parts(item)))

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
class ExportableModel:
    """A trained model for export.

    Attributes:
      params: path -> value of everything that comes from training and from no pretrained file.
      trainable: which of them the last stage trained.
      towers: pretrained towers (those the format needs) by their names under ``config.weights``.
      sizes: of every tower, by the same names.  paths: where the needed files are.  given: every source as
        the configuration has it.
      made: kind of part -> keyword arguments that its module was made with.
      num_vokens: of an image.  tokens: of the language model, where the format needs them.
      caption_ids: special ids of the generator's tokenizer in Hugging Face field names.
      voken_state_shift: 1 if the states before the vokens feed the mapper, 0 for those on them.
      dtype: of frozen weights.  step: updates done.  epoch: as the original counts it, 0 for runs of ours.
      hyper_parameters: of the run, under the original's names; an imported release keeps its own.
      writers: format -> how the parts of this model write it, for formats that hold others.
    """

    params: Mapping[str, np.ndarray]
    trainable: frozenset[str]
    towers: Mapping[str, PretrainedTower]
    sizes: Mapping[str, Any]
    paths: Mapping[str, Path]
    given: Mapping[str, str]
    made: Mapping[str, Mapping[str, Any]]
    num_vokens: int
    tokens: Tokens | None
    caption_ids: Mapping[str, int]
    voken_state_shift: int
    dtype: np.dtype
    step: int
    hyper_parameters: Mapping[str, Any]
    writers: Mapping[str, Callable[..., int]]
    epoch: int = 0

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """Trained parameters below ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.params.items() if k.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The LLaMA of an exportable model.

    Attributes:
      model: the whole.  source: its name under ``config.weights``.  at: start of its paths.
      lora, prefix: how it was tuned in stage 2.
    """

    model: ExportableModel
    source: str
    at: str
    lora: LoraConfig | None = None
    prefix: PrefixConfig | None = None

    @property
    def tower(self) -> PretrainedTower:
        """Its pretrained tensors."""
        return self.model.towers[self.source]

    @property
    def sizes(self) -> Any:
        """Its sizes."""
        return self.model.sizes[self.source]

    @property
    def table_decay(self) -> str:
        """Path of the share that weight decay took off its frozen tables, where a run has one (Q3)."""
        return f"{self.at}table_decay"

    def table(self, key: str, dtype: Any = np.float32) -> np.ndarray:
        """A table of words under its Hugging Face name: old rows, then new ones, [V + n, d]."""
        new = self.model.params[f"{self.at}{WORD_TABLES[key]}/voken"]
        return np.concatenate([self.old_rows(key, dtype), new.astype(dtype)])

    def old_rows(self, key: str, dtype: Any = np.float32) -> np.ndarray:
        """The same without the new rows, as weight decay left them (Q3)."""
        rows, decay = self.tower[key], self.model.params.get(self.table_decay)
        if decay is not None:
            rows = rows.astype(np.float32) * (1 - np.float32(decay))
        return rows.astype(dtype, copy=False)
