"""Score a run, or predictions of any program, by the metrics of the papers or those of today.

    python -m minigpt5_jax.evaluate --checkpoint runs/demo --protocol standard --count 32 --output runs/eval
    python -m minigpt5_jax.evaluate --predictions DIR --references FILE.jsonl --protocol paper --output out \\
        --weights inception=pt_inception-2015-12-05-6726825d.pth --weights clip_l14=clip-vit-large-patch14

    python -m minigpt5_jax.evaluate human make --references FILE.jsonl --system ours=DIR --system other=DIR \\
        --output study
    python -m minigpt5_jax.evaluate human merge --study study --answers FOLDER
    python -m minigpt5_jax.evaluate human report --study study
    python -m minigpt5_jax.evaluate benchmark prompts --benchmark geneval --references FILE --output p.jsonl

The first two evaluate.  ``human`` is the study with people: a page for raters, their answers, what follows.
``benchmark prompts | layout | requests | score`` run a benchmark of another project: geneval,
dpg_bench, opening, isg_bench, mmie, comm_task1 to comm_task4.

Evaluating writes results.json, per_sample.jsonl, per_group.jsonl and report.html, and prints one JSON line
with ``metrics``, ``skipped`` and ``n``.  A stopped evaluation goes on with the same command.
docs/evaluation.md has the form of predictions, what each metric and switch is, and the command of every row
of the papers.

Protocols: ``paper`` scores as MiniGPT-5's code did, quirks included; ``standard`` as the field does today.

Tasks: pairs (CC3M), stories, last_step (with --context) and narration (VIST), dialogs (MMDialog, own
records).

Metrics: clip_i clip_t clip_score clip_score_captioning fid fid_per_story kid inception_score cmmd bleu_1
bleu_2 sacrebleu rouge_l meteor cider_d s_bert mm_relevance image_precision
image_recall image_f1 image_exact; of the small world oracle_all oracle_background oracle_shape oracle_colour
oracle_size oracle_texture oracle_place.

Without --metrics everything is computed that can be, and the rest is skipped with the reason.  A metric of
--metrics that is skipped ends the command with status 1, unless --allow_skips.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.benchmarks import run as benchmarks
from minigpt5_jax.evaluation.benchmarks.contract import NAMES
from minigpt5_jax.evaluation.human.answers import merge
from minigpt5_jax.evaluation.human.make import Plan, make
from minigpt5_jax.evaluation.human.questions import QUESTIONS
from minigpt5_jax.evaluation.human.report import report
from minigpt5_jax.evaluation.suite.evaluate import Request, evaluate, summary
from minigpt5_jax.evaluation.suite.protocols import PROTOCOLS, TASKS

STEPS = {"human": ("make", "merge", "report"), "benchmark": benchmarks.STEPS}
"""Words that the command takes."""


def define_flags() -> tuple[flags.FlagHolder, ...]:
    """The flags of the command."""
    return (
        cli.define_path("checkpoint", None, "A run to generate from: --workdir or checkpoints folder."),
        flags.DEFINE_integer(
            "count", None, "Samples of the run's validation data; all by default.", lower_bound=1
        ),
        cli.define_path("predictions", None, "Folder with conversations.jsonl and its images."),
        cli.define_path("references", None, "JSONL of pairs, stories or dialogues."),
        flags.DEFINE_enum("protocol", "standard", list(PROTOCOLS), "Whose way of scoring is followed."),
        flags.DEFINE_enum("task", None, list(TASKS), "What is scored; by default as the data are."),
        flags.DEFINE_enum("context", "image+text", list(CONTEXTS), "last_step: what is read before it."),
        flags.DEFINE_list("metrics", [], "Names; those of the protocol by default."),
        flags.DEFINE_multi_string(
            "weights",
            [],
            "NAME=PATH of a network of metrics (inception, clip_l14, clip_b32, clip_l14_336, sbert, wordnet) "
            "or of a source of the run that moved.",
        ),
        flags.DEFINE_multi_string("switch", [], "NAME=VALUE in place of the protocol's."),
        cli.define_path("real_images", None, "Folder of real images for FID; the references by default."),
        cli.define_path("real_stats", None, "MiniGPT-5's fid_real_feaures.pt, in the place of images."),
        cli.define_path("features", None, "Folder of cached features; OUTPUT/features by default."),
        cli.define_path("against", None, "--output of another evaluation, to compare with."),
        flags.DEFINE_string("paper_row", "minigpt5", "Row of the papers' tables to print beside."),
        cli.define_path("output", "evaluation", "Folder of the results."),
        flags.DEFINE_boolean("allow_skips", False, "Skipped metrics of --metrics are no failure."),
        flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default."),
        flags.DEFINE_integer(
            "seed",
            0,
            "Seed of the answers.  human make draws a secret one where none is given.",
            lower_bound=0,
        ),
        flags.DEFINE_integer("batch_size", 16, "Answers made together at most.", lower_bound=1),
        flags.DEFINE_multi_string("inference", [], "KEY=VALUE in place of the run's inference.KEY."),
        flags.DEFINE_multi_string(
            "data",
            [],
            "KEY=VALUE in place of the run's data.KEY, for example validation=FILE: other data than its own.",
        ),
        flags.DEFINE_boolean(
            "allow_outside_images",
            False,
            "Image paths of --predictions and --references may lead out of their folders.",
        ),
    )


def command(request: Request, allow_skips: bool = False) -> int:
    """Evaluates and prints the JSON line; the exit status.

    Raises:
      ConfigError, DataError, CheckpointError, WeightFileError, WeightTableError, OSError: as their messages
        say.
    """
    cli.check_writable(request.output)
    cli.set_compile_cache(get_config())
    line = summary(evaluate(request, cli.tell))
    print(json.dumps(line))
    return int(bool(request.metrics and line["skipped"] and not allow_skips))


def define_human_flags() -> None:
    """The flags of ``human``; it shares --references, --count, --seed and --output."""
    flags.DEFINE_multi_string("system", [], "human make: NAME=DIR of predictions, two of them.")
    flags.DEFINE_list("questions", list(QUESTIONS), "human make: what is asked.")
    flags.DEFINE_integer("judgements", 3, "human make: raters of each item.", lower_bound=1)
    flags.DEFINE_integer("per_rater", 50, "human make: items of a rater at most.", lower_bound=1)
    cli.define_path("introduction", None, "human make: file with the text before the first item.")
    flags.DEFINE_boolean("inline", True, "human make: images inside the page.")
    flags.DEFINE_string("base_url", None, "human make: https address where the page will be, for exports.")
    flags.DEFINE_string("completion_code", "", "human make: shown to raters at the end.")
    cli.define_path("study", None, "human merge, report: --output of human make.")
    cli.define_path(
        "answers",
        None,
        "human merge: file or folder of answers; may be repeated.  benchmark score: replies of a judge, or "
        "what the benchmark's program wrote.",
        multi=True,
    )


def define_benchmark_flags() -> None:
    """The flags of ``benchmark``; it shares --references, --predictions, --answers and --output."""
    flags.DEFINE_enum("benchmark", None, list(NAMES), "benchmark: whose files --references are.")
    flags.DEFINE_string("judge", "", "benchmark requests, score: the model that judges.")
    cli.define_path("instructions", None, "benchmark requests, score: the benchmark's own to its judge.")


def benchmark(step: str) -> dict[str, Any]:
    """One step of a benchmark; what it prints.

    Raises:
      ConfigError, DataError, OSError: as their messages say.
    """
    flag = flags.FLAGS
    if step != "score" and not flag["output"].present:
        raise ConfigError("give where to write: --output PATH")
    cli.check_writable(flag.output)
    task = benchmarks.Task(
        flag.benchmark,
        flag.references,
        flag.output,
        flag.predictions,
        flag.answers,
        flag.judge,
        flag.instructions,
        flag.allow_outside_images,
    )
    return benchmarks.run(step, task)


def human(step: str) -> dict[str, Any]:
    """One step of the study with people; what it prints.

    Raises:
      ConfigError, DataError, OSError: as their messages say.
    """
    flag = flags.FLAGS
    if step != "make" and not flag.study:
        raise ConfigError("give a study: --study DIR, the --output of `human make`")
    if step == "merge":
        return merge(flag.study, flag.answers)
    if step == "report":
        found = report(flag.study)
        rates = {
            name: entry["win_rate"]["without_ties"]["value"] for name, entry in found["questions"].items()
        }
        return {"win_rate": rates, "n_items": found["n_items"], "n_raters": found["n_raters"]}
    if not (flag.references and flag["output"].present):
        raise ConfigError("give --references FILE, --system NAME=DIR twice, and --output DIR")
    cli.check_writable(flag.output)
    shared = ("references", "output", "count", "seed", "allow_outside_images")
    own = ("judgements", "per_rater", "questions", "introduction", "inline", "base_url", "completion_code")
    values = {name: flag[name].value for name in (*shared, *own)}
    if not flag["seed"].present:
        values["seed"] = None
    return make(Plan(systems=cli.folders(flag.system, "system"), **values))


def main() -> None:
    """Command line."""
    holders = define_flags()
    define_human_flags()
    define_benchmark_flags()

    def run() -> None:
        values = {holder.name: holder.value for holder in holders}
        values |= {
            "weights": cli.sources(values["weights"]),
            "switches": cli.pairs(values.pop("switch"), "switch"),
            "inference": cli.pairs(values["inference"], "inference"),
            "data": cli.pairs(values["data"], "data"),
        }
        allow_skips = values.pop("allow_skips")
        statuses.append(command(Request(**values), allow_skips))

    def start(argv: Sequence[str]) -> None:
        if len(argv) == 1:
            cli.guarded(run, "stopped; the same command goes on where this one was")
            sys.exit(statuses[0])
        if len(argv) != 3 or argv[2] not in STEPS.get(argv[1], ()):
            words = " | ".join(f"{word} {{{'|'.join(steps)}}}" for word, steps in STEPS.items())
            cli.fail(f"usage: python -m minigpt5_jax.evaluate [{words}]\n{cli.LIST_FLAGS}")
        step = {"human": human, "benchmark": benchmark}[argv[1]]
        cli.guarded(lambda: print(json.dumps(step(argv[2]))))

    statuses: list[int] = []
    cli.start(start, words=2)


if __name__ == "__main__":
    main()
