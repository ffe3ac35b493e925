"""What a preparation did: ``report.json`` for programs, ``report.html`` (one file) for eyes."""

from __future__ import annotations

import base64
import collections
import html
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from minigpt5_jax.data.batches.lengths import measure
from minigpt5_jax.data.errors import SampleError, printable
from minigpt5_jax.data.images import ImageSource, load_image
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.sources.prepared import PreparedSource
from minigpt5_jax.data.text.templates import IMAGE
from minigpt5_jax.data.text.tokenizer import LanguageTokenizer

SHOWN = 20  # rows of a table
THUMBNAIL = 224  # pixels
BINS = 16

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fdb; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.lead { opacity: .75; margin: .2rem 0 1rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { flex: 1 1 7rem; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; } .tile span { opacity: .7; font-size: .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td { padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
     overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; width: 7rem; font-variant-numeric: tabular-nums; }
td.bar { width: 45%; } td.bar div { background: var(--accent); height: .75rem; border-radius: .2rem; }
article { border: 1px solid var(--line); border-radius: .7rem; margin: 0 0 1rem; overflow: hidden; }
article header { padding: .4rem .9rem; font-size: .8rem; opacity: .75; overflow-wrap: anywhere; }
article section { padding: .5rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
article .source { background: var(--soft); } article .target { border-left: .25rem solid var(--accent); }
img { vertical-align: middle; border-radius: .3rem; margin: .2rem; max-width: 100%; }
"""


def write_report(
    source: PreparedSource,
    *,
    tokenizer: LanguageTokenizer | None = None,
    image_tokens: int = 32,
    samples: int = 10,
    seed: int = 0,
) -> Path:
    """Writes ``report.json`` and ``report.html`` into the folder of a prepared data set.

    Args:
      tokenizer: adds the lengths of the training samples, in positions of the language model.
      image_tokens: positions of an input image.
      samples: how many are drawn, by ``seed``, and shown with their images.

    Returns the path of the page.
    """
    facts = summary(source, tokenizer, image_tokens)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (source.folder / "report.json").write_text(text, "utf-8")
    drawn = np.random.default_rng(seed).permutation(len(source))[:samples]
    page = source.folder / "report.html"
    page.write_text(printable(_page(facts, source, sorted(int(index) for index in drawn))), "utf-8")
    return page


def summary(source: PreparedSource, tokenizer: LanguageTokenizer | None, image_tokens: int) -> dict[str, Any]:
    """The content of ``report.json``."""
    made, tally = source.metadata, source.metadata["tally"]
    skipped, lost = (
        [{"unit": unit, "where": where, "reason": reason} for unit, where, reason in tally[name]]
        for name in ("skipped", "cut")
    )
    facts = {
        "dataset": made["dataset"],
        "split": made["split"],
        "units": made["count"],
        "kept": tally["kept"],
        "skipped": len(skipped),
        "skipped_by_reason": _by_reason(skip["reason"] for skip in skipped),
        "skipped_units": skipped,
        "images_lost": lost,
        "samples": len(source),
        "shards": made["num_shards"],
        "letterbox": made["letterbox"],
        "images": tally["images"],
        "image_bytes": tally["bytes"],
        "images_by_size": dict(sorted(tally["sizes"].items(), key=lambda item: -item[1])),
        "images_by_kilobytes": {
            f"{2 ** int(power) / 1024:g}": number
            for power, number in sorted(tally["bytes_log2"].items(), key=lambda item: int(item[0]))
        },
    }
    if tokenizer is not None:
        facts["lengths"] = length_facts(measure(source, tokenizer, image_tokens).lengths)
    return facts


def length_facts(lengths: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Quantiles and a histogram of lengths in positions; samples that have none are left out."""
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return {"samples": 0}
    width = max(1, -(-int(lengths.max()) // BINS))
    counts = np.bincount(lengths // width)
    quantiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 95, 99)}
    return {
        "samples": len(lengths),
        "mean": round(float(lengths.mean()), 1),
        **quantiles,
        "max": int(lengths.max()),
        "histogram": {f"{i * width}-{(i + 1) * width - 1}": int(n) for i, n in enumerate(counts)},
    }


def _by_reason(reasons: Iterable[str]) -> dict[str, int]:
    """Reasons without their numbers, the most frequent first."""
    return dict(collections.Counter(re.sub(r"\d[\d,]*", "#", reason) for reason in reasons).most_common())


def _page(facts: dict[str, Any], source: PreparedSource, drawn: list[int]) -> str:
    title = f"{facts['dataset']} {facts['split']}"
    tiles = {
        "kept": f"{facts['kept']:,}",
        "left out": f"{facts['skipped']:,}",
        "samples": f"{facts['samples']:,}",
        "images": f"{facts['images']:,}",
        "all images": _size(facts["image_bytes"]),
        "shards": f"{facts['shards']:,}",
    }
    parts = [f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles.items()]
    body = f'<div class="tiles">{"".join(parts)}</div>\n'
    if facts["skipped"]:
        body += "<h2>Left out, and why</h2>\n" + _bars(facts["skipped_by_reason"])
        rows = ((skip["where"], skip["reason"]) for skip in facts["skipped_units"][:SHOWN])
        cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>\n" for a, b in rows)
        body += f"<h2>The first of them</h2>\n<table>{cells}</table>\n"
    if facts["images_lost"]:
        body += "<h2>Images that dialogues go without, and end before</h2>\n"
        body += _bars(_by_reason(lost["reason"] for lost in facts["images_lost"]))
    if facts.get("lengths", {}).get("samples"):
        lengths = facts["lengths"]
        shown = ", ".join(f"{name} {lengths[name]}" for name in ("mean", "p50", "p90", "p95", "p99", "max"))
        body += f"<h2>Positions of a sample</h2>\n<p>{shown}</p>\n" + _bars(lengths["histogram"])
    body += "<h2>Images by width x height</h2>\n" + _bars(facts["images_by_size"])
    body += "<h2>Images by size of file (KiB, from)</h2>\n" + _bars(facts["images_by_kilobytes"])
    body += f"<h2>{len(drawn)} samples</h2>\n" + "".join(_sample(source, index) for index in drawn)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(source.describe())}</p>\n{body}'
        "</body>\n</html>\n"
    )


def _size(count: int) -> str:
    """Bytes in a unit that gives a readable number."""
    unit, power = next(
        (u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)) if count >> p or not p
    )
    return f"{count / 2**power:,.1f} {unit}"


def _bars(counts: dict[str, int]) -> str:
    """A table of names, numbers and bars; the rest in one line where there are many."""
    rows = list(counts.items())
    if len(rows) > SHOWN:
        rows = [*rows[:SHOWN], ("others", sum(number for _, number in rows[SHOWN:]))]
    top = max((number for _, number in rows), default=1)
    return (
        "<table>"
        + "".join(
            f'<tr><td>{html.escape(name)}</td><td class="number">{number:,}</td>'
            f'<td class="bar"><div style="width:{100 * number / max(top, 1):.3g}%"></div></td></tr>\n'
            for name, number in rows
        )
        + "</table>\n"
    )


def _sample(source: PreparedSource, index: int) -> str:
    try:
        example = source.example(index)
        return _article(example)
    except SampleError as error:
        return f"<article><header>{html.escape(str(error))}</header></article>\n"


def _article(example: Example) -> str:
    pieces = example.source.split(IMAGE)
    words = html.escape(pieces[0])
    for image, piece in zip(example.images, pieces[1:], strict=True):
        words += _img(image) + html.escape(piece)
    target = html.escape(example.target)
    if example.target_image is not None:
        target += "\n" + _img(example.target_image)
    label = html.escape(f"{example.item_id} · {example.task} · {example.where}")
    return (
        f'<article><header>{label}</header>\n<section class="source">{words}</section>\n'
        f'<section class="target">{target}</section></article>\n'
    )


def _img(source: ImageSource) -> str:
    """A small copy of an image, inside the page."""
    image = load_image(source)
    name = f"{image.width}x{image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}" title="{name}">'
