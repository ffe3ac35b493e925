"""Take a trained model away to PyTorch.

    python -m minigpt5_jax.export --checkpoint runs/mine --to minigpt5 --output stage1.ckpt
    python -m minigpt5_jax.export --checkpoint runs/mine --to transformers --output vicuna

Formats (docs/export.md shows how each is loaded):

    minigpt5      the original's Lightning checkpoint, stage 1 or 2; needs torch
    peft          LoRA adapter with the resized tables
    transformers  LLaMA with the new rows, LoRA folded in, and its tokenizer
    mapper        the feature mapper and its PyTorch module (also called safetensors)
    diffusers     Stable Diffusion pipeline, the mapper beside it, an example of both

Pretrained weights are read again from their sources, one tensor at a time, and refused if they are not those
the run was trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.parts.contracts import Export, shipped
from minigpt5_jax.weights.export.model import ExportError
from minigpt5_jax.wiring.export_view import formats_of, read_exportable
from minigpt5_jax.wiring.restore import open_run

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
      path: file or folder.  tensors: number of them.  files: size of each file in bytes.
    """

    path: Path
    tensors: int
    files: Mapping[str, int]

    def __str__(self) -> str:
        rows = [f"  {size:>14,}  {name}" for name, size in self.files.items()]
        total = f"{self.path}: {self.tensors} tensors, {len(rows)} files, {sum(self.files.values()):,} bytes"
        return "\n".join([total, *rows])


def export_torch(
    checkpoint: str | Path,
    output: str | Path,
    *,
    to: str,
    step: int | None = None,
    weights: Mapping[str, str] | None = None,
    dtype: str | None = None,
    merge: bool | None = None,
    stage: int | None = None,
) -> ExportResult:
    """Write a trained model for PyTorch.

    Args:
      checkpoint: a run's workdir or its ``checkpoints`` folder.
      output: file (``minigpt5``) or folder to make; it must not exist.
      to: format, one of those of the model's parts (``Part.exports``).
      step: which checkpoint; the newest by default.
      weights: source paths that differ from those of the run, by their names under ``config.weights``.
      dtype: of floating tensors; by default float32 for what was trained and the run's
        ``model.param_dtype`` for whole towers.  Not for ``minigpt5``, which is float32.
      merge: ``transformers``: fold LoRA into the projections (the default).
      stage: ``minigpt5``: write the tensors of that stage; by default those that this run trained.

    Raises:
      ExportError: unknown format, an option it does not take, or a model it has no place for.
      CheckpointError: nothing there, or other frozen weights or tokenizer than the run had.
      ConfigError: a source of pretrained weights is missing.
      FileExistsError: ``output`` is there.
    """
    run = open_run(checkpoint, step=step, weights=weights)
    format_ = _choose(to, Path(output).expanduser(), formats_of(run.config))
    options = {"dtype": _dtype(dtype), "merge": merge, "stage": stage}
    given = {name: value for name, value in options.items() if value is not None}
    if refused := [name for name in given if name not in format_.options]:
        takes = ", ".join(format_.options)
        raise ExportError(f"format {to!r} has no option {refused[0]!r}; it takes {takes}")
    path = Path(output).expanduser().absolute()
    with _new(path, format_) as place:
        tensors = format_.write(read_exportable(run, format_.needs), place, **given)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    folder = path.parent if path.is_file() else path
    return ExportResult(path, tensors, {str(file.relative_to(folder)): file.stat().st_size for file in files})


def _choose(to: str, path: Path, formats: Mapping[str, Export]) -> Export:
    if to not in formats:
        elsewhere = [part.name for part in shipped() if to in part.exports]
        known = f"known for this model: {', '.join(formats) or 'none'}"
        if elsewhere:
            raise ExportError(f"this model has no format {to!r} ({', '.join(elsewhere)} has); {known}")
        raise ExportError(f"unknown format {to!r}; {known}")
    if formats[to].suffix and path.suffix != formats[to].suffix:
        raise ExportError(f"{to!r} writes one file: give --output NAME{formats[to].suffix}, not {path}")
    return formats[to]


def _dtype(name: str | None) -> Any:
    if name is not None and name not in DTYPES:
        raise ExportError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    return None if name is None else jnp.dtype(name)


@contextlib.contextmanager
def _new(path: Path, format_: Export) -> Iterator[Path]:
    """A place to write to that gets the name ``path`` when all is written, or vanishes."""
    if path.exists():
        raise FileExistsError(f"{path} is already there; delete it or choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        place = partial / path.name if format_.suffix else partial
        yield place
        place.chmod(0o755 if place.is_dir() else 0o644)  # mkdtemp makes folders private
        place.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def define_flags() -> None:
    """The flags of this command."""
    cli.define_path("checkpoint", None, "a run's --workdir, or its checkpoints folder", required=True)
    flags.DEFINE_string("to", None, "format, see above", required=True)
    cli.define_path("output", None, "file (minigpt5) or folder to make", required=True)
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default")
    flags.DEFINE_multi_string("weights", [], "NAME=PATH where a source of frozen weights moved")
    flags.DEFINE_enum("dtype", None, DTYPES, "of floating tensors, where the format leaves a choice")
    flags.DEFINE_boolean("merge", None, "transformers: fold LoRA in (default); --nomerge: leave it out")
    flags.DEFINE_enum("stage", None, ["1", "2"], "minigpt5: tensors of that stage; default: of this run's")


def main(argv: Sequence[str]) -> None:
    """Export, or say what is wrong in a line."""
    flag = flags.FLAGS

    def command() -> None:
        cli.check_writable(flag.output)
        print(
            export_torch(
                flag.checkpoint,
                flag.output,
                to=flag.to,
                step=flag.step,
                weights=cli.sources(flag.weights),
                dtype=flag.dtype,
                merge=flag.merge,
                stage=int(flag.stage) if flag.stage else None,
            )
        )

    cli.guarded(command)


if __name__ == "__main__":
    define_flags()
    cli.start(main)
