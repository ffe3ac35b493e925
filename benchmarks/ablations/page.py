"""docs/results/shapes.md from the committed results: the same results give the same page, byte for byte."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.ablations import paper
from benchmarks.ablations.compare import AGREEMENT, Compared, compare
from benchmarks.ablations.plots import Curve, draw
from benchmarks.ablations.results import METRICS, Estimate, Result, Results, estimate, read_results
from benchmarks.ablations.rows import GUIDANCE, SCALES, VARIANTS, RowError
from minigpt5_jax.data.samples.stories import CONTEXTS

Cell = str
NOTES = """\
`±` is the standard deviation over seeds where a row has several. Of one seed it is the standard error of its
counts, which knows nothing of how much another seed would differ. Comparisons take two standard errors of the
difference, which is taken seed by seed, over the seeds that all its rows have: **agrees**, our difference has
the sign of the paper's and is larger than that; **does not agree**, it is larger and has another sign;
**within noise**, it is smaller; **none seen**, it is smaller and the paper has none either, which proves
nothing. Rows of a seed are judged on the same captions and stories, of which the errors make no use. The
verdicts are computed.

The paper measures CLIP-I, CLIP-T, IS and FID on photographs. Here the oracle reads the images, and shares
that are right stand beside CLIP-I's ordering; "mean" is over 1, 2 and 3 objects, "attributes" over
background, shape, colour, size, texture and place: in pair tables the share of images in which it is right
of all objects, in story tables the share of objects. Caption error (MSE) and image loss (at fixed noise) are
those of the last validation, by teacher forcing.

What the small world builds in, other than the paper's Vicuna: the frozen language model has read stories and
dialogues of these very formats, and was trained to hold the whole scene in the states of eight fillers where
vokens stand, of what images before them show, too. So a model after stage 1 only is not new to stories
(zero-shot), less is lost without stage 1, every voken can tell everything (Figure 6), and vokens beyond eight
stand where no filler was. The text encoder's padding positions all tell the whole scene, and the UNet was
trained to heed them; a decoder-only mapper fills as many positions as there are vokens and leaves zeros
behind them, which this UNet has never seen. Rows of stage 1 that are trained for fewer steps than
`configs/shapes_stage1.py:full` show how fast a variant learns as much as how far it comes. Stories of all
rows are drawn with stage 2's guidance, captions with stage 1's, but for Figure 5. Held-out stories begin
with a kind of object that no part has seen; where it changes, later images may show seen kinds only."""


def shown(value: Estimate | None, digits: int = 3) -> Cell:
    """``0.912 ± 0.014``; a dash for what is not there."""
    if value is None:
        return "–"
    spread = "" if value.spread is None else f" ± {value.spread:.{digits}f}"
    return f"{value.value:.{digits}f}{spread}"


def started_from(results: Results, variants: Iterable[str]) -> str:
    """How far the plain run was trained that rows start from, or judge."""
    found = [result["settings"].get("from") for v in variants for result in results.get(v, [])]
    steps = sorted({str(settings.get("run.num_steps", "?")) for settings in found if settings})
    plain = shown(estimate(results.get("plain", []), METRICS["all"]))
    if not steps:
        return "None of these rows was run."
    return f"They stand on the plain stage-1 run of {' and '.join(steps)} steps (all right, mean: {plain})."


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(results: Results, variant: str, metrics: Sequence[str]) -> list[Cell]:
    """A row's numbers, with how many seeds and steps; "not run" where there is none."""
    found = results.get(variant, [])
    if not found:
        return ["not run", *["–"] * (len(metrics) + 1)]
    trained = found[0]["training"]
    counts = [str(len(found)), str(trained["step"]) if trained else "–"]
    return [*counts, *(shown(estimate(found, METRICS[metric])) for metric in metrics)]


