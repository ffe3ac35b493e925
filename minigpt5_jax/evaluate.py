"""Score a run, or predictions of any program, by the metrics of the papers or those of today.

    python -m minigpt5_jax.evaluate --checkpoint runs/demo --protocol standard --count 32 --output runs/eval
    python -m minigpt5_jax.evaluate --predictions DIR --references FILE.jsonl --protocol paper --output out \\
        --weights inception=pt_inception-2015-12-05-6726825d.pth --weights clip_l14=clip-vit-large-patch14

Writes results.json, per_sample.jsonl, per_group.jsonl and report.html, and prints one JSON line with
``metrics``, ``skipped`` and ``n``.  A stopped evaluation goes on with the same command.  docs/evaluation.md
has the form of predictions, what each metric and switch is, and the command of every row of the papers.

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

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import get_config
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.suite.evaluate import Request, evaluate, summary
from minigpt5_jax.evaluation.suite.protocols import PROTOCOLS, TASKS


def define_flags() -> tuple[flags.FlagHolder, ...]:
    """The flags of the command."""
    return (
        cli.define_path("checkpoint", None, "A run to generate from: --workdir or checkpoints folder."),
        flags.DEFINE_integer(
            "count", None, "Samples of the run's validation data; all by default.", lower_bound=1
        ),
        cli.define_path("predictions", None, "Folder with conversations.jsonl and its images."),
        cli.define_path("references", None, "JSONL of pairs, stories or dialogues."),
        flags.DEFINE_enum("protocol", "standard", list(PROTOCOLS), "Whose scores."),
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
        flags.DEFINE_integer("seed", 0, "Of the answers.", lower_bound=0),
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


def main() -> None:
    """Command line."""
    holders = define_flags()

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

    statuses: list[int] = []
    stopped = "stopped; the same command goes on where this one was"
    cli.start(lambda _: (cli.guarded(run, stopped), sys.exit(statuses[0])))


if __name__ == "__main__":
    main()
