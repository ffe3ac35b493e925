"""Stored kernels: the numbers of the published forms, written out plainly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.weights.formats.load import load_tower
from minigpt5_jax.weights.quantization import NORMAL_FLOAT, Quantization, block_size, decode_nf4
from minigpt5_jax.weights.stream import stream_tower
from minigpt5_jax.weights.table import CONV, LINEAR, Rule, Table


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def how(method: str, kernel: np.ndarray, stacked: bool = False) -> Quantization:
    return Quantization(method, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), stacked)


@pytest.mark.parametrize("shape", [(24, 6), (3, 3, 8, 6)], ids=["dense", "convolution"])
def test_int8_is_one_scale_for_each_output_channel(shape):
    kernel = random(*shape)
    kernel[..., 2] = 0
    quantization = how("int8", kernel)
    values, scale = quantization.encode(jnp.asarray(kernel))
    assert [(x.shape, x.dtype) for x in quantization.stored] == [(shape, np.int8), ((6,), np.float32)]
    for channel in range(6):
        one = kernel[..., channel]
        step = np.abs(one).max() / np.float32(127) or np.float32(1)
        assert scale[channel] == step
        np.testing.assert_array_equal(values[..., channel], np.round(one / step))
    assert np.abs(values * scale - kernel).max() <= scale.max() / 2 * 1.001


def bitsandbytes_nf4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(packed codes, absmax, dequantised) of a PyTorch weight ``[out, in]``, block by block as there."""
    codes, scales, values = [], [], []
    for block in weight.reshape(-1, 64):
        scales.append(np.abs(block).max())
        code = [int(np.argmin(np.abs(np.array(NORMAL_FLOAT) - x / scales[-1]))) for x in block]
        values += [np.float32(NORMAL_FLOAT[c]) * scales[-1] for c in code]
        codes += [first << 4 | second for first, second in zip(code[::2], code[1::2])]
    return np.array(codes, np.uint8), np.array(scales), np.array(values).reshape(weight.shape)


def test_nf4_is_that_of_bitsandbytes():
    weight = random(6, 192)
    packed, absmax, dequantised = bitsandbytes_nf4(weight)
    values, scale = how("nf4", weight.T).encode(jnp.asarray(weight.T))
    np.testing.assert_array_equal(values.T.ravel(), packed)
    np.testing.assert_array_equal(scale.T.ravel(), absmax)
    np.testing.assert_array_equal(decode_nf4(values, scale, jnp.float32).T, dequantised)


def test_nf4_takes_4_bits_and_a_scale_for_64_weights():
    values, scale = how("nf4", np.empty((32, 4096, 11008), ml_dtypes.bfloat16), stacked=True).stored
    assert (values.size * 8 + scale.size * 32) / (32 * 4096 * 11008) == 4.5
    assert [block_size(n) for n in (11008, 352, 24, 7)] == [64, 44, 24, 7]


@pytest.mark.parametrize(
    "method, shape, message",
    [
        ("nf4", (3, 3, 8, 8), r"matrices of an even number of inputs, not \(3, 3, 8, 8\); use int8"),
        ("nf4", (7, 8), r"even number of inputs, not \(7, 8\)"),
        ("int2", (8, 8), "'int2' is not one of int8, nf4"),
    ],
)
def test_kernels_that_cannot_be_stored(method, shape, message):
    with pytest.raises(ValueError, match=message):
        how(method, random(*shape))


TABLE = Table(
    (Rule("l.{i}.w", "l/kernel", LINEAR), Rule("c.w", "c/kernel", CONV), Rule("l.{i}.n", "l/scale")),
)
SHAPES = {"l/kernel": (3, 128, 8), "c/kernel": (3, 3, 8, 4), "l/scale": (3, 8)}
AXES = {"l/kernel": P(None, "tensor", "fsdp"), "c/kernel": P(None, None, "tensor", "fsdp")}


@pytest.mark.parametrize("in_place", [0, 1 << 30], ids=["in_place", "at_once"])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_kernels_are_quantised_as_they_are_streamed_whatever_holds_their_inputs(method, in_place):
    """Sharded over their inputs, too: a scale is that of the whole channel."""
    source = {f"l.{i}.w": random(8, 128) * (i + 1) for i in range(3)} | {"c.w": random(4, 8, 3, 3)}
    source |= {f"l.{i}.n": random(8) for i in range(3)}
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    targets, quantized = {}, {}
    for path, shape in SHAPES.items():
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        arrays, specs = {path: kernel}, {path: AXES.get(path, P())}
        if path in AXES:
            name = "int8" if path == "c/kernel" else method
            quantized[path] = Quantization(name, kernel, stacked=path == "l/kernel")
            arrays = dict(zip((path, path + "_scale"), quantized[path].stored, strict=True))
            specs[path + "_scale"] = P(*(AXES[path][dim] for dim in quantized[path].scale_dims))
        for name, array in arrays.items():
            place = NamedSharding(mesh, specs[name])
            targets[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
    params = stream_tower(TABLE, source, targets, quantized=quantized, in_place=in_place)
    plain = load_tower(TABLE, source, SHAPES, np.float32)
    assert params.keys() == targets.keys()
    for path, kernel in plain.items():
        stored = quantized[path].encode(jnp.asarray(kernel)) if path in quantized else (kernel,)
        for name, want in zip((path, path + "_scale"), stored):
            assert params[name].sharding == targets[name].sharding
            np.testing.assert_array_equal(params[name], want, err_msg=name)