def verdicts(results: Results, claims: Sequence[paper.Claim], tally: collections.Counter) -> str:
    """The table of comparisons; counts the verdicts."""
    rows = []
    for claim in claims:
        compared: Compared = compare(results, claim)
        tally[compared.verdict] += 1
        expected = {1: "better", 0: "the same", -1: "worse"}[claim.expected]
        theirs = f"{expected} ({claim.paper})"
        rows.append([claim.text, compared.difference, theirs, f"**{compared.verdict}**"])
    return table(("comparison", "ours ± standard error", "paper", "verdict"), rows)


PAIR_HEAD = (
    "row",
    "seeds",
    "steps",
    "1 object",
    "2",
    "3",
    "mean",
    "attributes",
    "[IMG0] emitted",
    "caption error",
    "image loss",
)
PAIR_METRICS = ("all 1", "all 2", "all 3", "all", "attributes", "emission", "caption", "image")


def pair_section(results: Results, rows: dict[str, tuple[float, ...]], name: str, tally) -> str:
    """Table 5 or 7 with ours beside."""
    lines = [
        [paper.LABELS[v], *cells(results, v, PAIR_METRICS), *(f"{number:.2f}" for number in rows[v])]
        for v in rows
    ]
    head = (*PAIR_HEAD, *(f"{metric} ({name})" for metric in paper.CC3M))
    claims = paper.orderings(rows, "all", name)
    nothing = [paper.LABELS[v] for v in rows if results.get(v) and not any(map(any_all_right, results[v]))]
    note = (
        f"\n\nNot one image was all right of: {', '.join(nothing)}. A verdict about such a row says that "
        "it is behind after so many steps, not how far it would come."
    )
    return f"{table(head, lines)}\n\n{verdicts(results, claims, tally)}{note if nothing else ''}"


def any_all_right(result: Result) -> bool:
    """Whether any image of a row was all right."""
    value = METRICS["all"](result)
    return value is not None and value.value > 0


def native_line(results: Results) -> str:
    """The ceiling, measured with the plain run."""
    found = results.get("plain", [])
    numbers = [shown(estimate(found, METRICS[f"native {n}"])) for n in (1, 2, 3)]
    return (
        "Native ceiling (the UNet driven by its own text encoder, same captions; nothing of it is trained "
        f"here), all right: 1 object {numbers[0]}, 2 objects {numbers[1]}, 3 objects {numbers[2]}."
    )


CURVES = {
    "1 object, all right": ("all 1", "o-"),
    "2 objects": ("all 2", "o-"),
    "3 objects": ("all 3", "o-"),
    "attributes": ("attributes", "s:"),
    "native, mean of 1 to 3": ("native", "--"),
}


def figure(results: Results, points: dict[str, float], axis: str, path: Path) -> str:
    """Draw metrics over the rows that were run (variant -> place on the axis); its Markdown.

    Fewer than two rows make no plot; one of earlier results goes then.
    """
    there = {variant: place for variant, place in points.items() if results.get(variant)}
    if len(there) < 2:
        path.unlink(missing_ok=True)
        return "No plot: fewer than two of these rows were run."
    curves = []
    for label, (metric, style) in CURVES.items():
        values = [(place, estimate(results[v], METRICS[metric])) for v, place in there.items()]
        kept = [(place, value) for place, value in values if value is not None]
        if len(kept) > 1:
            curves.append(Curve(label, kept, style))
    draw(path, curves, axis, list(there.values()))
    return f"![{axis}: share right, bars are two standard errors]({path.parent.name}/{path.name})"


def guidance_section(results: Results, folder: Path, tally) -> str:
    """Figure 5."""
    metrics = ("all 1", "all 2", "all 3", "all", "attributes", "native")
    rows = [[f"{scale:g}", *cells(results, v, metrics)] for v, scale in GUIDANCE.items()]
    rows = [[row[0], row[1], *row[3:]] for row in rows]  # nothing was trained: no steps
    head = ("guidance", "seeds", "1 object", "2", "3", "mean", "attributes", "native, mean")
    plot = figure(results, GUIDANCE, "guidance scale", folder / "guidance.png")
    most = {what: best(results, GUIDANCE, metric) for what, metric in BEST.items()}
    found = ", ".join(f"{what} at {scale}" for what, scale in most.items() if scale)
    line = f"\n\nMost is right, by the means: {found}." if found else ""
    return f"{plot}\n\n{table(head, rows)}{line}\n\n{verdicts(results, paper.GUIDANCE_CLAIMS, tally)}"


