"""What an evaluation found, as files: ``results.json`` (results.schema.json), lines by sample and group."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.json_files import read_json, read_jsonl
from minigpt5_jax.evaluation.suite.features import Skipped
from minigpt5_jax.evaluation.suite.paper import Row
from minigpt5_jax.evaluation.suite.protocols import TASKS, Switches
from minigpt5_jax.evaluation.suite.resampling import RESAMPLES, SEED, compare, interval
from minigpt5_jax.evaluation.suite.samples import Sample
from minigpt5_jax.evaluation.suite.scores import LOWER_IS_BETTER, UNITS, Found

VERSION = 1
RESULTS, BY_SAMPLE, BY_GROUP = "results.json", "per_sample.jsonl", "per_group.jsonl"
GROUP = {"pairs": "pairs", "dialogs": "dialogues"}
"""What the groups of a task are; of the others, stories."""
PACKAGES = ("jax", "numpy", "pillow", "flax", "tokenizers", "nltk", "sacrebleu", "ftfy")


@dataclasses.dataclass
class Metric:
    """A metric's entry in the results, and what it was computed from."""

    entry: dict[str, Any]
    found: Found | None = None

    @property
    def name(self) -> str:
        """As it is printed."""
        return self.entry["name"]


def unit_of(task: str) -> str:
    """What the groups of a task are."""
    return GROUP.get(task, "stories")


def measure(name: str, score: Callable[[str], Found], task: str) -> Metric:
    """One metric, computed or skipped with the reason."""
    began = time.monotonic()
    higher = name not in LOWER_IS_BETTER
    entry: dict[str, Any] = {"name": name, "metric": name, "unit": UNITS.get(name, "share")}
    try:
        found = score(name)
        entry |= {"name": found.name or name, "variant": found.variant, "value": found.value, "n": found.n}
        entry |= {"n_real": found.n_real, "spread": found.spread, "notes": found.notes, "status": "ok"}
        entry["ci"] = interval(list(found.groups.values()), unit_of(task)) if found.groups else None
    except Skipped as error:
        found = None
        empty = dict.fromkeys(("value", "n_real", "spread", "ci"))
        entry |= {**empty, "variant": "", "n": 0, "notes": [], "status": "skipped", "why": str(error)}
    return Metric(entry | {"higher_is_better": higher, "seconds": round(time.monotonic() - began, 3)}, found)


