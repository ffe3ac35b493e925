"""``report.html``: the results as a page, with the best and the worst samples."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.data.errors import printable
from minigpt5_jax.evaluation.suite.results import Metric
from minigpt5_jax.evaluation.suite.samples import IMAGE, Sample

SHOWN = 8
BINS = 20
RANKED = ("clip_i", "oracle_all", "clip_t", "s_bert", "rouge_l", "bleu_1")
"""What best and worst samples are chosen by: the first of these that was computed."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #2f6fdb; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: 0 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
         border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; font-size: .85rem; }
figure img { width: 48%; min-width: 5rem; image-rendering: auto; }
svg { width: 16rem; height: 6rem; } rect { fill: var(--accent); }
.graphs { display: flex; flex-wrap: wrap; gap: 1rem; }
"""


def write_report(
    folder: Path, results: Mapping[str, Any], metrics: Sequence[Metric], samples: Sequence[Sample]
) -> Path:
    """Writes the page; its images are those of the predictions and references, by relative paths."""
    path, protocol = folder / "report.html", results["protocol"]
    title = f"Evaluation: {protocol['task']}, protocol {protocol['name']}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(protocol['what'])}. {_coverage(results['data'])}</p>",
        "<h2>Scores</h2>",
        table(["metric", "value", "interval", "n", "variant and notes"], map(_score, results["metrics"])),
        *_section(
            "Beside the paper", ["table", "row", "metric", "paper", "here"], map(_beside, results["paper"])
        ),
        *_section(
            "Against another run",
            ["metric", "difference", "interval", "p", "test"],
            map(_difference, results["comparisons"]),
        ),
        *_graphs(metrics),
        *_ranked(metrics, samples, folder),
        "<h2>What does not compare</h2>",
        "<p>Numbers compare only where all switches below are equal. FID falls with the number of images. "
        "The deviation between chunks, subsets or halves is no interval of a score.</p>",
        *_section("Switches", ["switch", "value"], protocol["switches"].items()),
        *_section("Run", ["what", "value"], ((key, str(value)) for key, value in results["run"].items())),
    ]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    path.write_text(printable(page), "utf-8")
    return path


def number(value: float | None) -> str:
    """Four digits behind the point; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def range_of(ci: Mapping[str, Any] | None) -> str:
    """``[low, high]``."""
    return f"[{number(ci['low'])}, {number(ci['high'])}]" if ci else ""


def _coverage(data: Mapping[str, Any]) -> str:
    return (
        f"{data['n_predicted']} samples of {data['n_groups']} groups; {data['n_wants_image']} want an image, "
        f"{data['n_with_image']} have one; {len(data['skipped'])} samples of the data were left out."
    )


def _score(entry: Mapping[str, Any]) -> Sequence[str]:
    n = str(entry["n"]) + (f" with {entry['n_real']}" if entry["n_real"] else "")
    if entry["status"] == "skipped":
        return entry["name"], "skipped", "", "", entry["why"]
    spread = entry["spread"]
    notes = [f"{spread['method']}: {number(spread['mean'])} ± {number(spread['std'])}"] if spread else []
    return (
        entry["name"],
        number(entry["value"]),
        range_of(entry["ci"]),
        n,
        "; ".join([entry["variant"], *notes, *entry["notes"]]),
    )


def _beside(cell: Mapping[str, Any]) -> Sequence[str]:
    row = cell["row"] + (f" ({cell['context']})" if cell["context"] else "")
    return str(cell["table"]), row, cell["metric"], f"{cell['value']:g}", number(cell["ours"])


def _difference(row: Mapping[str, Any]) -> Sequence[str]:
    p = "" if row["p"] is None else f"{row['p']:.4f}"
    return row["metric"], number(row["difference"]), range_of(row["ci"]), p, row["test"]


def table(head: Sequence[str], rows: Any) -> str:
    """An HTML table of plain texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(head, "th"), *(line(row, "td") for row in rows), "</table>"])


def _section(title: str, head: Sequence[str], rows: Any) -> list[str]:
    """A heading and a table; nothing without rows."""
    rows = list(rows)
    return [f"<h2>{title}</h2>", table(head, rows)] if rows else []


def _graphs(metrics: Sequence[Metric]) -> list[str]:
    """A histogram of every metric that has values of single samples."""
    found = []
    for metric in metrics:
        values = [v for v in metric.found.values.values() if v is not None] if metric.found else []
        if len(set(values)) < 2:
            continue
        counts, edges = np.histogram(values, BINS)
        bars = "".join(
            f'<rect x="{5 * place}" y="{60 - 60 * count / counts.max():.2f}" width="4" '
            f'height="{60 * count / counts.max():.2f}"/>'
            for place, count in enumerate(counts)
        )
        name = html.escape(metric.name)
        found.append(
            f'<div>{name}<br><svg viewBox="0 0 {5 * BINS} 60" preserveAspectRatio="none" role="img" '
            f'aria-label="histogram of {name}">{bars}</svg><br>{edges[0]:.3f} to {edges[-1]:.3f}</div>'
        )
    return ["<h2>Histograms over samples</h2>", '<div class="graphs">', *found, "</div>"] if found else []


def _ranked(metrics: Sequence[Metric], samples: Sequence[Sample], folder: Path) -> list[str]:
    """The best and the worst samples."""
    by_name = {m.entry["metric"]: m for m in metrics if m.found and m.found.values}
    metric = next((by_name[name] for name in RANKED if name in by_name), None)
    if metric is None or metric.found is None:
        return []
    values = metric.found.values
    scored = sorted(
        (s for s in samples if values.get(s.id) is not None), key=lambda s: values[s.id] or 0.0, reverse=True
    )
    found = []
    for title, some in (("Best", scored[:SHOWN]), ("Worst", scored[SHOWN:][-SHOWN:][::-1])):
        if some:
            figures = [_figure(sample, metric.name, values[sample.id], folder) for sample in some]
            found += [
                f"<h2>{title} by {html.escape(metric.name)}</h2>",
                '<div class="samples">',
                *figures,
                "</div>",
            ]
    return found


def _figure(sample: Sample, name: str, value: float | None, folder: Path) -> str:
    reference = sample.reference

    def image(path: Path | None, what: str) -> str:
        if path is None:
            return ""
        source = html.escape(os.path.relpath(path, folder).replace(os.sep, "/"), quote=True)
        return f'<img src="{source}" alt="{what} of {html.escape(sample.id, quote=True)}" title="{what}">'

    said = {
        "caption": reference.caption if reference.image else "",
        "wanted": reference.text,
        "got": sample.text.removesuffix(IMAGE),
    }
    lines = "".join(
        f"<br>{key}: {html.escape(text[:300])}" for key, text in said.items() if text and "<Image" not in text
    )
    return (
        f"<figure>{image(reference.image, 'reference')} {image(sample.image, 'prediction')}"
        f"<figcaption>{html.escape(sample.id)}: {html.escape(name)} {number(value)}{lines}"
        "</figcaption></figure>"
    )
