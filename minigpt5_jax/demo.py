"""The demo: train stage 1 in the small world, generate from its checkpoint, count what is right.

    python -m minigpt5_jax.demo --config configs/shapes_stage1.py --workdir runs/demo

An earlier demo in the same workdir is replaced.  The last line is one JSON object: configuration,
steps, seconds, losses (first and last), validation, the oracle's count for images drawn from vokens
and by the native UNet, the share of captions behind which vokens were written, and where to look.  The page
has the oracle's table.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource
from minigpt5_jax.evaluation.held_out import watchers
from minigpt5_jax.evaluation.shapes.pairs import native_images, shares, voken_images
from minigpt5_jax.inference.page import Entry, write_page
from minigpt5_jax.shapes.dataset import read_scenes
from minigpt5_jax.wiring.restore import load_run
from minigpt5_jax.wiring.training import make_loop

IMAGES = flags.DEFINE_integer("demo_images", 96, "Held-out captions drawn and counted.", lower_bound=1)
MARK = ".demo"  # tells a folder of ours
SHOWN = 12  # captions on the page
NOTE = "left: from vokens; right: by the frozen text encoder and UNet from the caption"
LOSSES = ("loss", "text", "image", "caption")


def curve(workdir: Path) -> dict[str, list[float]]:
    """Loss name -> [first, last] of the lines that training wrote."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return {name: [lines[0][name], lines[-1][name]] for name in LOSSES if name in lines[0]}


def table(ours: dict[str, float], native: dict[str, float]) -> dict[str, str]:
    """The oracle's count: what is right -> its shares from vokens and natively."""
    return {name: f"{ours[name]:.3f}  native {native.get(name, 1.0):.3f}" for name in ours}


def claim(config: ConfigDict) -> Path:
    """The workdir, emptied if it holds an earlier demo.

    Raises:
      ConfigError: none was given, another data format, or the folder holds something else.
      OSError: it cannot be written.
    """
    if not config.run.workdir:
        raise ConfigError("give the folder of the demo: --workdir DIR")
    if config.data.format != "shapes":
        raise ConfigError("the demo counts with the oracle of the small world: data.format must be 'shapes'")
    workdir = Path(cli.check_writable(config.run.workdir, "workdir"))
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
    validation = make_loop(config, watchers).run()
    trained = time.time() - start

    run = load_run(workdir)
    count = min(IMAGES.value, config.data.shapes_validation)
    data = workdir / "data"
    rules = PairRules(training=False, num_vokens=run.tokenizer.num_vokens)
    source = Cc3mSource(data / "shapes_held_out.tsv", rules=rules)
    captions, scenes = [source[i].source for i in range(count)], read_scenes(data, "held_out")[:count]
    drawn = voken_images(run, captions)
    native = native_images(run, captions)
    ours, ceiling = shares(drawn, scenes), shares(native, scenes)
    counted = {f"right: {name}": value for name, value in table(ours, ceiling).items()}
    print("\n".join(f"{name:18} {value}" for name, value in counted.items()))
    entries = [
        Entry([caption], ["(no image)" if image is None else image, beside], seed=number, notes=NOTE)
        for number, (caption, image, beside) in enumerate(zip(captions, drawn, native, strict=True))
    ]
    metadata = {"checkpoint": workdir, "held-out captions": count, **counted}
    page = write_page(workdir / "page", "Drawn from held-out captions", entries[:SHOWN], metadata)
    grids = sorted((workdir / "images").glob("held_out_*.png"))
    return {
        "config": config.run.name,
        "steps": run.step,
        "seconds": round(time.time() - start, 1),
        "seconds_training": round(trained, 1),
        "losses": curve(workdir),
        "validation": validation,
        "oracle": {"ours": ours["all"], "native": ceiling["all"], "drawn": ours["drawn"], "images": count},
        "grid": str(grids[-1]) if grids else None,
        "page": str(page),
    }


def main(config: ConfigDict) -> None:
    """The command."""
    print(json.dumps(demonstrate(config)))
    cli.tell(f"talk to it: {sys.executable} -m minigpt5_jax.serve --checkpoint {config.run.workdir}")


if __name__ == "__main__":
    cli.run(main)
