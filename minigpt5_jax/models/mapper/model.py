"""Feature mapper: voken states of the language model -> condition of the image generator.

A two-layer MLP, then an encoder-decoder transformer whose decoder input is a learned prompt of as
many vectors as the generator's text encoder has positions.  The transformer has the semantics of
torch's ``nn.Transformer(norm_first=True, activation="relu", dropout=0)``: pre-norm, closing norms
on both halves, no masks and no positional encodings (fidelity 1.11).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import (
    LayerNorm,
    Linear,
    gelu,
    normal,
    param,
    run_layers,
    stack,
    torch_linear,
    uniform,
    uniform_fan_in,
    xavier_uniform,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Hyper-parameters of a mapper's layers under the names of torch's ``nn.Transformer``.

    Attributes:
      llm_hidden_size: width of the voken states.
      num_queries: condition vectors, the context length of the generator's text encoder.

    Raises:
      ValueError: ``nhead`` does not divide ``d_model``.
    """

    llm_hidden_size: int = 4096
    d_model: int = 1024
    nhead: int = 8
    dim_feedforward: int = 4096
    num_queries: int = 77
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.d_model % self.nhead:
            raise ValueError(f"d_model={self.d_model} does not divide into nhead={self.nhead}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapperConfig(LayerConfig):
    """Hyper-parameters of the encoder-decoder; defaults are MiniGPT-5's."""

    num_encoder_layers: int = 4
    num_decoder_layers: int = 4


MINIGPT5_MAPPER = MapperConfig()
"""MiniGPT-5's mapper: 122,899,456 parameters (5,244,928 + 117,575,680 + 78,848)."""


class MultiheadAttention(AttentionModule):
    """torch's ``nn.MultiheadAttention`` with the stacked in-projection kept as three kernels."""

    def __init__(self, config: LayerConfig, **kwargs: Any):
        width, heads = config.d_model, ("heads", config.nhead)
        self.num_heads = config.nhead
        # torch draws q, k and v as one [3 d, d] matrix, so xavier sees fan_in + fan_out = 4 d.
        stacked = dict(axes=("embed", heads), kernel_init=uniform(math.sqrt(6 / (4 * width))), **kwargs)
        self.q_proj = Linear(width, width, **stacked)
        self.k_proj = Linear(width, width, **stacked)
        self.v_proj = Linear(width, width, **stacked)
        self.out_proj = Linear(width, width, axes=(heads, "embed"), kernel_init=xavier_uniform, **kwargs)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        projected = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return self.out_proj(self.attend(*projected, self.num_heads))


class FeedForward(nnx.Module):
    """``linear2(relu(linear1(x)))``."""

    def __init__(self, config: LayerConfig, **kwargs: Any):
        width, hidden = config.d_model, config.dim_feedforward
        kwargs["kernel_init"] = xavier_uniform
        self.linear1 = Linear(width, hidden, axes=("embed", "mlp"), bias_init=uniform_fan_in(width), **kwargs)
        self.linear2 = Linear(
            hidden, width, axes=("mlp", "embed"), bias_init=uniform_fan_in(hidden), **kwargs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(jax.nn.relu(self.linear1(x)))


class EncoderLayer(nnx.Module):
    """``x += self_attn(norm1(x)); x += feed_forward(norm2(x))``."""

    def __init__(self, config: LayerConfig, **kwargs: Any):
        self.norm1 = LayerNorm(config.d_model, eps=config.layer_norm_eps, **kwargs)
        self.self_attn = MultiheadAttention(config, **kwargs)
        self.norm2 = LayerNorm(config.d_model, eps=config.layer_norm_eps, **kwargs)
        self.feed_forward = FeedForward(config, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        return x + self.feed_forward(self.norm2(x))


class DecoderLayer(nnx.Module):
    """``x += self_attn(norm1(x)); x += multihead_attn(norm2(x), memory); x += feed_forward(norm3(x))``."""

    def __init__(self, config: LayerConfig, **kwargs: Any):
        self.norm1 = LayerNorm(config.d_model, eps=config.layer_norm_eps, **kwargs)
        self.self_attn = MultiheadAttention(config, **kwargs)
        self.norm2 = LayerNorm(config.d_model, eps=config.layer_norm_eps, **kwargs)
        self.multihead_attn = MultiheadAttention(config, **kwargs)
        self.norm3 = LayerNorm(config.d_model, eps=config.layer_norm_eps, **kwargs)
        self.feed_forward = FeedForward(config, **kwargs)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.multihead_attn(self.norm2(x), memory)
        return x + self.feed_forward(self.norm3(x))


class LayerStack(nnx.Module):
    """Scanned layers and the closing norm, which returns ``norm_dtype``.

    Args:
      layer: class of a layer.  count: how many.
    """

    def __init__(
        self,
        layer: Callable[..., nnx.Module],
        count: int,
        config: LayerConfig,
        *,
        norm_dtype=jnp.float32,
        remat: bool,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.remat = remat
        self.layers = stack(lambda r: layer(config, rngs=r, **dtypes), count, rngs)
        dtypes["dtype"] = norm_dtype
        self.norm = LayerNorm(config.d_model, eps=config.layer_norm_eps, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n q d"], *memory: Float[Array, "n m d"]) -> Float[Array, "n q d"]:
        return self.norm(run_layers(self.layers, x, *memory, remat=self.remat))


class VokenMlp(nnx.Module):
    """Linear, exact GELU, Linear: from the language model's width to the transformer's."""

    def __init__(self, config: LayerConfig, **kwargs: Any):
        width = config.d_model
        self.fc1 = torch_linear(config.llm_hidden_size, width, axes=("embed", "mlp"), **kwargs)
        self.fc2 = torch_linear(width, width, axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: Float[Array, "n m k"]) -> Float[Array, "n m d"]:
        return self.fc2(gelu(self.fc1(x)))


class FeatureMapper(nnx.Module):
    """The mapper tower; source names in ``weights.py``.

    ``dtype`` is that of the matmuls; the residual streams, LayerNorms, softmax and the output are
    float32 (fidelity 1.13).  ``remat`` recomputes each layer in the backward pass.
    """

    config_class = MapperConfig

    def __init__(self, config: MapperConfig, *, remat: bool = False, **kwargs: Any):
        self.config = config
        self.fc = VokenMlp(config, **kwargs)
        self.encoder = LayerStack(
            EncoderLayer,
            config.num_encoder_layers,
            config,
            norm_dtype=kwargs.get("dtype", jnp.float32),
            remat=remat,
            **kwargs,
        )
        self.decoder = LayerStack(DecoderLayer, config.num_decoder_layers, config, remat=remat, **kwargs)
        shape, dtype = (config.num_queries, config.d_model), kwargs.get("param_dtype", jnp.float32)
        self.queries = param(kwargs["rngs"], normal(1.0), shape, (None, "embed"), dtype)

    def __call__(self, vokens: Float[Array, "n m k"]) -> Float[Array, "n q d"]:
        """Condition [n, num_queries, d_model] in float32 for n groups of voken states.

        A group of zeros gives the unconditional branch of classifier-free guidance: the biases and
        the queries still act (fidelity 3.2 and 3.5).
        """
        memory = self.encoder(self.fc(vokens).astype(jnp.float32))
        queries = self.queries[...].astype(jnp.float32)
        return self.decoder(jnp.broadcast_to(queries, (vokens.shape[0], *queries.shape)), memory)
