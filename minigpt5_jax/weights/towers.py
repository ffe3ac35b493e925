"""The pretrained towers as their files know them: sizes, table, and what is adapted on the way.

Names are those under ``config.weights``.  Everything that reads a tower's file (training, ``convert``,
``load_pretrained``) goes through here, so all of them accept the same files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.clip_text import SD21_TEXT, ClipTextConfig, ClipTextModel
from minigpt5_jax.models.common import Template
from minigpt5_jax.models.eva_vit import EVA_VIT_G, EvaVit, EvaVitConfig
from minigpt5_jax.models.llama import VICUNA_7B, Llama, LlamaConfig
from minigpt5_jax.models.qformer import BLIP2_QFORMER, QFormer, QFormerConfig
from minigpt5_jax.models.unet import SD21_UNET, UNet2DConditionModel, UNetConfig
from minigpt5_jax.models.vae import SD21_VAE, AutoencoderKL, VaeConfig
from minigpt5_jax.weights.maps import clip_text, eva_vit, llama, llama_proj, qformer, unet, vae
from minigpt5_jax.weights.table import Table
from minigpt5_jax.weights.view import Tensors

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Tower:
    """A pretrained tower.

    Attributes:
      preset: its full size.
      from_hf: sizes from a ``config.json``.
      shapes: sizes -> path -> shape of every parameter a file must give, without the tower's prefix.
      table: (source keys, sizes) -> rules that fit these keys.
      adapt: (source, sizes) -> source in the form the table reads (old names, another grid).
      key: where in a torch container its tensors are; None for a plain dictionary.
      section: where in BLIP-2's ``config.json`` its sizes are.
    """

    preset: Any
    from_hf: Callable[[Mapping[str, Any]], Any]
    shapes: Callable[[Any], Shapes]
    table: Callable[[Iterable[str], Any], Table]
    adapt: Callable[[Tensors, Any], Tensors] = lambda source, _: source
    key: str | None = None
    section: str | None = None


def _shapes_of(make: Callable[[Any, nnx.Rngs], nnx.Module]) -> Callable[[Any], Shapes]:
    @functools.cache  # sizes are frozen
    def shapes(config: Any) -> Shapes:
        found = Template.of(lambda rngs: make(config, rngs)).shapes
        return {path: shape.shape for path, shape in found.items()}

    return shapes


def _llama_shapes(config: LlamaConfig) -> Shapes:
    """Without new rows: a pretrained file has none."""
    shapes = _shapes_of(lambda c, rngs: Llama(c, num_new_tokens=1, rngs=rngs, **DTYPES))(config)
    return {path: shape for path, shape in shapes.items() if not path.endswith("/voken")}


def _qformer_shapes(config: QFormerConfig) -> Shapes:
    """With the norm of the vision tower's output, which BLIP-2 trained with it."""
    shapes = _shapes_of(lambda c, rngs: QFormer(c, rngs=rngs, **DTYPES))(config)
    norm = {f"ln_vision/{leaf}": (config.encoder_hidden_size,) for leaf in ("scale", "bias")}
    return {f"qformer/{path}": shape for path, shape in shapes.items()} | norm


def _projection_shapes(config: llama_proj.ProjectionConfig) -> Shapes:
    return {"kernel": (config.in_features, config.out_features), "bias": (config.out_features,)}


TOWERS: dict[str, Tower] = {
    "llm": Tower(VICUNA_7B, LlamaConfig.from_hf, _llama_shapes, lambda _, config: llama.table(config)),
    "vit": Tower(
        EVA_VIT_G,
        EvaVitConfig.from_hf,
        _shapes_of(lambda c, rngs: EvaVit(c, rngs=rngs, **DTYPES)),
        eva_vit.table_for,
        eva_vit.fit_positions,
        section="vision_config",
    ),
    "qformer": Tower(
        BLIP2_QFORMER,
        QFormerConfig.from_hf,
        _qformer_shapes,
        qformer.table_for,
        key="model",
        section="qformer_config",
    ),
    "llama_proj": Tower(
        llama_proj.ProjectionConfig(),
        lambda config: llama_proj.ProjectionConfig(**config),
        _projection_shapes,
        lambda *_: llama_proj.TABLE,
        key="model",
    ),
    "unet": Tower(
        SD21_UNET,
        UNetConfig.from_hf,
        _shapes_of(lambda c, rngs: UNet2DConditionModel(c, rngs=rngs, remat=False, **DTYPES)),
        lambda *_: unet.TABLE,
    ),
    "vae": Tower(
        SD21_VAE,
        VaeConfig.from_hf,
        _shapes_of(lambda c, rngs: AutoencoderKL(c, rngs=rngs, remat=False, **DTYPES)),
        lambda *_: vae.TABLE,
        lambda source, _: vae.rename_legacy(source),
    ),
    "text_encoder": Tower(
        SD21_TEXT,
        ClipTextConfig.from_hf,
        _shapes_of(lambda c, rngs: ClipTextModel(c, rngs=rngs, remat=False, **DTYPES)),
        lambda keys, _: clip_text.table_for(keys),
    ),
}
