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

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import PROFILES, ConfigError
from minigpt5_jax.evaluation.verify import verify
from minigpt5_jax.parts.contracts import ConvertOptions, Origin, shipped
from minigpt5_jax.weights.check import Coverage
from minigpt5_jax.weights.foreign.release import ROWS
from minigpt5_jax.weights.foreign.rewrite import new_folder
from minigpt5_jax.weights.formats.hub import PATTERNS, resolve
from minigpt5_jax.wiring.pretrained import import_release, save_imported
from minigpt5_jax.wiring.weights_plan import make_plan

OTHERS = ("plan", "minigpt5", "verify")
"""Commands besides those that rewrite what a part is made of."""

OUTPUT = cli.define_path("output", None, "Folder to make.")
SIZES = cli.define_path(
    "sizes",
    None,
    "config.json (stable_diffusion: folder) with sizes other than MiniGPT-5's; 'source': that of the source.",
)
KEEP_ROWS = flags.DEFINE_boolean(
    "keep_rows", False, "llm: keep rows that its tokenizer has no entry for, such as [PAD]."
)
TOKENIZER = cli.define_path("tokenizer", None, "stable_diffusion of one file: CLIP's tokenizer.")
STAGE1 = cli.define_path("stage1", None, "minigpt5: stage-1 file.")
STAGE2 = cli.define_path("stage2", None, "minigpt5: stage-2 file, laid on top of it.")
PROFILE = flags.DEFINE_enum(
    "profile", None, [name for name in PROFILES if "=" not in name], "minigpt5: code generation of the files."
)
TABLE_ROWS = flags.DEFINE_enum(
    "rows", "vokens", ROWS, "minigpt5: new rows only, or whole tables, as weight decay left them."
)
CHECKPOINT = cli.define_path("checkpoint", None, "verify: a run's --workdir, or its checkpoints folder.")
SAVED_WEIGHTS = flags.DEFINE_multi_string("weights", [], "verify: NAME=PATH where a source moved.")


def origins() -> dict[str, Origin]:
    """Command -> what it converts, of every part that ships."""
    return {
        use.origin.command: use.origin
        for part in shipped()
        for use in part.uses.values()
        if use.origin.convert is not None
    }


def convert_source(origin: Origin, given: str, output: Path, options: ConvertOptions) -> list[Coverage]:
    """Rewrite a published source as a folder.

    Args:
      origin: what it is.  given: file, folder or Hugging Face id.

    Raises:
      WeightFileError, WeightTableError, FileExistsError: as their messages say; no folder is left then.
    """
    source = resolve(given, origin.include or PATTERNS)
    with new_folder(output) as folder:
        return origin.convert(source, folder, options)


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
    cli.check_writable(config.run.workdir, "workdir")
    imported = import_release(config, STAGE1.value, STAGE2.value, rows=TABLE_ROWS.value)
    for file, about in imported.about.items():
        print(f"{file} says of itself: {json.dumps(about)}")
    for coverage in imported.release.coverage:
        print(coverage)
    first, data = imported.release.vocab_size, config.data
    rows = first + imported.run.spec.backbone.num_vokens + 1
    print(f"V = {rows}, [IMG0] is id {first}; BOS {data.bos_id}, prompts {data.prompt_set!r}")
    for path, (factor, rest) in imported.release.decay.items():
        print(f"old rows of {path}: {factor:.5f} times those of weights.llm, {rest:.2%} left over")
    return save_imported(imported, config.run.workdir)


def run(command: str | None, given: str | None) -> None:
    """One command."""
    known = origins()
    if command == "plan":
        print(make_plan(cli.load()))
    elif command == "minigpt5":
        print(f"written: {convert_release()}")
    elif command == "verify":
        if not CHECKPOINT.value:
            raise ConfigError("give a run: --checkpoint DIR")
        print(verify(CHECKPOINT.value, weights=cli.sources(SAVED_WEIGHTS.value)))
    elif command not in known:
        raise ConfigError(f"give one of {', '.join((*known, *OTHERS))}, not {command!r}")
    else:
        if not (given and OUTPUT.value):
            raise ConfigError(f"give what to read and where to write: {command} PATH --output DIR")
        output = Path(cli.check_writable(OUTPUT.value))
        options = ConvertOptions(SIZES.value, KEEP_ROWS.value, TOKENIZER.value)
        print(*convert_source(known[command], given, output, options), f"written: {output}", sep="\n")


def main(argv: Sequence[str]) -> None:
    """The command."""
    command, given = [*argv[1:], None, None][:2]
    cli.guarded(
        functools.partial(run, command, given),
        "stopped; what was half written does not count, the same command starts over",
    )


if __name__ == "__main__":
    cli.start(main, words=2)