BEST = {"from vokens": "all", "natively": "native"}


def best(results: Results, points: dict[str, float], metric: str) -> str:
    """The place on the axis where a metric is highest; empty where nothing was run."""
    values = {place: estimate(results.get(variant, []), METRICS[metric]) for variant, place in points.items()}
    there = {place: found.value for place, found in values.items() if found is not None}
    return f"{max(there, key=there.__getitem__):g}" if there else ""


def voken_section(results: Results, folder: Path, tally) -> str:
    """Figure 6."""
    rows = [[str(count), *cells(results, v, PAIR_METRICS)] for v, count in paper.VOKENS.items()]
    plot = figure(results, paper.VOKENS, "number of vokens", folder / "vokens.png")
    head = ("vokens", *PAIR_HEAD[1:])
    claims = verdicts(results, paper.VOKEN_CLAIMS, tally)
    return f"{plot}\n\n{table(head, rows)}\n\n{claims}"


CONTEXT_NOTE = """\
The image of a story's last step, drawn with nothing before it but its own narration (none), the earlier
narrations (text), images (image) or both. "attributes": all attributes of all objects and the background,
compared with the paper's ordering; "images only": those that no text tells, "texture" among them. Other
than the paper's, the rows of stage 2 were trained with some of the samples reading texts only or images
only of the steps before (`data.context_dropout` in their JSON); the zero-shot row was not."""


def context_section(results: Results, folder: Path, tally) -> str:
    """Table 6."""
    rows = []
    for variant, numbers in paper.TABLE6.items():
        for what in ("attributes", "images only", "texture"):
            names = [f"{what}, {context}" for context in CONTEXTS]
            guess = METRICS.get(f"chance, {what}")
            chance = shown(guess and estimate(results.get(variant, []), guess))
            rows.append([paper.LABELS[variant], what, *cells(results, variant, names), chance])
        theirs = [f"{number:.2f}" for number in numbers]
        rows.append([paper.LABELS[variant], "CLIP-I (Table 6)", "–", "–", *theirs, "–"])
    claims = paper.context_claims(paper.TABLE6, "attributes, {}")
    head = ("row", "what", "seeds", "steps", *CONTEXTS, "chance")
    start = started_from(results, paper.TABLE6)
    return f"{CONTEXT_NOTE} {start}\n\n{table(head, rows)}\n\n{verdicts(results, claims, tally)}"


STORY_NOTE = """\
The last step after the whole history: its image (attributes and all right as above), and its narration
by ROUGE-L, asked with the image to draw (multimodal) or from the true image (understanding). Beside them
what the true narration of another story has: the manner without the story."""


def story_section(results: Results, folder: Path, tally) -> str:
    """LoRA, prefix, without stage 1: Tables 1 and 2."""
    metrics = (
        "attributes, image+text",
        "all right, image+text",
        "narration, multimodal",
        "narration, understanding",
        "narration, another",
    )
    rows = []
    for variant in ("zero_shot", "lora", "prefix", "no_stage1"):
        beside = [f"{n:.2f}" for n in paper.STEPS.get(variant, ())] or ["–", "–"]
        rows.append([paper.LABELS[variant], *cells(results, variant, metrics), *beside])
    head = (
        "row",
        "seeds",
        "steps",
        "attributes",
        "all right",
        "ROUGE-L (multimodal)",
        "ROUGE-L (understanding)",
        "of another",
        "CLIP-I (Table 1)",
        "FID (Table 1)",
    )
    narration = [
        [name, *(f"{number:.4f}" for number in numbers)] for name, numbers in paper.NARRATION.items()
    ]
    words = table(("Table 2 (no rows of ours to compare)", "S-BERT", "ROUGE-L", "METEOR"), narration)
    claims = paper.orderings(paper.STEPS, metrics[0], "Table 1")
    start = started_from(results, paper.TABLE6)
    return f"{STORY_NOTE} {start}\n\n{table(head, rows)}\n\n{verdicts(results, claims, tally)}\n\n{words}"


