"""BERT's encoder (Hugging Face ``BertModel``), which sentence embeddings are made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    PublishedSizes,
    check_transformer,
    normal,
    run_layers,
    stack,
)


@dataclasses.dataclass(frozen=True)
class BertConfig(PublishedSizes):
    """Hyper-parameters under the names, and with the defaults, of Hugging Face's ``BertConfig``.

    Dropout rates of a published file are not read: the tower is always in evaluation mode.

    Raises:
      ValueError: a head count that does not divide the width, or an unknown activation.
    """

    tower: ClassVar = "BERT"
    implemented: ClassVar = {"position_embedding_type": ("absolute",), "is_decoder": (False,)}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_transformer(self)


MINILM_L6 = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
"""``sentence-transformers/all-MiniLM-L6-v2``: 22,713,216 parameters, 147,840 of them in an unused pooler."""


class BertLayer(AttentionModule):
    """Self-attention and feed-forward, each with its residual and post-norm."""

    def __init__(self, config: BertConfig, **kwargs: Any):
        self.num_heads, self.activation = config.num_attention_heads, ACTIVATIONS[config.hidden_act]
        width, hidden, heads = (
            config.hidden_size,
            config.intermediate_size,
            ("heads", config.num_attention_heads),
        )
        dense = dict(kernel_init=normal(config.initializer_range), **kwargs)
        self.query, self.key, self.value = (
            Linear(width, width, axes=("embed", heads), **dense) for _ in range(3)
        )
        self.output = Linear(width, width, axes=(heads, "embed"), **dense)
        self.fc1 = Linear(width, hidden, axes=("embed", "mlp"), **dense)
        self.fc2 = Linear(hidden, width, axes=("mlp", "embed"), **dense)
        self.attention_norm, self.output_norm = (
            LayerNorm(width, eps=config.layer_norm_eps, **kwargs) for _ in range(2)
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        projected = self.query(x), self.key(x), self.value(x)
        x = self.attention_norm(x + self.output(self.attend(*projected, self.num_heads, mask=mask)))
        return self.output_norm(x + self.fc2(self.activation(self.fc1(x))))


class Bert(nnx.Module):
    """The encoder without pooler; source names in ``weights.py``."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        width, more = config.hidden_size, dict(rngs=rngs, **dtypes)
        self.word_embeddings = Embedding(config.vocab_size, width, **more)
        rows = dict(axes=(None, "embed"), **more)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, **rows)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width, **rows)
        self.layer_norm = LayerNorm(width, eps=config.layer_norm_eps, **more)
        self.layers = stack(lambda r: BertLayer(config, rngs=r, **dtypes), config.num_hidden_layers, rngs)

    def __call__(
        self, input_ids: Int[Array, "m c"], attention_mask: Int[Array, "m c"] | Bool[Array, "m c"]
    ) -> Float[Array, "m c d"]:
        """Last hidden state of every position of single texts (token type 0).

        Args:
          input_ids: token ids, at most ``max_position_embeddings`` per row.
          attention_mask: nonzero at real tokens.

        Raises:
          ValueError: more tokens than positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens, max_position_embeddings={self.config.max_position_embeddings}"
            )
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(jnp.zeros((), jnp.int32))
        x = self.layer_norm(x + self.position_embeddings(jnp.arange(length)))
        return run_layers(self.layers, x, attention_mask.astype(bool)[:, None, None, :], remat=False)
