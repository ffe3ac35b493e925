"""An evaluation from its request to its files: predictions, features, scores."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.evaluation.metrics.text import MissingPackageError, open_wordnet
from minigpt5_jax.evaluation.suite import results
from minigpt5_jax.evaluation.suite.features import PUBLISHED, Features
from minigpt5_jax.evaluation.suite.paper import beside
from minigpt5_jax.evaluation.suite.predict import predict
from minigpt5_jax.evaluation.suite.progress import Report
from minigpt5_jax.evaluation.suite.protocols import DRAWN, TASKS, metrics_of, switches_of
from minigpt5_jax.evaluation.suite.references import questions, task_of, with_data, write_references
from minigpt5_jax.evaluation.suite.report import number, range_of, write_report
from minigpt5_jax.evaluation.suite.samples import (
    Reference,
    Sample,
    check_missing,
    join,
    read_predictions,
    read_references,
)
from minigpt5_jax.evaluation.suite.scores import Real, Scorer
from minigpt5_jax.training.owner import Owner
from minigpt5_jax.wiring.restore import open_run
from minigpt5_jax.wiring.used_towers import readable

PREDICTIONS, FEATURES = "predictions", "features"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate; the fields are the flags of the command.

    Attributes:
      output: folder of the results.  protocol: one of the protocols.
      checkpoint: a run to generate from; else ``predictions`` and ``references`` are given.
      count: samples to generate; None for all of the run's validation data.
      task: by default that of the run's data, else ``pairs`` or ``dialogs`` by the references.
      context: of the last step.
      metrics: names; none for those of the protocol.
      weights: of networks of metrics, and of sources of the run that moved.
      switches: in place of the protocol's.
      real_images, real_stats: where real images of FID come from, if not from the references.
      features: folder of cached features; by default in ``output``.
      against: ``output`` of another evaluation.
      paper_row: the paper's row to print beside.
      step, seed, batch_size, inference: of the generation.
      data: in place of the run's ``data`` keys, for other data than its own.
      allow_outside_images: of predictions and references, paths may lead out of their folders.
    """

    output: str
    protocol: str = "standard"
    checkpoint: str | None = None
    count: int | None = None
    predictions: str | None = None
    references: str | None = None
    task: str | None = None
    context: str = "image+text"
    metrics: Sequence[str] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, str] = dataclasses.field(default_factory=dict)
    real_images: str | None = None
    real_stats: str | None = None
    features: str | None = None
    against: str | None = None
    paper_row: str = "minigpt5"
    step: int | None = None
    seed: int = 0
    batch_size: int = 16
    inference: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    allow_outside_images: bool = False

    @property
    def networks(self) -> dict[str, str]:
        """Those of ``weights`` that are of networks of metrics."""
        return {name: path for name, path in self.weights.items() if name in PUBLISHED}

    @property
    def sources(self) -> dict[str, str]:
        """Those of ``weights`` that are of the run."""
        return {name: path for name, path in self.weights.items() if name not in PUBLISHED}


@dataclasses.dataclass(frozen=True)
class Material:
    """Samples to score, and where they come from.

    Attributes:
      skipped: (sample, why) of the data that could not be asked.  run: for the results.
      small_world: the oracle reads the images.
    """

    task: str
    samples: list[Sample]
    run: dict[str, Any]
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    small_world: bool = False


def check(request: Request) -> None:
    """Whether a request goes together and its files can be used, before hours of generation.

    Raises:
      ConfigError: it does not, has an unknown name, or names another file than is meant.
      FileNotFoundError, WeightFileError: a file is missing, or cannot be read.
    """
    given = bool(request.predictions), bool(request.references)
    if request.checkpoint and any(given):
        raise ConfigError("give --checkpoint, or --predictions with --references, not both")
    if not request.checkpoint and not all(given):
        raise ConfigError("give a run (--checkpoint DIR), or --predictions DIR with --references FILE")
    if request.count is not None and not request.checkpoint:
        raise ConfigError("--count is of samples to generate: give it with --checkpoint")
    if request.data and not request.checkpoint:
        raise ConfigError("--data is of samples to generate: give it with --checkpoint")
    if request.real_images and request.real_stats:
        raise ConfigError("give --real_images or --real_stats, not both")
    task = request.task or "pairs"
    switches = switches_of(request.protocol, task, request.switches)
    metrics_of(request.protocol, task, request.metrics, oracle=False)
    beside(request.paper_row, task, request.context)
    if request.sources and not request.checkpoint:
        raise ConfigError(f"unknown weights {', '.join(request.sources)}; known: {', '.join(PUBLISHED)}")
    features = Features(request.networks, Path(), switches, lambda line: None)
    if "inception" in request.networks:
        _ = features.published_inception
    if folder := request.networks.get("wordnet"):
        with contextlib.suppress(MissingPackageError):  # the score is skipped, and says so
            open_wordnet(folder)
    Real(request.real_images, request.real_stats).check()
    if request.against:
        results.check_against(request.against)


def evaluate(request: Request, report: Report = lambda line: None) -> dict[str, Any]:
    """The content of ``results.json``, which is written with its companions into the output.

    Raises:
      ConfigError, DataError, CheckpointError, WeightFileError, WeightTableError, OSError: as their messages
        say.  A metric that cannot be computed is no error, but ``skipped`` with the reason.
    """
    check(request)
    owner = Owner(request.output, remedy="choose another --output")
    try:
        return _evaluate(request, report)
    finally:
        owner.release()