def paper_values(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The paper's values of the metrics that were computed under their own names.

    Scores of another network, or METEOR without synonyms, are no such scores.
    """
    found = []
    for row in rows:
        for metric, value in row.values.items():
            ours = next((m for m in metrics if m.name == metric), None)
            if ours is not None:
                cell = {"row": row.model, "context": row.context, "metric": metric, "value": value}
                found.append({"table": row.table, **cell, "ours": ours.entry["value"]})
    return found


def software() -> dict[str, str]:
    """Versions of what computes; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hash_of_ids(samples: Sequence[Sample]) -> str:
    """sha256 of the names of samples, in order."""
    return hashlib.sha256("\n".join(sample.id for sample in samples).encode()).hexdigest()


def assemble(
    *,
    protocol: str,
    task: str,
    context: str,
    switches: Switches,
    run: Mapping[str, Any],
    weights: Mapping[str, str],
    samples: Sequence[Sample],
    skipped: Iterable[tuple[str, str]],
    real: str,
    seed: int,
    metrics: Sequence[Metric],
    comparisons: Sequence[Mapping[str, Any]],
    paper: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of ``results.json``."""
    left_out = [{"id": name, "why": why} for name, why in skipped]
    return {
        "schema_version": VERSION,
        "protocol": {
            "name": protocol,
            "task": task,
            "what": TASKS[task],
            "context": context if task == "last_step" else None,
            "switches": {**dataclasses.asdict(switches), "real_images": real},
        },
        "run": {**run, "weights": dict(weights)},
        "data": {
            "n_expected": len(samples) + len(left_out),
            "n_predicted": len(samples),
            "n_groups": len({sample.group for sample in samples}),
            "n_wants_image": sum(sample.wants_image for sample in samples),
            "n_with_image": sum(sample.image is not None for sample in samples),
            "ids_sha256": hash_of_ids(samples),
            "skipped": left_out,
            "without_image": [{"id": s.id, "why": s.why} for s in samples if s.why],
        },
        "software": software(),
        "device": jax.devices()[0].device_kind,
        "seeds": {"generation": seed, "bootstrap": SEED, "resamples": RESAMPLES},
        "metrics": [metric.entry for metric in metrics],
        "comparisons": list(comparisons),
        "paper": list(paper),
    }


def by_sample(samples: Sequence[Sample], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """A line for each sample; null where a metric has no value for it."""
    valued = [metric for metric in metrics if metric.found and metric.found.values]
    return [
        {
            "id": s.id,
            "group": s.group,
            "step": s.reference.step,
            "wants_image": s.wants_image,
            "has_image": s.image is not None,
            **{metric.name: metric.found.values.get(s.id) for metric in valued},
        }
        for s in samples
    ]


def by_group(samples: Sequence[Sample], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """A line for each group: its samples, and what it adds to each score, [numerator, denominator]."""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.id)
    scored = [metric for metric in metrics if metric.found and metric.found.groups]
    return [
        {"group": group, "samples": ids}
        | {m.name: list(m.found.groups[group]) for m in scored if group in m.found.groups}
        for group, ids in groups.items()
    ]


def write(folder: Path, results: Mapping[str, Any], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """``results.json`` and the files of lines."""
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, "utf-8")
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS).write_text(text + "\n", "utf-8")


def check_against(folder: str | Path) -> None:
    """Whether a folder is of another evaluation.

    Raises:
      ConfigError: it is not.
    """
    if not all((Path(folder) / name).is_file() for name in (RESULTS, BY_GROUP)):
        raise ConfigError(
            f"--against={folder} holds no results of an evaluation ({RESULTS}, {BY_GROUP}); evaluate that "
            "run first and give the folder of its --output"
        )


def against(
    folder: str | Path,
    task: str,
    samples: Sequence[Sample],
    metrics: Sequence[Metric],
    groups: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Every score minus that of another evaluation, over the groups that both have with the same samples.

    Only scores of the same name and variant are compared, and scores of sets only where all samples are the
    same, and as many images.

    Raises:
      ConfigError: the folder is of no evaluation, or of one of other samples.
      DataError: its files are damaged.
    """
    check_against(folder)
    folder = Path(folder)
    results = read_json(folder / RESULTS, "evaluate it again")
    theirs = {entry["name"]: entry for entry in results["metrics"]}
    same = results["data"]["ids_sha256"] == hash_of_ids(samples)
    lines = read_jsonl(folder / BY_GROUP, "evaluate it again")
    other = {line["group"]: line for line in lines}
    common = [g for g in groups if other.get(g["group"], {}).get("samples") == g["samples"]]
    if not common:
        raise ConfigError(
            f"--against={folder}: no {unit_of(task)} with the same samples are in both evaluations"
        )
    found = []
    for metric in metrics:
        entry, their = metric.entry, theirs.get(metric.name)
        if not their or entry["status"] != "ok" or their["status"] != "ok":
            continue
        row = {"metric": metric.name, "other_run": str(folder), "difference": None, "ci": None, "p": None}
        row |= {"test": "", "n_groups": 0}
        if entry["variant"] != their["variant"]:
            found.append(row | {"test": f"not comparable: there it is {their['variant']}"})
        elif metric.found and metric.found.groups:
            mine, others = (
                {line["group"]: tuple(line[metric.name]) for line in side if metric.name in line}
                for side in (common, [other[line["group"]] for line in common])
            )
            if difference := compare(mine, others, unit_of(task)):
                row |= {"difference": difference.value, "ci": difference.ci, "p": difference.p}
                found.append(row | {"test": "paired bootstrap", "n_groups": difference.groups})
        elif not same:
            found.append(row | {"test": "not comparable: other samples"})
        elif (entry["n"], entry["n_real"]) != (their["n"], their["n_real"]):
            found.append(row | {"test": f"not comparable: {their['n']} images there, {entry['n']} here"})
        else:
            found.append(
                row | {"difference": entry["value"] - their["value"], "test": "none, one value a set"}
            )
    return found
