"""Requests a second of the server: one after the other, eight at a time, and far more than it takes.

    python -m benchmarks.serve --checkpoint shapes

Starts ``minigpt5_jax.serve`` for each step and prints a JSON line.  ``alone``: a server of batches of one,
asked by one client.  ``together``: batches of eight, eight clients.  ``crowd``: 200 requests at once, where
every fourth client leaves after a second, and a server of 64 places: what they were told, whether answers are
those of ``together``, and the growth of the server's memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

COLOURS = ("red", "green", "blue", "yellow")
CLIENTS, CROWD, PLACES = 8, 200, 64


@contextlib.contextmanager
def serving(checkpoint: str, batch_size: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server."""
    command = [sys.executable, "-m", "minigpt5_jax.serve", f"--checkpoint={checkpoint}", "--port=0"]
    with tempfile.NamedTemporaryFile("w+") as log:
        more = [f"--batch_size={batch_size}", f"--queue={PLACES}"]
        process = subprocess.Popen([*command, *more], stderr=log, stdout=log)
        try:
            while not (found := re.search(r"ready: (http://\S+?)/ ", Path(log.name).read_text())):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                time.sleep(0.1)
            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait()


def ask(url: str, name: str, seed: int, leave_after: float | None = None) -> tuple[Any, float]:
    """(status, or ``left``; of a good answer its choices) and seconds."""
    text = f"please draw: a large {COLOURS[seed % len(COLOURS)]} circle."
    body = {"model": name, "seed": seed, "messages": [{"role": "user", "content": text}]}
    started = time.perf_counter()
    try:
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=body, timeout=leave_after or 600, trust_env=False
        )
    except httpx.TimeoutException:
        return "left", time.perf_counter() - started
    told = json.dumps(answer.json()["choices"]) if answer.status_code == 200 else answer.status_code
    return told, time.perf_counter() - started


def measure(url: str, name: str, clients: int, count: int) -> tuple[dict[str, float], list[str]]:
    """Requests a second and latency, and the answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        told, seconds = zip(*pool.map(lambda seed: ask(url, name, seed), range(count)))
    taken, seconds = time.perf_counter() - started, sorted(seconds)
    figures = {
        "requests": count,
        "requests_per_second": round(count / taken, 2),
        "median_seconds": round(seconds[count // 2], 2),
        "worst_seconds": round(seconds[-1], 2),
    }
    return figures, list(told)


def rss_mib(process: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def crowd(url: str, name: str, process: int, known: list[str]) -> dict[str, Any]:
    """What 200 requests at once are told."""
    before = rss_mib(process)
    with ThreadPoolExecutor(CROWD) as pool:
        waits = [None if number % 4 else 1.0 for number in range(CROWD)]
        told = [*pool.map(lambda n: ask(url, name, n % len(known), waits[n])[0], range(CROWD))]
    kinds = collections.Counter("answered" if isinstance(one, str) and one != "left" else one for one in told)
    same = all(one == known[n % len(known)] for n, one in enumerate(told) if one not in ("left", 429))
    inside = httpx.get(f"{url}/health", trust_env=False).json()["inside"]
    grown = rss_mib(process) - before
    counts = {str(kind): count for kind, count in kinds.items()}
    return {"told": counts, "same_answers": same, "inside_after": inside, "grown_mib": grown}


def main() -> None:
    """Print a JSON line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="shapes")
    parser.add_argument("--requests", type=int, default=16)
    given = parser.parse_args()
    name = Path(given.checkpoint).name
    with serving(given.checkpoint, 1) as (url, _):
        print(json.dumps({"step": "alone", **measure(url, name, 1, given.requests)[0]}), flush=True)
    with serving(given.checkpoint, CLIENTS) as (url, process):
        figures, known = measure(url, name, CLIENTS, given.requests)
        print(json.dumps({"step": "together", **figures}), flush=True)
        print(json.dumps({"step": "crowd", **crowd(url, name, process, known)}), flush=True)


if __name__ == "__main__":
    main()
