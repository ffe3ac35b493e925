"""Memory and time of bringing in a LLaMA-7B-shaped checkpoint of random bfloat16 numbers.

    JAX_PLATFORMS=cpu python -m benchmarks.load --folder /tmp/llama      # 27 GB of disk, 16 GB of memory
    JAX_PLATFORMS=cpu python -m benchmarks.load --folder /tmp/small --layers 2

Writes it as PyTorch writes shards of ``pytorch_model.bin`` (this step alone needs torch), rewrites those as
safetensors in the way of ``python -m minigpt5_jax.convert llm``, loads the result onto one device, and
deletes everything.  Each step is a process of its own and prints a JSON line: ``anonymous_gib`` is the peak
of RssAnon, which pages of mapped files are no part of; ``ratio`` is that peak over the bytes that stay.

Measured with 32 layers (13.5 GB) on two busy cores: rewriting 0.09 GiB in 93 s; loading 12.90 GiB for the
12.55 GiB that stay, ratio 1.03.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GIB = 2**30
SHARD_SIZE = 10 * 10**9  # of the published .bin files
STEPS = ("make", "convert", "load")


def rss_anon() -> int:
    """Anonymous memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def watch(result: dict[str, Any]) -> Iterator[None]:
    """Time and the peak of anonymous memory within, into ``result``; looked at every 5 ms."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], rss_anon())

    thread = threading.Thread(target=sample, daemon=True)
    result["before_gib"] = round(rss_anon() / GIB, 3)
    start = time.perf_counter()
    thread.start()
    yield
    result["seconds"] = round(time.perf_counter() - start, 1)
    done.set()
    thread.join()
    result["anonymous_gib"] = round(max(peak[0], rss_anon()) / GIB, 3)


def tensors(layers: int) -> dict[str, tuple[int, int] | tuple[int]]:
    """Names and shapes of LLaMA-7B."""
    shapes: dict[str, Any] = {"model.embed_tokens.weight": (32000, 4096)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (4096, 11008)
        shapes |= {f"{layer}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (4096,), "lm_head.weight": (32000, 4096)}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits with exponents that make numbers of size 0.008 to 0.03, the same for the same name."""
    rng = np.random.default_rng(list(name.encode()))
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16) & 0x80FF | 0x3C00
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16).reshape(shape)


def make(folder: Path, layers: int) -> dict[str, Any]:
    """Shards of ``pytorch_model.bin`` and their index."""
    import torch

    folder.mkdir(parents=True)
    shapes, held, weight_map, total = tensors(layers), {}, {}, 0
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    limit = min(SHARD_SIZE, -(-size // 3)) if layers < 32 else SHARD_SIZE // 4  # torch.save holds a shard
    number = 0

    def flush() -> None:
        torch.save(held, folder / f"pytorch_model-{number:05d}.bin")
        weight_map.update(dict.fromkeys(held, f"pytorch_model-{number:05d}.bin"))
        held.clear()

    for name, shape in shapes.items():
        held[name] = torch.from_numpy(values(name, shape).view(np.int16)).view(torch.bfloat16)
        total += 2 * math.prod(shape)
        if sum(tensor.nbytes for tensor in held.values()) > limit:
            flush()
            number += 1
    if held:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return {"bytes": total, "shards": len(set(weight_map.values()))}


def convert(folder: Path, layers: int) -> dict[str, Any]:
    """The shards as safetensors, every value looked at; then the shards are deleted."""
    from minigpt5_jax.models.llama.model import VICUNA_7B
    from minigpt5_jax.weights.foreign.rewrite import write_tower
    from minigpt5_jax.weights.formats.load import open_weights

    result: dict[str, Any] = {}
    sizes = dataclasses.replace(VICUNA_7B, num_hidden_layers=layers)
    source = open_weights(folder / "bin")
    with watch(result):
        write_tower("llm", source, sizes, folder / "safetensors")
    shutil.rmtree(folder / "bin")
    return result


def load(folder: Path, layers: int) -> dict[str, Any]:
    """Onto the first device, as training does; a few tensors are compared with what was made."""
    import jax
    import jax.numpy as jnp

    from minigpt5_jax.models.llama import weights as llama
    from minigpt5_jax.models.llama.model import VICUNA_7B
    from minigpt5_jax.weights.formats.load import open_weights
    from minigpt5_jax.weights.stream import stream_tower

    sizes = dataclasses.replace(VICUNA_7B, num_hidden_layers=layers)
    targets = {
        path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in llama.TOWER.shapes(sizes).items()
    }
    jax.devices()
    result: dict[str, Any] = {}
    with watch(result):
        params = stream_tower(llama.TABLE, open_weights(folder / "safetensors"), targets)
    resident = sum(value.nbytes for value in params.values())
    last = f"model.layers.{layers - 1}.mlp.gate_proj.weight"
    want = values(last, (11008, 4096)).view(np.uint16).T
    got = np.asarray(params["layers/mlp/gate_proj/kernel"][layers - 1]).view(np.uint16)
    assert np.array_equal(got, want), f"{last} is not what was written"
    ratio = result["anonymous_gib"] * GIB / resident
    return {
        **result,
        "resident_gib": round(resident / GIB, 3),
        "ratio": round(ratio, 3),
        "gb_per_second": round(resident / 1e9 / result["seconds"], 2),
    }


def main() -> None:
    """Run the steps one after the other, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder",
        type=lambda given: Path(given).expanduser(),
        required=True,
        help="new folder for the files",
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--step", choices=STEPS, help="used by the script itself")
    options = parser.parse_args()
    if options.step:
        folder = options.folder / "bin" if options.step == "make" else options.folder
        result = globals()[options.step](folder, options.layers)
        print(json.dumps({"step": options.step, "layers": options.layers, **result}), flush=True)
        return
    options.folder.mkdir(parents=True)
    try:
        for step in STEPS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.load",
                "--folder",
                str(options.folder),
                "--layers",
                str(options.layers),
                "--step",
                step,
            ]
            subprocess.run(command, check=True)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
