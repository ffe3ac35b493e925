"""Prepare a data set once, so that training reads it fast, or check your own data before training.

    python -m minigpt5_jax.prepare cc3m --input cc3m_train.tsv --output prepared
    python -m minigpt5_jax.prepare check my_data.jsonl
    python -m minigpt5_jax.prepare features --config configs/stage1.py --output features

The first form writes ArrayRecord files through TFDS, with a report; an interrupted run continues when the
same command is given again.  The second lists what is wrong with a file, line by line, and ends with status
1 where anything is.  The third runs the frozen image towers of a configuration once over its training
samples.  docs/data.md has the whole way for each data set.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.data.errors import DataError, printable
from minigpt5_jax.data.prepare.builders.run import SPLITS, prepare
from minigpt5_jax.data.prepare.builders.shards import Job
from minigpt5_jax.data.prepare.builders.units import UNITS, Raw
from minigpt5_jax.data.prepare.check import check
from minigpt5_jax.data.prepare.checks.files import READERS
from minigpt5_jax.data.prepare.report import write_report
from minigpt5_jax.data.sources.kinds import make_rules
from minigpt5_jax.data.sources.prepared import PreparedSource
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer

USAGE = (
    f"python -m minigpt5_jax.prepare {{{'|'.join(UNITS)}}} --input FILE --output FOLDER, or check PATH, "
    "or features --config FILE --output FOLDER"
)


def tokenizer() -> LlamaTokenizer | None:
    """The tokenizer of the flags; a folder stands for its ``tokenizer.model``."""
    given = flags.FLAGS.tokenizer
    if given is None:
        return None
    path = Path(given)
    return LlamaTokenizer(path / "tokenizer.model" if path.is_dir() else path)


def run_prepare(dataset: str) -> None:
    """Writes a split and its report, and says where they are."""
    flag = flags.FLAGS
    if flag.input is None or flag.output is None:
        raise DataError("--input (the raw data) and --output (a folder) are needed")
    words = tokenizer()  # before hours of work, not after
    cli.check_writable(flag.output)
    job = Job.plan(
        Raw(dataset, flag.input, flag.image_root, flag.mapping, flag.allow_outside_images),
        flag.output,
        split=flag.split,
        num_shards=flag.num_shards,
        letterbox=flag.letterbox,
        error_budget=flag.error_budget,
    )
    folder = prepare(job, beam_runner=flag.beam_runner, beam_options=flag.beam_options)
    count = None if words is None else lambda text: len(words.encode(text))
    # What training leaves out of dialogues is counted in tokens: without a tokenizer, all turns are shown.
    training = flag.split != "test" and (words is not None or dataset != "mmdialog")
    rules = functools.partial(make_rules, training=training)
    source = PreparedSource(folder, flag.split, rules, count_tokens=count)
    page = write_report(source, tokenizer=words)
    skipped = len(source.metadata["tally"]["skipped"])
    print(f"{source.describe()}; {skipped:,} of {job.count:,} units left out; report: {page}")


def run_check(path: str) -> None:
    """Lists what is wrong with a path, and ends with status 1 where anything is."""
    flag = flags.FLAGS
    findings = check(
        path,
        format=flag.format,
        image_root=flag.image_root,
        mapping=flag.mapping,
        allow_outside_images=flag.allow_outside_images,
        tokenizer=tokenizer(),
        max_length=flag.max_length,
        workers=flag.workers,
        show_progress=True,
    )
    for problem in findings.problems[: flag.limit]:
        print(problem)
    if len(findings.problems) > flag.limit:
        print(f"... and {len(findings.problems) - flag.limit:,} more (--limit={flag.limit})")
    print(printable(findings.summary(flag.max_length)))
    if findings.problems:
        sys.exit(1)


def run_features() -> None:
    """Makes the feature store of a configuration's training samples."""
    # JAX and the model are not needed to check or to prepare data.
    from minigpt5_jax.training.distributed import initialize
    from minigpt5_jax.wiring.features import prepare_features
    from minigpt5_jax.wiring.inputs import open_sources
    from minigpt5_jax.wiring.model import tower_sizes

    if flags.FLAGS.output is None:
        raise DataError("--output (a folder for the features) is needed")
    cli.check_writable(flags.FLAGS.output)
    config = cli.load()
    cli.set_compile_cache(config)
    initialize(timeout_s=config.run.join_timeout)
    source, _ = open_sources(config, tower_sizes(config))
    print(prepare_features(config, source, flags.FLAGS.output))


def main(argv: Sequence[str]) -> None:
    """``prepare DATASET``, ``prepare check PATH`` or ``prepare features``."""
    if len(argv) == 2 and argv[1] in UNITS:
        command = functools.partial(run_prepare, argv[1])
    elif len(argv) == 3 and argv[1] == "check":
        command = functools.partial(run_check, os.path.expanduser(argv[2]))
    elif len(argv) == 2 and argv[1] == "features":
        command = run_features
    else:
        cli.fail(f"usage: {USAGE}\n--help lists the flags")
    cli.guarded(command, "stopped; a preparation continues when the same command is given again")


def define_flags() -> None:
    """The flags of this command."""
    cli.define_path("input", None, "raw data: the table of CC3M, the stories of VIST, ...")
    cli.define_path("image_root", None, "folder that image paths are relative to; default: the file's")
    cli.define_path("mapping", None, "VIST's image paths; default: the file beside the stories")
    flags.DEFINE_boolean("allow_outside_images", False, "image paths may lead out of their folder")
    cli.define_path("output", None, "folder the prepared data set is made in")
    flags.DEFINE_enum("split", "train", SPLITS, "what to call this part of the data")
    flags.DEFINE_integer("num_shards", None, "files to write; default: about 128 MiB each", lower_bound=1)
    flags.DEFINE_integer("letterbox", None, "fit images into white squares of that side", lower_bound=1)
    flags.DEFINE_float("error_budget", 0.01, "unusable units allowed: a share below 1, or a count")
    cli.define_path("tokenizer", None, "tokenizer.model (or its folder), for lengths in the report")
    flags.DEFINE_enum("format", None, list(READERS), "check: what the data is; default: guessed")
    flags.DEFINE_integer("max_length", 256, "check: positions of a row, for samples that are too long")
    flags.DEFINE_integer("workers", None, "check: processes that decode; default: by the number of images")
    flags.DEFINE_integer("limit", 100, "check: problems that are listed", lower_bound=0)
    flags.DEFINE_string("beam_runner", None, "write the shards with Apache Beam on this runner")
    flags.DEFINE_multi_string("beam_options", [], "a flag of the runner; may be repeated")


if __name__ == "__main__":
    define_flags()
    cli.start(main, words=2)
