"""The UNet against diffusers and against the original's recorded numbers."""

from __future__ import annotations

import functools
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.diffusion_blocks import Upsample2D
from minigpt5_jax.models.unet.model import SD21_UNET, UNet2DConditionModel, UNetConfig, timestep_embedding
from minigpt5_jax.models.unet.weights import TABLE
from minigpt5_jax.training.flops import count_flops
from minigpt5_jax.weights.table import WeightTableError

SMALL = dict(
    sample_size=8,
    block_out_channels=[8, 16],
    layers_per_block=1,
    attention_head_dim=[2, 4],
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=12,
    norm_num_groups=4,
    use_linear_projection=True,
)
# The order of block types turned round, another width at every level, sines first.
ODD = SMALL | dict(
    block_out_channels=[8, 16, 24],
    attention_head_dim=4,
    layers_per_block=2,
    in_channels=5,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-3,
)


def diffusers_unet(config: dict) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**config).eval()
    with torch.no_grad():  # fresh biases are zero and scales one: perturb, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in model.state_dict().items()}


# Compiling is most of the time here: unoptimised code is as exact and ready sooner.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def template_of(config: UNetConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: UNet2DConditionModel(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray]) -> dict:
    params = TABLE.to_params(source, {k: s.shape for k, s in template.shapes.items()})
    return jax.tree.map(jnp.asarray, params)


def channels_last(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x), 1, -1)


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("config, remat", [(SMALL, True), (ODD, False)], ids=["small remat", "odd"])
def test_forward_and_input_gradients_match_diffusers(config, remat):
    reference = diffusers_unet(config)
    template = template_of(UNetConfig.from_hf(config), remat=remat)
    params = load(template, numpy_state(reference))

    latents = torch.randn(2, config.get("in_channels", 4), 8, 4, requires_grad=True)
    context = torch.randn(2, 5, 12, requires_grad=True)
    timesteps = torch.tensor([7, 981])
    theirs = reference(latents, timesteps, context).sample
    weight = torch.randn_like(theirs)
    (theirs * weight).sum().backward()

    @compiled
    def ours_of(latents, context, weight):
        model = template.bind(params)
        steps = jnp.asarray(timesteps.numpy(), jnp.int32)
        out, vjp = jax.vjp(lambda latents, context: model(latents, steps, context), latents, context)
        return out, vjp(weight)

    ours, (latent_grad, context_grad) = ours_of(
        jnp.asarray(channels_last(latents)),
        jnp.asarray(context.detach().numpy()),
        jnp.asarray(channels_last(weight)),
    )
    assert_close(ours, channels_last(theirs))
    assert_close(latent_grad, channels_last(latents.grad))
    assert_close(context_grad, context.grad)


def test_oracle_prediction_and_tensor_count(oracle_weights, oracle_cases, oracle_configs):
    source = {k.removeprefix("unet."): v for k, v in oracle_weights.items() if k.startswith("unet.")}
    template = template_of(UNetConfig.from_hf(oracle_configs["unet"]))
    params = load(template, source)
    case = {k.removeprefix("s1/a/"): v for k, v in oracle_cases.items() if k.startswith("s1/a/")}
    ours = compiled(template.bind(params))(
        jnp.asarray(channels_last(case["mid/unet_in"])),
        jnp.asarray(case["rng/timesteps"], jnp.int32),
        jnp.asarray(case["mid/mapper_out"]),
    )
    assert_close(ours, channels_last(case["mid/unet_out"]), 1e-5)

    # The recorded UNet has every block of the full-size one, only narrower.
    again = TABLE.to_source(jax.tree.map(np.asarray, params))
    assert len(source) == 686 and again.keys() == source.keys()
    assert all(np.array_equal(again[k], source[k]) for k in source)
    assert template.shapes.keys() == template_of(SD21_UNET).shapes.keys()

    del source["mid_block.resnets.1.conv2.bias"]
    with pytest.raises(WeightTableError, match="mid_block/resnets/1/conv2/bias"):
        load(template, source)


def test_remat_covers_every_resnet_and_transformer():
    def checkpoints(remat: bool) -> int:
        unet = template_of(UNetConfig.from_hf(SMALL), remat=remat)
        inputs = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, int), jnp.zeros((1, 3, 12))
        jaxpr = jax.make_jaxpr(lambda params: unet.bind(params)(*inputs))(unet.shapes)
        return sum("remat" in equation.primitive.name for equation in jaxpr.eqns)

    resnets, transformers = 2 + 2 + 4, 1 + 1 + 2  # of the down, mid and up blocks
    assert (checkpoints(False), checkpoints(True)) == (0, resnets + transformers)


