"""The autoencoder against diffusers and against the original's recorded numbers."""

from __future__ import annotations

import functools
import math
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.vae.model import SD21_VAE, AutoencoderKL, VaeConfig, sample_posterior
from minigpt5_jax.models.vae.weights import TABLE, rename_legacy
from minigpt5_jax.weights.table import WeightTableError


def hf_config(widths: tuple[int, ...], layers: int) -> dict:
    return dict(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )


CONFIGS = [hf_config((8, 16), 1), hf_config((8, 16, 24, 24), 2)]


def diffusers_vae(config: dict) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():  # fresh biases are zero and scales one: perturb, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in model.state_dict().items()}


# Compiling is most of the time here: unoptimised code is as exact and ready sooner.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def template_of(config: VaeConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray]) -> dict:
    params = TABLE.to_params(rename_legacy(source), {k: s.shape for k, s in template.shapes.items()})
    return jax.tree.map(jnp.asarray, params)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("config, remat", [(CONFIGS[0], True), (CONFIGS[1], False)], ids=["2 remat", "4"])
def test_forward_and_input_gradient_match_diffusers(config, remat):
    reference = diffusers_vae(config)
    template = template_of(VaeConfig.from_hf(config), remat=remat)
    params = load(template, numpy_state(reference))

    for name, channels, side in (("encode", 3, 16), ("decode", 4, 4)):
        x = torch.randn(2, channels, side, side, requires_grad=True)
        out = getattr(reference, name)(x)
        theirs = out.latent_dist.parameters if name == "encode" else out.sample
        weight = torch.randn_like(theirs)
        (theirs * weight).sum().backward()

        @compiled
        def ours_of(x, weight, name=name):
            out, vjp = jax.vjp(getattr(template.bind(params), name), x)
            return out, vjp(weight)[0]

        ours, grad = ours_of(jnp.asarray(channels_last(x)), jnp.asarray(channels_last(weight)))
        assert_close(ours, channels_last(theirs))
        assert_close(grad, channels_last(x.grad))


def test_oracle_moments_and_pixels(oracle_weights, oracle_cases, oracle_configs):
    source = {k.removeprefix("vae."): v for k, v in oracle_weights.items() if k.startswith("vae.")}
    template = template_of(VaeConfig.from_hf(oracle_configs["vae"]))
    vae = template.bind(load(template, source))
    pixels = oracle_cases["s1/a/in/output_image"].transpose(0, 2, 3, 1)
    moments = oracle_cases["s1/a/mid/vae_moments"].transpose(0, 2, 3, 1)
    assert_close(compiled(vae.encode)(jnp.asarray(pixels)), moments, 1e-5)

    latents = oracle_cases["s1/i1_forced/image/vae_decode_in"].transpose(0, 2, 3, 1)
    decoded = oracle_cases["s1/i1_forced/image/decoded"].transpose(0, 2, 3, 1)
    assert_close(compiled(vae.decode)(jnp.asarray(latents)), decoded, 1e-5)


def test_log_variance_is_clamped_and_the_sample_follows_it():
    template = template_of(VaeConfig.from_hf(CONFIGS[0]))
    params = template.init(jax.random.key(0))
    params["quant_conv/bias"] = jnp.array([0, 0, 0, 0, 100, -100, 0, 0], jnp.float32)
    moments = compiled(template.bind(params).encode)(jnp.zeros((1, 4, 4, 3)))
    logvar = np.asarray(moments[..., 4:])
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()

    noise = jax.random.normal(jax.random.key(1), (1, 2, 2, 4))
    want = np.asarray(moments)[..., :4] + np.exp(logvar / 2) * np.asarray(noise)
    np.testing.assert_allclose(sample_posterior(moments, noise), want, rtol=1e-5)


def test_bf16_compute_returns_float32_close_to_float32_compute():
    config = VaeConfig.from_hf(CONFIGS[0])
    params = template_of(config).init(jax.random.key(0))
    pixels = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1, maxval=1)
    exact, rounded = (
        compiled(template_of(config, dtype=dtype).bind(params).encode)(pixels)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_table_round_trip_is_exact_and_old_attention_names_are_read():
    source = numpy_state(diffusers_vae(CONFIGS[0]))
    template = template_of(VaeConfig.from_hf(CONFIGS[0]))
    params = load(template, source)
    again = TABLE.to_source(jax.tree.map(np.asarray, params))
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[k], source[k]) for k in source)

    old = {}
    for key, value in source.items():
        legacy = re.sub(r"\.to_out\.0\.", ".proj_attn.", key)
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            legacy = legacy.replace(f".{new}.", f".{name}.")
        convolution = legacy != key and legacy.endswith("query.weight")
        old[legacy] = value[:, :, None, None] if convolution else value
    assert sum(key not in source for key in old) == 16
    renamed = load(template, old)
    assert renamed.keys() == params.keys()
    assert all(np.array_equal(renamed[k], params[k]) for k in params)

    del source["decoder.conv_out.bias"]
    with pytest.raises(WeightTableError, match="decoder/conv_out/bias"):
        load(template, source)


def test_full_size_counts():
    template = template_of(SD21_VAE)
    sizes = {path: math.prod(shape.shape) for path, shape in template.shapes.items()}

    def count(part: str) -> int:
        return sum(size for path, size in sizes.items() if path.startswith(part))

    assert count("") == 83_653_863
    assert count("encoder/") == 34_163_592 and count("decoder/") == 49_490_179
    assert count("quant_conv/") == 72 and count("post_quant_conv/") == 20
    assert len(sizes) == 248


def test_preset_is_the_published_configuration():
    published = dict(
        _class_name="AutoencoderKL",
        _diffusers_version="0.8.0",
        act_fn="silu",
        sample_size=768,
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
    )
    assert VaeConfig.from_hf(published) == SD21_VAE
    assert SD21_VAE.scaling_factor == 0.18215 and SD21_VAE.downsampling == 8


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "gelu"),
        ("mid_block_add_attention", False),
        ("use_quant_conv", False),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0]),
        ("down_block_types", ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D"]),
    ],
)
def test_unimplemented_configurations_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        VaeConfig.from_hf(CONFIGS[0] | {field: value})


def test_image_that_does_not_divide_is_refused():
    vae = template_of(VaeConfig.from_hf(CONFIGS[1]))
    with pytest.raises(ValueError, match="12 x 16 do not divide by the VAE's factor 8"):
        jax.eval_shape(lambda p: vae.bind(p).encode(jnp.zeros((1, 12, 16, 3))), vae.shapes)
