"""Streamed loading: the same values as the numpy way, under any sharding, reading no more than is held."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.weights import stream
from minigpt5_jax.weights.formats.load import load_tower, open_weights
from minigpt5_jax.weights.formats.save import save_safetensors
from minigpt5_jax.weights.stream import stream_tower
from minigpt5_jax.weights.table import CONV, LINEAR, Rule, Table, WeightTableError, split
from minigpt5_jax.weights.view import View

TABLE = Table(
    (
        Rule("embed.weight", "embed/embedding"),
        Rule("head.weight", "head/kernel", LINEAR),
        Rule("conv.weight", "conv/kernel", CONV),
        Rule(
            "layers.{i}.qkv.weight",
            ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"),
            split(3, LINEAR),
        ),
        Rule("layers.{i}.norm.weight", "layers/norm/scale"),
    ),
    ignored={"ids": "a buffer"},
)
SHAPES = {
    "embed/embedding": (16, 8),
    "head/kernel": (8, 16),
    "conv/kernel": (3, 3, 8, 4),
    "layers/q/kernel": (4, 8, 16),
    "layers/k/kernel": (4, 8, 16),
    "layers/v/kernel": (4, 8, 16),
    "layers/norm/scale": (4, 8),
}
SPECS = {
    "embed/embedding": P("tensor"),
    "head/kernel": P(None, "tensor"),
    "conv/kernel": P(None, None, "fsdp"),
    "layers/q/kernel": P(None, None, "tensor"),
    "layers/k/kernel": P(None, "fsdp", "tensor"),
    "layers/v/kernel": P("data"),
    "layers/norm/scale": P(),
}


def make_source(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (16, 8), "head.weight": (16, 8), "conv.weight": (4, 8, 3, 3)}
    shapes |= {f"layers.{i}.qkv.weight": (48, 8) for i in range(4)}
    shapes |= {f"layers.{i}.norm.weight": (8,) for i in range(4)}
    made = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return {**made, "ids": np.arange(3)}


def make_targets(dtype, mesh=None) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(
            shape, dtype, sharding=None if mesh is None else NamedSharding(mesh, SPECS[path])
        )
        for path, shape in SHAPES.items()
    }


@pytest.fixture
def source(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", make_source())
    return open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("in_place", [0, 1 << 30], ids=["in_place", "on_host"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_values_and_shardings(source, in_place, dtype, sharded):
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if sharded else None
    targets = make_targets(dtype, mesh)
    params = stream_tower(TABLE, source, targets, in_place=in_place)
    want = load_tower(TABLE, source, SHAPES, dtype)
    assert list(params) == list(SHAPES)
    for path, value in params.items():
        assert value.dtype == dtype and value.shape == SHAPES[path]
        np.testing.assert_array_equal(np.asarray(value), want[path], err_msg=path)
        if sharded:
            assert value.sharding == targets[path].sharding
            for shard in value.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), want[path][shard.index], err_msg=path)


def test_files_of_torch_are_read_in_place_too(tmp_path):
    torch.save({k: torch.from_numpy(v) for k, v in make_source().items()}, tmp_path / "x.bin")
    params = stream_tower(TABLE, open_weights(tmp_path / "x.bin"), make_targets(jnp.float32))
    np.testing.assert_array_equal(params["head/kernel"], make_source()["head.weight"].T)


def test_every_part_is_read_once_however_many_devices_hold_it(source, monkeypatch):
    counted = []
    monkeypatch.setattr(stream, "count_non_finite", lambda value: counted.append(value.size) or 0)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for in_place in (0, 1 << 30):
        counted.clear()
        stream_tower(TABLE, source, make_targets(jnp.float32, mesh), in_place=in_place)
        assert sum(counted) == sum(math.prod(shape) for shape in SHAPES.values())


def test_arrays_do_not_change_with_the_file(tmp_path):
    """Tensors of PyTorch files lie at multiples of 64 bytes, where JAX on a CPU would share their memory."""
    path, embed = tmp_path / "x.pth", make_source()["embed.weight"]
    torch.save({name: torch.from_numpy(value) for name, value in make_source().items()}, path)
    where = path.read_bytes().index(embed.tobytes())
    params = stream_tower(TABLE, open_weights(path), make_targets(jnp.float32))
    with path.open("r+b") as file:
        file.seek(where)
        file.write(bytes(embed.nbytes))
    assert not open_weights(path)["embed.weight"].any()
    np.testing.assert_array_equal(params["embed/embedding"], embed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_that_are_no_numbers_name_their_tensor(tmp_path, bad, dtype):
    content = make_source(dtype)
    content["layers.2.qkv.weight"][40, 3] = bad
    save_safetensors(tmp_path / "x.safetensors", content)
    source = open_weights(tmp_path / "x.safetensors")
    message = r"x\.safetensors: 'layers\.2\.qkv\.weight' holds values that are NaN or infinite"
    with pytest.raises(WeightTableError, match=message):
        stream_tower(TABLE, source, make_targets(jnp.bfloat16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"more.weight": np.ones(1, np.float32)}, r"'more\.weight' is consumed by no rule"),
        ({"head.weight": None}, r"'head/kernel' is written by no source key"),
        ({"layers.1.norm.weight": None}, r"'layers/norm/scale' lacks layers \[1\]"),
        ({"head.weight": np.ones((8, 16), np.float32)}, r"'head\.weight' gives shape \(16, 8\).*\(8, 16\)"),
        ({"conv.weight": np.ones((4, 8), np.float32)}, r"'conv\.weight' of shape \(4, 8\): axes"),
        ({"head.weight": np.ones((16, 8), np.int8)}, r"'head\.weight' is int8, 'head/kernel' is float32"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(change, message, monkeypatch):
    content = {k: v for k, v in {**make_source(), **change}.items() if v is not None}
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: pytest.fail("read"))
    with pytest.raises(WeightTableError, match=message):
        stream_tower(TABLE, View({}, {k: lambda k=k: content[k] for k in content}), make_targets(jnp.float32))


WORKER = """
import json, os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from minigpt5_jax.training import provenance
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.weights import stream
from minigpt5_jax.weights.table import LINEAR, Rule, Table

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
read = []
stream.count_non_finite = lambda value: read.append(value.size) or 0
source = {f"l.{i}.w": np.random.default_rng(i).standard_normal((16, 8)).astype(np.float32) for i in range(4)}
sharding = NamedSharding(make_mesh(data=1, fsdp=1, tensor=4), P(None, None, "tensor"))
targets = {"a/b/l": jax.ShapeDtypeStruct((4, 8, 16), jnp.float32, sharding=sharding)}
table, want = Table((Rule("l.{i}.w", "a/b/l", LINEAR),)), np.stack([w.T for w in source.values()])
provenance.PIECE = 1024
found = []
for in_place in (0, 1 << 30):
    params = stream.stream_tower(table, source, targets, in_place=in_place)
    same = [np.array_equal(s.data, want[s.index]) for s in params["a/b/l"].addressable_shards]
    found += [all(same) and len(same) == 2, provenance.hash_parameters(params)]
print("RESULT", json.dumps([sum(read), found, provenance.hash_parameters({"a/b/l": want})]))
"""


@pytest.mark.slow
def test_two_processes_read_a_half_each():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command, root = [sys.executable, "-c", WORKER], Path(__file__).parents[2]
    workers = [
        subprocess.Popen([*command, str(rank), port], stdout=-1, stderr=-1, text=True, cwd=root)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            line = next((line for line in out.splitlines() if line.startswith("RESULT ")), None)
            assert line, err[-3000:]
            read, found, digest = json.loads(line.removeprefix("RESULT "))
            assert read == 2 * 4 * 16 * 8 / 2  # twice loaded, half of it each time
            assert found == [True, digest] * 2
    finally:
        for worker in workers:
            worker.kill()
