"""Weights in: published files -> folders and checkpoints that this package takes, and a look at them.

    python -m minigpt5_jax.convert plan --config configs/stage1.py
    python -m minigpt5_jax.convert llm vicuna-7b --output weights/llm
    python -m minigpt5_jax.convert vit eva_vit_g.pth --output weights/vit
    python -m minigpt5_jax.convert qformer blip2_pretrained_flant5xxl.pth --output weights/qformer
    python -m minigpt5_jax.convert llama_proj prerained_minigpt4_7b.pth --output weights/llama_proj
    python -m minigpt5_jax.convert stable_diffusion stable-diffusion-2-1-base --output weights/sd
    python -m minigpt5_jax.convert minigpt5 --stage1 stage1_cc3m.ckpt --stage2 stage2_vist.ckpt \\
        --config configs/stage2_vist.py:release_2023_10 --workdir runs/released
    python -m minigpt5_jax.convert verify --checkpoint runs/released

Every tensor of a file is used or named with the reason why not; the table of both is printed and stored as
``coverage.json``.  The whole way: docs/weights.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.frozen_sources import check_scheduler
from minigpt5_jax.pretrained import import_release, save_imported
from minigpt5_jax.profiles import PROFILES
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.verify import VerificationError, verify
from minigpt5_jax.weights import rewrite
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.hub import resolve
from minigpt5_jax.weights.importer import Coverage, open_source, read_sizes
from minigpt5_jax.weights.load import open_weights
from minigpt5_jax.weights.release import ROWS
from minigpt5_jax.weights.sources import STABLE_DIFFUSION
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.weights_plan import make_plan

SINGLE = ("vit", "qformer", "llama_proj")
COMMANDS = ("plan", "llm", *SINGLE, "stable_diffusion", "minigpt5", "verify")

OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
SIZES = flags.DEFINE_string(
    "sizes",
    None,
    "config.json (stable_diffusion: folder) with sizes other than MiniGPT-5's; 'source': that of the source.",
)
KEEP_ROWS = flags.DEFINE_boolean(
    "keep_rows", False, "llm: keep rows that its tokenizer has no entry for, such as [PAD]."
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "stable_diffusion of one file: CLIP's tokenizer.")
STAGE1 = flags.DEFINE_string("stage1", None, "minigpt5: stage-1 file.")
STAGE2 = flags.DEFINE_string("stage2", None, "minigpt5: stage-2 file, laid on top of it.")
PROFILE = flags.DEFINE_enum(
    "profile", None, [name for name in PROFILES if "=" not in name], "minigpt5: code generation of the files."
)
TABLE_ROWS = flags.DEFINE_enum(
    "rows", "vokens", ROWS, "minigpt5: new rows only, or whole tables, as weight decay left them."
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "verify: a run's --workdir, or its checkpoints folder.")
SAVED_WEIGHTS = flags.DEFINE_multi_string("weights", [], "verify: NAME=PATH where a source moved.")

USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    WeightFileError,
    WeightTableError,
    VerificationError,
    OSError,
)


def convert_source(name: str, given: str, output: Path) -> list[Coverage]:
    """Rewrite a published source as a folder.

    Args:
      name: as under ``config.weights``.  given: file, folder or Hugging Face id.

    Raises:
      WeightFileError, WeightTableError, FileExistsError: as their messages say; no folder is left then.
    """
    source = resolve(given, STABLE_DIFFUSION.include) if name == "stable_diffusion" else resolve(given)
    with rewrite.new_folder(output) as folder:
        if name == "llm":
            if SIZES.value is None:
                rewrite.require_preset("llm", read_sizes("llm", source / "config.json"))
            weights = open_source("llm", source)
            return [rewrite.write_llm(weights, source, folder, keep_rows=KEEP_ROWS.value)]
        if name == "stable_diffusion":
            return _diffusion(source, folder)
        sizes = read_sizes(name, _sizes_file(source))
        if SIZES.value is None:
            rewrite.require_preset(name, sizes)
        return [rewrite.write_tower(name, open_source(name, source), sizes, folder)]


def _sizes_file(source: Path) -> Path | None:
    """The config.json with the sizes of a source; None for the preset."""
    if SIZES.value not in (None, "source"):
        return Path(SIZES.value)
    beside = source / "config.json" if source.is_dir() else source.parent / "config.json"
    if SIZES.value == "source" or (source.is_dir() and beside.is_file()):
        return beside
    return None


def _diffusion(source: Path, folder: Path) -> list[Coverage]:
    if source.is_dir():
        check_scheduler(source / "scheduler/scheduler_config.json")
        return rewrite.write_diffusers(source, folder, any_size=SIZES.value is not None)
    if TOKENIZER.value is None:
        raise ConfigError("one file holds no tokenizer: give --tokenizer FOLDER (vocab.json, merges.txt)")
    torch = source.suffix != ".safetensors"
    weights = open_weights(source, "state_dict" if torch else None)
    sizes = Path(SIZES.value) if SIZES.value not in (None, "source") else None
    return rewrite.write_single_file(weights, Path(TOKENIZER.value), folder, sizes)


def convert_release() -> Path:
    """The original's checkpoints as one of ours.

    Raises:
      ConfigError, WeightFileError, WeightTableError, CheckpointError: as their messages say.
    """
    if not STAGE1.value:
        raise ConfigError(
            "give the stage-1 file: --stage1 FILE (a stage-2 file holds no fc and no decoder prompt)"
        )
    config = cli.load()
    if PROFILE.value:
        PROFILES[PROFILE.value](config)
    if not config.run.workdir:
        raise ConfigError("give the folder of the checkpoint: --workdir DIR")
    imported = import_release(config, STAGE1.value, STAGE2.value, rows=TABLE_ROWS.value)
    for file, about in imported.about.items():
        print(f"{file} says of itself: {json.dumps(about)}")
    for coverage in imported.release.coverage:
        print(coverage)
    first, data = imported.release.vocab_size, config.data
    rows = first + config.model.backbone.num_vokens + 1
    print(f"V = {rows}, [IMG0] is id {first}; BOS {data.bos_id}, prompts {data.prompt_set!r}")
    for path, (factor, rest) in imported.release.decay.items():
        print(f"old rows of {path}: {factor:.5f} times those of weights.llm, {rest:.2%} left over")
    return save_imported(imported, config.run.workdir)


def main(argv: Sequence[str]) -> None:
    """The command."""
    cli.quiet()
    command, given = [*argv[1:], None, None][:2]
    try:
        if command not in COMMANDS:
            raise ConfigError(f"give one of {', '.join(COMMANDS)}, not {command!r}")
        if command == "plan":
            print(make_plan(cli.load()))
        elif command == "minigpt5":
            print(f"written: {convert_release()}")
        elif command == "verify":
            if not CHECKPOINT.value:
                raise ConfigError("give a run: --checkpoint DIR")
            print(verify(CHECKPOINT.value, weights=cli.pairs(SAVED_WEIGHTS.value, "weights")))
        else:
            if not (given and OUTPUT.value):
                raise ConfigError(f"give what to read and where to write: {command} PATH --output DIR")
            output = Path(OUTPUT.value).expanduser()
            print(*convert_source(command, given, output), f"written: {output}", sep="\n")
    except USER_ERRORS as error:
        cli.fail(str(error))
    except KeyboardInterrupt:
        cli.fail("stopped; what was half written does not count, the same command begins anew")


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: cli.parse(argv, words=2))