def _evaluate(request: Request, report: Report) -> dict[str, Any]:
    """:func:`evaluate` of a request that was checked, in a folder that is its own."""
    material = _generate(request, report) if request.checkpoint else _read(request)
    task, output = material.task, Path(request.output)
    switches = switches_of(request.protocol, task, request.switches)
    if task in DRAWN:
        check_missing(material.samples, switches.missing_image)
    features = Features(request.networks, Path(request.features or output / FEATURES), switches, report)
    real = Real(request.real_images, request.real_stats)
    scorer = Scorer(task, material.samples, switches, features, real)
    metrics = []
    for name in metrics_of(request.protocol, task, request.metrics, material.small_world):
        metrics.append(results.measure(name, scorer, task))
        report(line_of(metrics[-1].entry))
    groups = results.by_group(material.samples, metrics)
    compared = (
        results.against(request.against, task, material.samples, metrics, groups) if request.against else []
    )
    papers = request.protocol == "paper" and switches == switches_of("paper", task)
    rows = beside(request.paper_row, task, request.context) if papers else []
    found = results.assemble(
        protocol=request.protocol,
        task=task,
        context=request.context,
        switches=switches,
        run=material.run,
        weights=features.used,
        samples=material.samples,
        skipped=material.skipped,
        real=real.source,
        seed=request.seed,
        metrics=metrics,
        comparisons=compared,
        paper=results.paper_values(rows, metrics),
    )
    lines = {results.BY_SAMPLE: results.by_sample(material.samples, metrics), results.BY_GROUP: groups}
    results.write(output, found, lines)
    report(f"report: {write_report(output, found, metrics, material.samples)}")
    return found


def line_of(entry: Mapping[str, Any]) -> str:
    """A metric as the terminal shows it."""
    if entry["status"] == "skipped":
        return f"{entry['name']} skipped: {entry['why']}"
    n = f"n={entry['n']}" + (f" n_real={entry['n_real']}" if entry["n_real"] else "")
    return " ".join(filter(None, (entry["name"], number(entry["value"]), range_of(entry["ci"]), n))) + (
        f" ({entry['variant']})"
    )


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The one line of the command: values, what was skipped and why, number of samples."""
    return {
        "metrics": {e["name"]: e["value"] for e in found["metrics"] if e["status"] == "ok"},
        "skipped": {e["name"]: e["why"] for e in found["metrics"] if e["status"] == "skipped"},
        "n": found["data"]["n_predicted"],
    }


def _read(request: Request) -> Material:
    """Predictions and references that are given."""
    outside = request.allow_outside_images
    references = every = read_references(str(request.references), outside)
    pairs = all(reference.id == reference.group for reference in references)
    task = request.task or ("pairs" if pairs else "dialogs")
    if task == "last_step":  # references of all steps do, as do predictions of all
        references = list({r.group: r for r in sorted(every, key=lambda r: r.step)}.values())
    _check_task(task, references)
    answers = read_predictions(str(request.predictions), outside)
    for name in {r.id for r in every} - {r.id for r in references}:
        answers.pop(name, None)
    samples = join(references, answers)
    return Material(
        task, samples, {"predictions": str(request.predictions), "references": str(request.references)}
    )


def _check_task(task: str, references: Sequence[Reference]) -> None:
    """ConfigError where the references have nothing that the task is about."""
    wants = "image" if task in DRAWN else "text" if task == "narration" else ""
    if wants and (bad := [r.id for r in references if not getattr(r, wants)]):
        raise ConfigError(
            f"--task={task} ({TASKS[task]}), but {len(bad)} of {len(references)} references have no {wants}, "
            f"{bad[0]} for one; choose another --task"
        )


def _generate(request: Request, report: Report) -> Material:
    """References of a run's validation data, and the run's answers."""
    report(f"opening {request.checkpoint}")
    run = open_run(
        str(request.checkpoint),
        step=request.step,
        weights=request.sources,
        inference=dict(request.inference),
    )
    run = with_data(run, request.data, request.output)
    task, output = task_of(run.config, request.task), Path(request.output)
    asked = questions(run, task, request.context, request.count, request.seed)
    for name, why in asked.skipped:
        report(f"{name} is left out: {why}")
    settings = {"task": task, "seed": request.seed, "data": dict(request.data)}
    settings |= {"context": request.context} if task == "last_step" else {}
    predict(
        run,
        asked.prompts,
        output / PREDICTIONS,
        settings=settings,
        batch_size=request.batch_size,
        report=report,
    )
    references = write_references(asked.records, output)
    answers = read_predictions(output / PREDICTIONS)
    samples = join(read_references(references), answers, surplus=True)
    config = json.dumps(run.meta["config"], sort_keys=True, default=str)
    made = {
        "predictions": str(output / PREDICTIONS),
        "references": str(references),
        "checkpoint": str(run.checkpoints),
        "step": run.step,
        "name": run.config.run.name,
        "data": {name: run.config.data[name] for name in ("format", "validation", "prompt_set")},
        "config_hash": hashlib.sha256(config.encode()).hexdigest(),
        "git": run.meta.get("git_revision"),
        "inference": json.loads(json.dumps(run.config.inference.to_dict())),
    }
    return Material(task, samples, made, asked.skipped, readable(run.config))
