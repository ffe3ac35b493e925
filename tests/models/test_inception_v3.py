"""Inception v3 of FID: table and count; its features against the same network written in PyTorch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import fidelity
from minigpt5_jax.evaluation.metrics.networks import InceptionNetwork
from minigpt5_jax.models.inception_v3.model import FID_INCEPTION, InceptionV3
from minigpt5_jax.models.inception_v3.weights import TOWER, table
from minigpt5_jax.weights.table import WeightTableError

SHAPES = TOWER.shapes(FID_INCEPTION)


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    """Random tensors under the names of the published file."""
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in SHAPES.items():
        if path.endswith("kernel"):
            params[path] = rng.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[:-1]))
        elif path.endswith(("scale", "var")):
            params[path] = rng.uniform(0.8, 1.2, shape).astype(np.float32)
        else:
            params[path] = 0.1 * rng.standard_normal(shape, np.float32)
    return table(FID_INCEPTION).to_source(params)


class TorchInception:
    """The network as ``docs/evaluation.md`` describes it, over tensors by their published names."""

    def __init__(self, source):
        self.t = {name: torch.tensor(value) for name, value in source.items()}

    def conv(self, x, name, stride=1, pad=0):
        t = self.t
        x = F.conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=pad)
        stats = (t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *stats, eps=0.001))

    def many(self, x, *calls):
        for call in calls:
            x = self.conv(x, *call)
        return x

    def average(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(self, x, n):
        b = [self.conv(x, f"{n}.branch1x1")]
        b.append(self.many(x, (f"{n}.branch5x5_1",), (f"{n}.branch5x5_2", 1, 2)))
        d = f"{n}.branch3x3dbl_"
        b.append(self.many(x, (d + "1",), (d + "2", 1, 1), (d + "3", 1, 1)))
        return torch.cat([*b, self.conv(self.average(x), f"{n}.branch_pool")], 1)

    def b(self, x, n):
        d = f"{n}.branch3x3dbl_"
        double = self.many(x, (d + "1",), (d + "2", 1, 1), (d + "3", 2))
        return torch.cat([self.conv(x, f"{n}.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)

    def c(self, x, n):
        s, d, row, col = f"{n}.branch7x7_", f"{n}.branch7x7dbl_", (1, (0, 3)), (1, (3, 0))
        seven = self.many(x, (s + "1",), (s + "2", *row), (s + "3", *col))
        steps = ((d + "1",), (d + "2", *col), (d + "3", *row), (d + "4", *col), (d + "5", *row))
        pool = self.conv(self.average(x), f"{n}.branch_pool")
        return torch.cat([self.conv(x, f"{n}.branch1x1"), seven, self.many(x, *steps), pool], 1)

    def d(self, x, n):
        s, d = f"{n}.branch3x3_", f"{n}.branch7x7x3_"
        seven = self.many(x, (d + "1",), (d + "2", 1, (0, 3)), (d + "3", 1, (3, 0)), (d + "4", 2))
        return torch.cat([self.many(x, (s + "1",), (s + "2", 2)), seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x, n, pooled):
        row, col = (1, (0, 1)), (1, (1, 0))
        three = self.conv(x, f"{n}.branch3x3_1")
        double = self.many(x, (f"{n}.branch3x3dbl_1",), (f"{n}.branch3x3dbl_2", 1, 1))
        halves = [self.conv(three, f"{n}.branch3x3_2a", *row), self.conv(three, f"{n}.branch3x3_2b", *col)]
        halves += [self.conv(double, f"{n}.branch3x3dbl_3{k}", *s) for k, s in (("a", row), ("b", col))]
        return torch.cat([self.conv(x, f"{n}.branch1x1"), *halves, self.conv(pooled, f"{n}.branch_pool")], 1)

    def __call__(self, x):
        x = self.many(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
        taps = [F.max_pool2d(x, 3, 2)]
        x = self.many(taps[0], ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
        taps.append(F.max_pool2d(x, 3, 2))
        x = self.a(self.a(self.a(taps[1], "Mixed_5b"), "Mixed_5c"), "Mixed_5d")
        x = self.b(x, "Mixed_6a")
        for name in "bcde":
            x = self.c(x, f"Mixed_6{name}")
        taps.append(x)
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", self.average(x))
        taps.append(self.e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1)))
        means = [tap.mean((2, 3)) for tap in taps]
        return [*means, means[-1] @ self.t["fc.weight"].T]


def test_features_match_pytorch(source):
    params = jax.tree.map(jnp.asarray, table(FID_INCEPTION).to_params(source, SHAPES))
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 83, 91, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = TorchInception(source)(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    from minigpt5_jax.models.abstract import Template

    template = Template.of(lambda rngs: InceptionV3(FID_INCEPTION, rngs=rngs))
    ours = jax.jit(lambda params, pixels: template.bind(params)(pixels))(params, pixels)
    for got, want in zip(ours, theirs, strict=True):
        want = want.numpy()
        assert got.shape == want.shape and np.abs(want).max() > 1e-3
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_table_takes_the_published_names(source):
    counters = {
        f"{name[:-7]}.num_batches_tracked": np.array(0) for name in source if name.endswith(".bn.weight")
    }
    assert len(counters) == 94 and len(source | counters) == 566
    assert source["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    params = table(FID_INCEPTION).to_params(source | counters, SHAPES)
    again = table(FID_INCEPTION).to_source(params)
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[name], source[name]) for name in source)
    lacking = {name: t for name, t in source.items() if name != "Mixed_7c.branch_pool.bn.running_var"}
    with pytest.raises(WeightTableError, match="mixed_7c/branch_pool/var"):
        table(FID_INCEPTION).to_params(lacking, SHAPES)


def test_full_size_parameter_count():
    running = sum(math.prod(shape) for path, shape in SHAPES.items() if path.endswith(("/mean", "/var")))
    assert running == 34_432
    assert sum(map(math.prod, SHAPES.values())) - running == 23_850_960


def test_features_are_those_of_torch_fidelity(source, tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({name: torch.tensor(value) for name, value in source.items()}, path)
    threads = torch.get_num_threads()
    try:
        theirs = fidelity.load(path, threads, 2)
    except ImportError as error:
        pytest.skip(f"torch-fidelity cannot be loaded ({error}); {fidelity.INSTALL}")
    ours = InceptionNetwork(path, "tf1", batch=2)
    rng = np.random.default_rng(0)
    for height, width in ((97, 131), (512, 300)):
        images = list(rng.integers(0, 256, (2, height, width, 3), np.uint8))
        for got, want in zip(ours(images), theirs(images), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
