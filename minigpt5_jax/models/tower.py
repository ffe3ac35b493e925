"""The record of an architecture: its sizes, its module, and everything that is true of its files.

Each folder of ``models/`` ends in one, ``TOWER`` in its ``weights.py``.  Whatever reads or writes a tower's
files (training, ``convert``, ``load_pretrained``, ``export``) goes through it, so all of them accept the same
files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json
from minigpt5_jax.weights.table import Table
from minigpt5_jax.weights.view import Tensors

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tower:
    """One architecture with its files.

    Attributes:
      config: dataclass of its sizes; ``from_hf`` makes one of a ``config.json``.
      presets: name in configurations -> sizes; the first one is MiniGPT-5's.
      module: ``(sizes, rngs, **dtypes) -> nnx.Module``; None for files that hold no tensors.
      table: ``(source keys, sizes)`` -> rules that fit these keys.
      adapt: ``(source, sizes)`` -> source in the form the table reads (old names, another grid).
      shapes_of: ``sizes`` -> path -> shape of every parameter a file must give; those of ``module`` by
        default.
      marks: name prefixes that only this tower's tensors have; they identify what a file holds.
      cause: ``(source, shape of a key)`` -> what a file that does not fit probably is, '' for no idea.
      key: where in a torch container its tensors are; None for a plain dictionary.
      published: values of a published ``config.json`` -> values that ``config`` understands.
      describe: ``sizes`` -> what a ``config.json`` says of it.
      library, class_name: the PyTorch class that a diffusers folder names for it.
      file, config_file: of weights and of sizes in a folder of its own.
      bare_prefix: start of published names that some sources leave out.
    """

    config: Any
    presets: Mapping[str, Any]
    module: Callable[..., nnx.Module] | None = None
    table: Callable[[Iterable[str], Any], Table] | None = None
    adapt: Callable[[Tensors, Any], Tensors] = lambda source, _: source
    shapes_of: Callable[[Any], Shapes] | None = None
    marks: tuple[str, ...] = ()
    cause: Callable[[Tensors, Callable[[str], tuple[int, ...]]], str] = lambda source, shape: ""
    key: str | None = None
    published: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    describe: Callable[[Any], dict[str, Any]] = dataclasses.asdict
    library: str = ""
    class_name: str = ""
    file: str = "model.safetensors"
    config_file: str = "config.json"
    bare_prefix: str = ""

    @property
    def preset(self) -> Any:
        """MiniGPT-5's sizes."""
        return next(iter(self.presets.values()))

    @functools.lru_cache(maxsize=8)  # noqa: B019  (towers live as long as the program)
    def shapes(self, sizes: Any) -> Shapes:
        """Path -> shape of every parameter that a file of these sizes must give."""
        if self.shapes_of is not None:
            return self.shapes_of(sizes)
        return module_shapes(lambda rngs: self.module(sizes, rngs=rngs))

    def read_sizes(self, path: Path | None) -> Any:
        """Sizes from a ``config.json``, or the preset without one.

        Raises:
          WeightFileError: the file is no JSON, or has a value that is not implemented.
        """
        if path is None:
            return self.preset
        try:
            return self.config.from_hf(self.published(read_json(path)))
        except WeightFileError as error:
            raise error if str(path) in str(error) else WeightFileError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightFileError(f"{path}: {error}") from None


def module_shapes(make: Callable[[nnx.Rngs], nnx.Module]) -> Shapes:
    """Path -> shape of every parameter of a module; nothing is allocated."""
    return {path: shape.shape for path, shape in Template.of(make).shapes.items()}


DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
