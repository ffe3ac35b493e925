"""Stable Diffusion's single-file checkpoints: their original names -> those of a diffusers folder.

The tables here pair names with names (their targets are tensors of the folder, not parameters), so that a
single file becomes a folder like any other; :func:`minigpt5_jax.weights.check.rename` applies them.
Where a block stands in the original's flat lists follows from the sizes, so a table is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from minigpt5_jax.models.clip_text.model import ClipTextConfig
from minigpt5_jax.models.unet.model import UNetConfig
from minigpt5_jax.models.vae.model import VaeConfig
from minigpt5_jax.weights.table import Op, Rule, Table, each, split

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."

SQUEEZE = Op("squeeze", lambda x: (x.reshape(x.shape[:2]),), lambda xs: xs[0][:, :, None, None])
"""The original's attention in the autoencoder is made of 1x1 convolutions; diffusers has dense layers."""

IGNORED = {
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar": (
        "a table of the noise schedule; scheduler_config.json has its parameters"
    ),
    r"model_ema\..*": "running averages kept for training on; the weights themselves are read",
    r"cond_stage_model\.model\.(text_projection|logit_scale)": "CLIP's joint space with images; not used",
    r"cond_stage_model\.model\.attn_mask": "the causal mask, a buffer",
}


def _both(source: str, target: str) -> tuple[Rule, ...]:
    """Weight and bias, unchanged."""
    return tuple(Rule(f"{source}.{name}", f"{target}.{name}") for name in ("weight", "bias"))


def _resnet(source: str, target: str) -> Iterator[Rule]:
    names = "in_layers.0>norm1 in_layers.2>conv1 emb_layers.1>time_emb_proj out_layers.0>norm2"
    names += " out_layers.3>conv2 skip_connection>conv_shortcut"
    yield from each(_both, f"{source}.", f"{target}.", names.split())


def _transformer(source: str, target: str) -> Iterator[Rule]:
    """The same names inside, in both."""
    block = "transformer_blocks.0"
    both = ["norm", "proj_in", "proj_out", *(f"{block}.norm{k}" for k in (1, 2, 3))]
    both += [f"{block}.attn{k}.to_out.0" for k in (1, 2)] + [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    yield from each(_both, f"{source}.", f"{target}.", both)
    for k in (1, 2):
        for name in ("to_q", "to_k", "to_v"):
            yield Rule(f"{source}.{block}.attn{k}.{name}.weight", f"{target}.{block}.attn{k}.{name}.weight")


def _unet_rules(config: UNetConfig) -> Iterator[Rule]:
    yield from _both("input_blocks.0.0", "conv_in")
    yield from each(_both, "time_embed.", "time_embedding.", ("0>linear_1", "2>linear_2"))
    levels, place = len(config.block_out_channels), 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(config.layers_per_block):
            yield from _resnet(f"input_blocks.{place}.0", f"down_blocks.{i}.resnets.{j}")
            if kind.startswith("CrossAttn"):
                yield from _transformer(f"input_blocks.{place}.1", f"down_blocks.{i}.attentions.{j}")
            place += 1
        if i < levels - 1:
            yield from _both(f"input_blocks.{place}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
            place += 1
    for old, j in (("middle_block.0", 0), ("middle_block.2", 1)):
        yield from _resnet(old, f"mid_block.resnets.{j}")
    yield from _transformer("middle_block.1", "mid_block.attentions.0")
    place = 0
    for i, kind in enumerate(config.up_block_types):
        attends = kind.startswith("CrossAttn")
        for j in range(config.layers_per_block + 1):
            yield from _resnet(f"output_blocks.{place}.0", f"up_blocks.{i}.resnets.{j}")
            if attends:
                yield from _transformer(f"output_blocks.{place}.1", f"up_blocks.{i}.attentions.{j}")
            if i < levels - 1 and j == config.layers_per_block:
                yield from _both(
                    f"output_blocks.{place}.{1 + attends}.conv", f"up_blocks.{i}.upsamplers.0.conv"
                )
            place += 1
    yield from _both("out.0", "conv_norm_out")
    yield from _both("out.2", "conv_out")


def _vae_rules(config: VaeConfig) -> Iterator[Rule]:
    last = len(config.block_out_channels) - 1

    def resnet(source: str, target: str) -> Iterator[Rule]:
        names = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut>conv_shortcut")
        yield from each(_both, f"{source}.", f"{target}.", names)

    for side in ("encoder", "decoder"):
        yield from each(_both, f"{side}.", f"{side}.", ("conv_in", "norm_out>conv_norm_out", "conv_out"))
        for k in (1, 2):
            yield from resnet(f"{side}.mid.block_{k}", f"{side}.mid_block.resnets.{k - 1}")
        old, new = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        yield from _both(f"{old}.norm", f"{new}.group_norm")
        for name, target in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            yield Rule(f"{old}.{name}.weight", f"{new}.{target}.weight", SQUEEZE)
            yield Rule(f"{old}.{name}.bias", f"{new}.{target}.bias")
    for i in range(last + 1):  # the original counts the decoder's levels from the image
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{last - i}"
        for j in range(config.layers_per_block):
            yield from resnet(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}")
        for j in range(config.layers_per_block + 1):
            yield from resnet(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}")
        yield from _both(f"encoder.down.{i}.downsample.conv", f"{down}.downsamplers.0.conv")
        yield from _both(f"decoder.up.{i}.upsample.conv", f"{up}.upsamplers.0.conv")
    yield from each(_both, "", "", ("quant_conv", "post_quant_conv"))


def _text_rules() -> Iterator[Rule]:
    old, new = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"
    yield Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield Rule("positional_embedding", "text_model.embeddings.position_embedding.weight")
    yield from _both("ln_final", "text_model.final_layer_norm")
    for name in ("weight", "bias"):
        heads = tuple(f"{new}.self_attn.{part}_proj.{name}" for part in "qkv")
        yield Rule(f"{old}.attn.in_proj_{name}", heads, split(3))
    names = "attn.out_proj>self_attn.out_proj ln_1>layer_norm1 ln_2>layer_norm2 mlp.c_fc>mlp.fc1"
    yield from each(_both, f"{old}.", f"{new}.", f"{names} mlp.c_proj>mlp.fc2".split())


def unet(config: UNetConfig) -> Table:
    """``model.diffusion_model.*`` -> names of ``unet/``."""
    return Table(tuple(_unet_rules(config))).prefixed(UNET)


def vae(config: VaeConfig) -> Table:
    """``first_stage_model.*`` -> names of ``vae/``."""
    return Table(tuple(_vae_rules(config))).prefixed(VAE)


def text_encoder(config: ClipTextConfig) -> Table:
    """``cond_stage_model.model.*`` (OpenCLIP) -> names of ``text_encoder/``.

    Layers at or beyond ``num_hidden_layers`` are left out: Stable Diffusion 2 listens to the last but one.
    """
    depth = config.num_hidden_layers
    built = "|".join(map(str, range(depth)))
    why = f"layer {depth + 1} of OpenCLIP; Stable Diffusion 2 listens to the one before the last"
    ignored = {rf"transformer\.resblocks\.(?!({built})\.)\d+\..*": why}
    return Table(tuple(_text_rules()), ignored).prefixed(TEXT)
