"""The paper's ablations in the small world, one row at a time, and docs/results/shapes.md.

    python -m benchmarks.ablations --list                     # rows, steps, which are there
    python -m benchmarks.ablations                            # every row of seed 0, then the page
    python -m benchmarks.ablations --rows plain,no_cap --seeds 0,1 --steps 600
    python -m benchmarks.ablations --page_only                # the page from the results that are there

A row is a variant of ``configs/ablations.py`` trained by ``python -m minigpt5_jax.train`` and judged on
held-out captions or stories; ``guidance_*`` and ``zero_shot`` judge the plain run.  Each leaves one JSON in
``--results``.  Stopped at any time, the same command goes on: a row that is there is not run again, one that
was begun continues from its newest checkpoint.  A result of other settings (steps, counts, configuration,
backbones) is refused, or made again with ``--force``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.page import write_page
from benchmarks.ablations.results import read_result, without_seed
from benchmarks.ablations.rows import (
    ROOT,
    VARIANTS,
    Row,
    RowError,
    assets_hash,
    check_packages,
    differences,
    plan,
    row_settings,
)
from benchmarks.ablations.work import begun_otherwise, clear, is_trained, run_row

RESULTS = ROOT / "docs" / "results" / "shapes"


def words(text: str) -> list[str]:
    """Comma separated."""
    return [word for word in text.split(",") if word]


def seeds(text: str) -> list[int]:
    """Comma separated."""
    return [int(word) for word in words(text)]


def count(text: str) -> int:
    """At least one."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=words, default=list(VARIANTS), help="variants, comma separated")
    parser.add_argument("--seeds", type=seeds, default=[0], help="comma separated; all rows of one first")
    home = lambda given: Path(given).expanduser()  # noqa: E731
    parser.add_argument("--work", type=home, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--results", type=home, default=RESULTS, help="folder of the JSONs, beside the page")
    parser.add_argument("--steps", type=count, help="of stage-1 rows; warm-up stays in proportion")
    parser.add_argument("--story_steps", type=count, help="of stage-2 rows; warm-up stays in proportion")
    parser.add_argument("--pairs", type=count, default=200, help="captions judged of each number of objects")
    parser.add_argument("--stories", type=count, default=60, help="stories judged")
    parser.add_argument("--force", action="store_true", help="make rows of other settings again")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--page_only", action="store_true", help="write the page and stop")
    return parser.parse_args(argv)


def states(rows: Sequence[Row], settings: dict[Row, Any], flags: argparse.Namespace) -> dict[Row, str]:
    """Row -> ``done``, ``to run``, or what stands in the way of it."""
    found = {row: state(row, settings[row], flags) for row in rows}
    for row in rows:
        if row.need is None or found[row] == "done" or found[row.need] != "done":
            continue
        if not is_trained(row.need, settings[row.need], flags.work):
            found[row.need] = f"{row.name} needs its checkpoint, which is not in {flags.work}"
    return found


def state(row: Row, settings: dict[str, Any], flags: argparse.Namespace) -> str:
    """The same of one row, by itself; its other seeds must have its settings too."""
    own = flags.results / f"{row.name}.json"
    compared = {flags.work / row.name: [] if own.is_file() else begun_otherwise(row, settings, flags.work)}
    for path in sorted(flags.results.glob(f"{row.name.rpartition('_seed')[0]}_seed*.json")):
        saved = read_result(path)["settings"]
        pair = (saved, settings) if path == own else (without_seed(saved), without_seed(settings))
        compared[path] = differences(*pair)
    for what, changed in compared.items():
        if changed:
            return f"{what} is of other settings:\n  " + "\n  ".join(changed)
    return "done" if own.is_file() else "to run"


def show(rows: Sequence[Row], settings: dict[Row, Any], found: dict[Row, str], results: Path) -> str:
    """The rows as text; of a row that was made with other settings those of its own result."""
    lines, others = [f"{'row':24} {'steps':>6}  {'needs':16} state"], False
    for row in rows:
        steps, state = _steps(settings[row]), found[row]
        own = results / f"{row.name}.json"
        if state not in ("done", "to run") and own.is_file():
            others, saved = True, read_result(own)["settings"]
            steps, state = _steps(saved), f"done with other settings than these flags ask for: {own}"
        elif state not in ("done", "to run"):
            state = "refused: " + state
        lines.append(f"{row.name:24} {steps:>6}  {row.need.name if row.need else '-':16} {state}")
    if others:
        lines.append(
            "rows with other settings stay as they are: the page shows them (--page_only); to make rows of "
            "these flags give a folder of their own (--results FOLDER), or replace them (--force)"
        )
    return "\n".join(lines)


def _steps(settings: dict[str, Any]) -> Any:
    """Updates of a row's run; '-' for one that is not trained."""
    return settings.get("config", {}).get("run.num_steps", "-")


def run_rows(rows: Sequence[Row], settings: dict[Row, Any], flags: argparse.Namespace) -> list[Row]:
    """Run them in order; one that fails does not stop those that do not need it.  Returns the failed ones."""
    start, failed = time.time(), []
    for number, row in enumerate(rows, 1):
        began = time.time()
        print(f"row {number} of {len(rows)}: {row.name}", file=sys.stderr, flush=True)
        try:
            if row.need in failed:
                raise RowError(f"not run, because {row.need.name} failed")
            run_row(row, settings[row], flags)
        except RowError as error:
            failed.append(row)
            print(f"error: row {row.name}: {error}", file=sys.stderr)
        else:
            write_page(flags.results)
        minutes = [(time.time() - since) / 60 for since in (began, start)]
        print(
            f"row {number} of {len(rows)}: {minutes[0]:.1f} minutes, {minutes[1]:.1f} in all",
            file=sys.stderr,
            flush=True,
        )
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RowError: what is wrong with flags, results or folders; nothing was run then.
    """
    flags = parse(argv)
    check_packages("matplotlib", *([] if flags.page_only else ["rouge_score"]))
    if flags.page_only:
        print(write_page(flags.results))
        return
    rows, assets = plan(flags.rows, flags.seeds), assets_hash()
    settings = {row: row_settings(row, flags, assets) for row in rows}
    found = states(rows, settings, flags)
    if flags.list:
        print(show(rows, settings, found, flags.results))
        return
    refused = {row: why for row, why in found.items() if why not in ("done", "to run")}
    if refused and not flags.force:
        lines = [f"row {row.name}: {why}" for row, why in refused.items()]
        raise RowError("\n".join([*lines, "give the same settings, or --force to make these rows again"]))
    for row in refused:
        if begun_otherwise(row, settings[row], flags.work):
            clear(row, flags.work)
    failed = run_rows([row for row in rows if found[row] != "done"], settings, flags)
    if failed:
        raise RowError(f"{len(failed)} rows failed: {', '.join(row.name for row in failed)}; see above")
    print(write_page(flags.results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the row's own process ends, too
    try:
        main()
    except RowError as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