SECTIONS: dict[str, Callable[[Results, Path, collections.Counter], str]] = {
    "Training (Table 5)": lambda r, _, t: (
        f"{pair_section(r, paper.TABLE5, 'Table 5', t)}\n\n{native_line(r)}"
    ),
    "Mapper (Table 7)": lambda r, _, t: pair_section(r, paper.TABLE7, "Table 7", t),
    "Number of vokens (Figure 6)": voken_section,
    "Guidance (Figure 5)": guidance_section,
    "Context (Table 6)": context_section,
    "Stage 2 (Tables 1 and 2)": story_section,
}


def runs_section(results: Results) -> str:
    """Every result: what made it."""
    lines: list[list[Cell]] = []
    for variant in VARIANTS:
        for result in results.get(variant, []):
            seconds = result["seconds"]
            minutes = [f"{seconds[name] / 60:.1f}" for name in ("training", "judging")]
            minutes[0] = minutes[0] if result["training"] else "–"
            judged = result["settings"]["judge"]
            count = f"{judged['pairs']} captions x 3" if "pairs" in judged else f"{judged['stories']} stories"
            name = f"{variant}, seed {result['seed']}"
            steps = str(result["training"]["step"]) if result["training"] else "–"
            revision, changes, _ = result["git_revision"].partition("+")
            lines.append([name, steps, *minutes, count, revision[:12] + changes])
    head = ("row", "steps", "minutes of training", "of judging", "judged on", "revision")
    note = (
        "The JSON of a row has its settings and the command that trained it; `+` behind a revision: files "
        "differed from it."
    )
    return f"{note}\n\n{table(head, lines)}"


def summary(results: Results, tally: collections.Counter) -> str:
    """How much was run, on what, and how often it agrees."""
    every: list[Result] = [result for found in results.values() for result in found]
    seeds = sorted({result["seed"] for result in every})
    missing = [variant for variant in VARIANTS if variant not in results]
    counts = ", ".join(f"{tally[name]} {name}" for name in AGREEMENT if tally[name])
    lines = [
        f"- {len(every)} results: {len(results)} of {len(VARIANTS)} rows, with up to {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}); each table says how many a row has.",
        f"- Not run: {', '.join(missing) if missing else 'nothing'}.",
        f"- Machine: {'; '.join(sorted({result['machine'] for result in every}))}.",
        f"- Comparisons with the paper: {counts or 'none'}.",
    ]
    return "\n".join(lines)


def write_page(folder: Path) -> Path:
    """Read the results in ``folder`` and write the page beside it, plots into it.

    Raises:
      RowError: there are no results, or they cannot be read together.
    """
    scales = read_results(folder)
    if not scales:
        raise RowError(f"no results in {folder}; run python -m benchmarks.ablations first")
    parts = [
        "# The paper's ablations in the small world",
        "Written by `python -m benchmarks.ablations` from the JSON files in "
        f"[{folder.name}/]({folder.name}/); `--page_only` writes it again.",
    ]
    for scale in SCALES:
        if results := scales.get(scale):
            tally: collections.Counter = collections.Counter()
            sections = [f"## {name}\n\n{make(results, folder, tally)}" for name, make in SECTIONS.items()]
            parts += [summary(results, tally), NOTES, *sections, f"## Runs\n\n{runs_section(results)}"]
    if scales.keys() <= {"small"}:
        parts.append("A larger scale (128 pixels, wider towers, on an H200) was not run.")
    path = folder.with_suffix(".md")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
