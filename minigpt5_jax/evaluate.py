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
from collections.abc import Sequence

from absl import app, flags

from minigpt5_jax import cli
from minigpt5_jax.config import get_config
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.evaluation.suite.evaluate import Request, evaluate, summary
from minigpt5_jax.evaluation.suite.protocols import PROTOCOLS, TASKS

CHECKPOINT = cli.define_path("checkpoint", None, "A run to generate from: --workdir or checkpoints folder.")
COUNT = flags.DEFINE_integer(
    "count", None, "Samples of the run's validation data; all by default.", lower_bound=1
)
PREDICTIONS = cli.define_path("predictions", None, "Folder with conversations.jsonl and its images.")
REFERENCES = cli.define_path("references", None, "JSONL of pairs, stories or dialogues.")
PROTOCOL = flags.DEFINE_enum("protocol", "standard", list(PROTOCOLS), "Whose scores.")
TASK = flags.DEFINE_enum("task", None, list(TASKS), "What is scored; by default as the data are.")
CONTEXT = flags.DEFINE_enum("context", "image+text", list(CONTEXTS), "last_step: what is read before it.")
METRICS = flags.DEFINE_list("metrics", [], "Names; those of the protocol by default.")
WEIGHTS = flags.DEFINE_multi_string(
    "weights",
    [],
    "NAME=PATH of a network of metrics (inception, clip_l14, clip_b32, clip_l14_336, sbert, wordnet), or of "
    "a source of the run that moved.",
)
SWITCH = flags.DEFINE_multi_string("switch", [], "NAME=VALUE in place of the protocol's.")
REAL_IMAGES = cli.define_path(
    "real_images", None, "Folder of real images for FID; the references by default."
)
REAL_STATS = cli.define_path("real_stats", None, "MiniGPT-5's fid_real_feaures.pt, in the place of images.")
FEATURES = cli.define_path("features", None, "Folder of cached features; OUTPUT/features by default.")
AGAINST = cli.define_path("against", None, "--output of another evaluation, to compare with.")
PAPER_ROW = flags.DEFINE_string("paper_row", "minigpt5", "Row of the papers' tables to print beside.")
OUTPUT = cli.define_path("output", "evaluation", "Folder of the results.")
ALLOW_SKIPS = flags.DEFINE_boolean("allow_skips", False, "Skipped metrics of --metrics are no failure.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
SEED = flags.DEFINE_integer("seed", 0, "Of the answers.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Answers made together at most.", lower_bound=1)
INFERENCE = flags.DEFINE_multi_string("inference", [], "KEY=VALUE in place of the run's inference.KEY.")

DATA = flags.DEFINE_multi_string(
    "data",
    [],
    "KEY=VALUE in place of the run's data.KEY, for example validation=FILE: other data than its own.",
)


def command() -> int:
    """What the flags ask for; the exit status."""
    cli.check_writable(OUTPUT.value)
    cli.set_compile_cache(get_config())
    request = Request(
        output=OUTPUT.value,
        protocol=PROTOCOL.value,
        checkpoint=CHECKPOINT.value,
        count=COUNT.value,
        predictions=PREDICTIONS.value,
        references=REFERENCES.value,
        task=TASK.value,
        context=CONTEXT.value,
        metrics=METRICS.value,
        weights=cli.sources(WEIGHTS.value),
        switches=cli.pairs(SWITCH.value, "switch"),
        real_images=REAL_IMAGES.value,
        real_stats=REAL_STATS.value,
        features=FEATURES.value,
        against=AGAINST.value,
        paper_row=PAPER_ROW.value,
        step=STEP.value,
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        inference=cli.pairs(INFERENCE.value, "inference"),
        data=cli.pairs(DATA.value, "data"),
    )
    line = summary(evaluate(request, cli.tell))
    print(json.dumps(line))
    return int(bool(METRICS.value and line["skipped"] and not ALLOW_SKIPS.value))


def main(argv: Sequence[str]) -> None:
    """Evaluate, or say what is wrong in a line."""
    status: list[int] = []
    cli.guarded(
        lambda: status.append(command()),
        stopped="stopped; the same command goes on where this one was",
    )
    sys.exit(status[0])


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
