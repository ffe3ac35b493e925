"""The demo: train stage 1 in the small world, generate from its checkpoint, count what is right.

    python -m minigpt5_jax.demo --config configs/shapes_stage1.py --workdir runs/demo

An earlier demo in the same workdir is replaced.  The last line is one JSON object: configuration,
steps, seconds, losses (first and last), validation, the oracle's count for pictures drawn from vokens
and by the native UNet, and where to look.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.sources import Cc3mSource
from minigpt5_jax.inference.page import Entry, write_page
from minigpt5_jax.restore import load_run
from minigpt5_jax.shapes.dataset import read_scenes
from minigpt5_jax.shapes.judge_pairs import native_pictures, shares, voken_pictures
from minigpt5_jax.train import USER_ERRORS, make_loop

PICTURES = flags.DEFINE_integer("demo_pictures", 96, "Held-out captions drawn and counted.")
MARK = ".demo"  # tells a folder of ours
SHOWN = 12  # pictures on the page
LOSSES = ("loss", "text", "image", "caption")


def curve(workdir: Path) -> dict[str, list[float]]:
    """Loss name -> [first, last] of the lines that training wrote."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return {name: [lines[0][name], lines[-1][name]] for name in LOSSES if name in lines[0]}


def table(ours: dict[str, float], native: dict[str, float]) -> str:
    """The oracle's count, as text."""
    lines = [f"{'share right':12} {'vokens':>8} {'native':>8}"]
    return "\n".join(lines + [f"{name:12} {ours[name]:8.3f} {native.get(name, 1.0):8.3f}" for name in ours])


def claim(config: ConfigDict) -> Path:
    """The workdir, emptied if it holds an earlier demo.

    Raises:
      ConfigError: none was given, another data format, or the folder holds something else.
    """
    if not config.run.workdir:
        raise ConfigError("give the folder of the demo: --workdir DIR")
    if config.data.format != "shapes":
        raise ConfigError("the demo counts with the oracle of the small world: data.format must be 'shapes'")
    workdir = Path(config.run.workdir)
    if (workdir / MARK).exists():
        shutil.rmtree(workdir)
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} holds something that is no demo; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / MARK).touch()
    return workdir


def demonstrate(config: ConfigDict) -> dict[str, Any]:
    """Everything; returns the summary."""
    start, workdir = time.time(), claim(config)
    cli.set_compile_cache(config)
    validation = make_loop(config).run()
    trained = time.time() - start

    run = load_run(workdir)
    count = min(PICTURES.value, config.data.shapes_validation)
    data = workdir / "data"
    source = Cc3mSource(data / "shapes_held_out.tsv", training=False, num_vokens=run.tokenizer.num_vokens)
    captions, scenes = [source[i].source for i in range(count)], read_scenes(data, "held_out")[:count]
    drawn = voken_pictures(run, captions)
    ours, ceiling = shares(drawn, scenes), shares(native_pictures(run, captions), scenes)
    print(table(ours, ceiling))
    entries = [
        Entry([captions[i]], [picture] if picture is not None else ["(no picture)"], seed=i)
        for i, picture in enumerate(drawn[:SHOWN])
    ]
    page = write_page(workdir / "page", "Drawn from held-out captions", entries, {"checkpoint": workdir})
    grids = sorted((workdir / "pictures").glob("held_out_*.png"))
    return {
        "config": config.run.name,
        "steps": run.step,
        "seconds": round(time.time() - start, 1),
        "seconds_training": round(trained, 1),
        "losses": curve(workdir),
        "validation": validation,
        "oracle": {"ours": ours["all"], "native": ceiling["all"], "pictures": count},
        "grid": str(grids[-1]) if grids else None,
        "page": str(page),
    }


def main(config: ConfigDict) -> None:
    """The command."""
    print(json.dumps(demonstrate(config)))


if __name__ == "__main__":
    cli.run(main, errors=USER_ERRORS)
