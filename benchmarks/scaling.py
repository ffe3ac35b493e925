"""docs/scaling.md: the plan of both stages on one chip to a pod, one case after another.

    python -m benchmarks.scaling              # goes on where it stopped; minutes a case
    python -m benchmarks.scaling --write      # the page from what is there

Each case is one ``minigpt5_jax.plan --json`` in a process of its own, kept in docs/results/scaling.jsonl.
One that was not compiled, or that was refused, says so on the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "scaling.jsonl"
PAGE = ROOT / "docs" / "scaling.md"
MARK = "<!-- written by python -m benchmarks.scaling -->"
LIMIT_S = 1500


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a run file or a variant of it (``stage1:int8``) on a topology, ``batch`` samples a chip.

    ``flags``: None takes the run file as it stands, with the batch it has.
    """

    run_file: str
    topology: str
    batch: int
    flags: tuple[str, ...] | None = ()

    @property
    def command(self) -> list[str]:
        """What is run, without the interpreter."""
        chips = 1
        for size in self.topology.partition(":")[2].split("x"):
            chips *= int(size)
        batch = [f"--config.data.global_batch={self.batch * chips}"]
        given = [] if self.flags is None else [*batch, *self.flags]
        name, colon, variant = self.run_file.partition(":")
        return [
            "-m",
            "minigpt5_jax.plan",
            "--config",
            f"configs/{name}.py{colon}{variant}",
            "--topology",
            self.topology,
            *given,
        ]


USUAL = ("--length=60",)  # half of the steps of stage 1 have rows of at most so many positions
CASES = (
    Case("stage1:int8", "v5e:4x4", 3, None),  # the goals of issue 22
    Case("stage1:int8", "v5e:1x1", 1),
    Case("stage1", "v5e:4x4", 3, USUAL),
    Case("stage1", "v5e:1x1", 1, ("--length=20",)),
    Case("stage1", "h100:1", 8, USUAL),
    Case("stage1", "v5e:16x16", 1, USUAL),
    Case("stage1", "v5p:4x4x8", 1, USUAL),
    Case("stage1", "v6e:4x4", 3, USUAL),
    Case("stage1", "h100:8", 6, USUAL),
    Case("stage2_vist", "v5e:4x4", 13),
    Case("stage2_vist", "h100:1", 13),
    Case("stage2_vist", "h100:8", 13),
    Case("stage1", "v5e:8x8", 1, USUAL),
    Case("stage1", "v5p:4x4x4", 1, USUAL),
    Case("stage1", "v6e:16x16", 1, USUAL),
    Case("stage1", "a6000:4", 4, USUAL),
)


def read_results() -> dict[str, dict[str, Any]]:
    """Command -> its plan, or ``{"error": ...}``."""
    if not RESULTS.exists():
        return {}
    kept = [json.loads(text) for text in RESULTS.read_text().splitlines() if text]
    return {entry["command"]: entry["plan"] for entry in kept}


def run_case(case: Case) -> dict[str, Any]:
    """The plan of a case, or its error."""
    try:
        done = subprocess.run(
            [sys.executable, *case.command, "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {LIMIT_S} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and no message"]
        return {"error": said[-1]}
    return json.loads(done.stdout)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows of the page."""
    heads = (
        "stage",
        "chips",
        "samples a chip",
        "GB of a chip",
        "collectives",
        "wire",
        "step",
        "efficiency",
        "compiled in",
    )
    lines = [" | ".join(["", *heads, ""]).strip(), "|---" * len(heads) + "|"]
    for case in CASES:
        plan = results.get(" ".join(case.command))
        start = [case.run_file, case.topology, str(case.batch)]
        if plan is None or "error" in plan:
            cells = [plan["error"] if plan else "not compiled yet", *[""] * 5]
        else:
            cells = _cells(plan)
        lines.append(" | ".join(["", *start, *cells, ""]).strip())
    return "\n".join(lines)


def _cells(plan: dict[str, Any]) -> list[str]:
    memory = f"{plan['gb_per_chip']:.2f} of {plan['hbm_gb']:.2f}{'' if plan['fits'] else ': does not fit'}"
    seconds = f"{plan['compile_seconds']:.0f} s"
    if plan["step_seconds"] is None:
        return [memory, *[""] * 4, seconds]
    moved = [f"{plan[name]:.3f} GB" for name in ("collective_gb", "wire_gb")]
    return [memory, *moved, f"{plan['step_seconds'] * 1e3:.0f} ms", f"{plan['efficiency']:.1%}", seconds]


def write_page() -> None:
    """The table and the commands behind the mark of the page; what stands before it stays."""
    results = read_results()
    commands = "\n".join(" ".join(["python", *case.command]) for case in CASES)
    before = PAGE.read_text().partition(MARK)[0] if PAGE.exists() else "# Scaling\n\n"
    PAGE.write_text(f"{before}{MARK}\n\n{table(results)}\n\n```\n{commands}\n```\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser("benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="the page alone, nothing is compiled")
    if not parser.parse_args(argv).write:
        done = read_results()
        for case in CASES:
            command = " ".join(case.command)
            if command not in done:
                entry = json.dumps({"command": command, "plan": run_case(case)})
                RESULTS.open("a").write(entry + "\n")
    write_page()


if __name__ == "__main__":
    main()