def test_the_backward_pass_ends_at_the_first_cross_attention():
    template, inputs = template_of(UNetConfig.from_hf(SMALL)), (jnp.zeros((2, 8, 8, 4)), jnp.zeros(2, int))

    def loss(params, context):
        return jnp.square(template.bind(params)(*inputs, context)).sum()

    context, conv = jnp.zeros((2, 3, 12)), "conv_general_dilated"
    forward = count_flops(loss, template.shapes, context).by_primitive[conv]
    both = count_flops(jax.value_and_grad(loss, 1), template.shapes, context).by_primitive[conv]
    width, pixels = 8, 2 * 8 * 8
    no_gradient = 2 * pixels * 9 * width * (4 + 2 * width)  # conv_in and the first resnet
    assert both == 2 * forward - no_gradient


def test_doubling_before_a_convolution_repeats_no_product():
    template = Template.of(lambda rngs: Upsample2D(6, rngs=rngs))
    pixels = jnp.zeros((2, 5, 4, 6))
    flops = count_flops(lambda params: template.bind(params)(pixels), template.shapes).total
    assert flops == 2 * (2 * 10 * 8) * 4 * 6 * 6  # four taps a pixel in the place of nine


def test_full_size_parameter_count():
    shapes = template_of(SD21_UNET).shapes
    assert sum(math.prod(shape.shape) for shape in shapes.values()) == 865_910_724


def test_preset_is_the_published_configuration():
    published = dict(
        _class_name="UNet2DConditionModel",
        act_fn="silu",
        attention_head_dim=[5, 10, 20, 20],
        block_out_channels=[320, 640, 1280, 1280],
        center_input_sample=False,
        cross_attention_dim=1024,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        downsample_padding=1,
        dual_cross_attention=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        in_channels=4,
        layers_per_block=2,
        mid_block_scale_factor=1,
        norm_eps=1e-5,
        norm_num_groups=32,
        num_class_embeds=None,
        only_cross_attention=False,
        out_channels=4,
        sample_size=64,
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        use_linear_projection=True,
    )
    assert UNetConfig.from_hf(published) == SD21_UNET


def test_sinusoid_orders_and_frequencies():
    steps = jnp.array([0, 3])
    cosines_first = np.asarray(timestep_embedding(steps, 4, flip_sin_to_cos=True, freq_shift=0))
    angles = 3 * np.array([1.0, 0.01])
    np.testing.assert_allclose(cosines_first[1], [*np.cos(angles), *np.sin(angles)], rtol=1e-6)
    np.testing.assert_array_equal(cosines_first[0], [1, 1, 0, 0])
    sines_first = np.asarray(timestep_embedding(steps, 4, flip_sin_to_cos=False, freq_shift=0))
    np.testing.assert_array_equal(sines_first, cosines_first[:, [2, 3, 0, 1]])


def test_bf16_compute_returns_float32_close_to_float32_compute():
    config = UNetConfig.from_hf(SMALL)
    params = load(template_of(config), numpy_state(diffusers_unet(SMALL)))
    latents, context = jax.random.normal(jax.random.key(1), (1, 4, 4, 4)), jnp.ones((1, 3, 12))
    exact, rounded = (
        compiled(template_of(config, dtype=dtype).bind(params))(latents, jnp.array([500]), context)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_linear_projection", False),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text"),
        ("act_fn", "gelu"),
        ("only_cross_attention", True),
        ("dual_cross_attention", True),
        ("transformer_layers_per_block", 2),
        ("encoder_hid_dim", 8),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("num_attention_heads", 4),
        ("mid_block_type", None),
        ("layers_per_block", [1, 1]),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("attention_head_dim", [2]),
        ("attention_head_dim", 3),
    ],
)
def test_unimplemented_configurations_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        UNetConfig.from_hf(SMALL | {field: value})


def test_default_projection_of_diffusers_is_refused_too():
    with pytest.raises(ValueError, match="use_linear_projection=False"):
        UNetConfig.from_hf({k: v for k, v in SMALL.items() if k != "use_linear_projection"})


def test_latents_that_do_not_divide_are_refused():
    unet = template_of(UNetConfig.from_hf(SMALL))
    with pytest.raises(ValueError, match="6 x 7 do not divide by the UNet's factor 2"):
        inputs = jnp.zeros((1, 6, 7, 4)), jnp.zeros(1, int), jnp.zeros((1, 3, 12))
        jax.eval_shape(lambda params: unet.bind(params)(*inputs), unet.shapes)
