"""LLaMA with voken rows kept apart and LoRA declared at construction (fidelity 1.5, 2.1, 4.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from minigpt5_jax.models.attention import AttentionModule, inside_segments, inside_subtrees, split_heads
from minigpt5_jax.models.common import (
    ACTIVATIONS,
    Embedding,
    Linear,
    Params,
    PublishedSizes,
    RMSNorm,
    layers_are_apart,
    normal,
    param,
    scan_layers,
    stack,
    zeros,
)
from minigpt5_jax.models.lora import LoraConfig, LoraLinear
from minigpt5_jax.models.prefix import PrefixConfig, PrefixEncoder, prepend

_IMPLEMENTED = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "pretraining_tp": (1,),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(PublishedSizes):
    """Hugging Face ``LlamaConfig`` fields; defaults are LLaMA-7B's."""

    tower = "LLaMA"
    implemented = _IMPLEMENTED

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"LLaMA hidden_size={self.hidden_size} does not divide by "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"LLaMA num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_key_value_heads={self.key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values (fewer than the queries' under grouped-query attention)."""
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> LlamaConfig:
        """:meth:`PublishedSizes.from_hf`, ``rope_theta`` in transformers 5's spelling too."""
        rope = config.get("rope_parameters") or {}
        made = super().from_hf({**config, **rope}, **overrides)
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"LLaMA rope_type={rope['rope_type']!r} is not implemented (only 'default')")
        if config.get("head_dim") not in (None, made.head_dim):
            raise ValueError(f"LLaMA head_dim={config['head_dim']} is not hidden_size / num_attention_heads")
        return made


VICUNA_7B = LlamaConfig()
"""Vicuna-7B v0: 6,738,415,616 parameters without new rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer, in the order in which attention multiplies them.

    Attributes:
      keys, values: [layers b kv_heads s head_dim]; where the layers are apart, a tuple with an array for each
        (:func:`~minigpt5_jax.models.abstract.take_layers_apart`): a slice of one array would be a copy of a
        layer's whole cache for every token.
      lengths: i32[b], entries filled in each row; rows grow independently.
    """

    keys: Any
    values: Any
    lengths: Any


def rotary(positions: Int[Array, "b t"], head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotate-half layout, fp32 [b t 1 head_dim]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of [b t heads head_dim]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _store(cache: Any, number: Any, rows: jax.Array, slots: jax.Array, new: jax.Array) -> Any:
    """Keys or values of all layers with ``new`` [b s kv_heads head_dim] of layer ``number`` at ``slots``."""
    if isinstance(cache, tuple):
        stored = cache[number].at[rows, :, slots].set(new.astype(cache[number].dtype), mode="drop")
        return (*cache[:number], stored, *cache[number + 1 :])
    return cache.at[number, rows, :, slots].set(new.astype(cache.dtype), mode="drop")


def _fold_in(keys: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """Each row's key with ``number`` folded in; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class LlamaAttention(AttentionModule):
    """Causal self-attention with rotary positions and grouped-query heads."""

    layout = "rows"

    def __init__(self, config: LlamaConfig, *, lora: LoraConfig | None, **kwargs: Any):
        self.config = config
        heads, kv_heads = config.num_attention_heads, config.key_value_heads
        width, kv_width = heads * config.head_dim, kv_heads * config.head_dim

        kwargs["kernel_init"] = normal(config.initializer_range)

        def projection(name: str, inner: int, outer: int, axes):
            update = lora if lora and name in lora.target_modules else None
            return LoraLinear(inner, outer, axes=axes, lora=update, **kwargs)

        hidden = config.hidden_size
        self.q_proj = projection("q_proj", hidden, width, ("embed", ("heads", heads)))
        self.k_proj = projection("k_proj", hidden, kv_width, ("embed", ("heads", kv_heads)))
        self.v_proj = projection("v_proj", hidden, kv_width, ("embed", ("heads", kv_heads)))
        self.o_proj = projection("o_proj", width, hidden, (("heads", heads), "embed"))

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array, dropout_keys: jax.Array | None = None):
        """Rotated queries and keys, and values."""
        config = self.config
        query = split_heads(self.q_proj(x, _fold_in(dropout_keys, 0)), config.num_attention_heads)
        key = split_heads(self.k_proj(x, _fold_in(dropout_keys, 1)), config.key_value_heads)
        value = split_heads(self.v_proj(x, _fold_in(dropout_keys, 2)), config.key_value_heads)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def output(self, attended: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Projection back to the residual stream."""
        return self.o_proj(attended, _fold_in(dropout_keys, 3))


class LlamaMlp(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, **kwargs: Any):
        kwargs |= {"bias": False, "kernel_init": normal(config.initializer_range)}
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, axes=("embed", "mlp"), **kwargs)
        self.up_proj = Linear(hidden, inner, axes=("embed", "mlp"), **kwargs)
        self.down_proj = Linear(inner, hidden, axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS["silu"](self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nnx.Module):
    """Pre-norm block; the residual stream stays fp32 (fidelity 1.13)."""

    def __init__(self, config: LlamaConfig, *, lora: LoraConfig | None, **kwargs: Any):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.self_attn = LlamaAttention(config, lora=lora, **kwargs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.mlp = LlamaMlp(config, **kwargs)

    def finish(self, x: jax.Array, attended: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Everything behind the attention."""
        x = x + self.self_attn.output(attended, dropout_keys)
        return x + self.mlp(self.post_attention_layernorm(x))


class VokenEmbedding(Embedding):
    """Frozen table plus trainable fp32 rows of the new tokens, never one array (decision 5)."""

    def __init__(self, config: LlamaConfig, *, num_new: int, rngs: nnx.Rngs, **kwargs: Any):
        init, width = normal(config.initializer_range), config.hidden_size
        super().__init__(config.vocab_size, width, init=init, rngs=rngs, **kwargs)
        self.voken = param(rngs, normal(0.02), (num_new, width), (None, "embed"))

    def __call__(self, ids: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
        """Rows of ``ids``, those of the frozen table times ``scale``."""
        old = self.embedding.shape[0]
        base = scale * self.embedding[...][jnp.clip(ids, 0, old - 1)].astype(jnp.float32)
        new = self.voken[...][jnp.clip(ids - old, 0, self.voken.shape[0] - 1)]
        return jnp.where((ids < old)[..., None], base, new)


class VokenHead(nnx.Module):
    """Output head as two blocks: frozen vocabulary and new rows."""

    def __init__(
        self, config: LlamaConfig, *, num_new: int, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
    ):
        self.dtype = dtype
        init, width = normal(config.initializer_range), config.hidden_size
        self.kernel = param(rngs, init, (width, config.vocab_size), ("embed", "vocab"), param_dtype)
        self.voken = param(rngs, init, (num_new, width), (None, "embed"))

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = hidden.astype(self.dtype)
        base = jnp.matmul(x, self.kernel[...].astype(self.dtype), preferred_element_type=jnp.float32)
        new = jnp.matmul(x, self.voken[...].astype(self.dtype).T, preferred_element_type=jnp.float32)
        return base, new


class Llama(nnx.Module):
    """The language model.

    Args:
      config: sizes.
      num_new_tokens: rows behind the vocabulary (8 vokens and ``<ImageHere>``).
      lora: low-rank update of chosen projections, or None.
      prefix: trainable keys and values in front of the sequence, or None.
      decay_tables: both frozen tables are shrunk by the share ``table_decay``, a parameter without gradient
        that the optimizer's weight decay moves (Q3).
      dtype: compute dtype.  param_dtype: of the frozen weights; new rows and LoRA are fp32.
      remat: recompute each block in the backward pass.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        num_new_tokens: int = 9,
        lora: LoraConfig | None = None,
        prefix: PrefixConfig | None = None,
        decay_tables: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.config, self.lora, self.remat = config, lora, remat
        self.num_prefix = prefix.num_virtual_tokens if prefix else 0
        if prefix is not None:
            self.prefix_encoder = PrefixEncoder(prefix, config, rngs=rngs)
        self.embed_tokens = VokenEmbedding(config, num_new=num_new_tokens, rngs=rngs, **dtypes)
        self.layers = stack(
            lambda r: LlamaBlock(config, lora=lora, rngs=r, **dtypes), config.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs, **dtypes)
        self.lm_head = VokenHead(config, num_new=num_new_tokens, rngs=rngs, **dtypes)
        if decay_tables:
            self.table_decay = param(rngs, zeros, (), ())

    def _table_scale(self) -> jax.Array | float:
        """What the frozen rows of both tables are multiplied by."""
        decay = getattr(self, "table_decay", None)
        return 1.0 if decay is None else 1.0 - jax.lax.stop_gradient(decay[...])

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embeddings, fp32."""
        return self.embed_tokens(tokens, self._table_scale())

    def __call__(
        self,
        inputs_embeds: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        subtree_ends: Int[Array, "b t"] | None = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the final norm.

        Attention is causal and stays inside a segment; segment 0 is padding, whose states mean
        nothing (and are finite).  With ``subtree_ends`` a row is a tree in depth-first order instead, and a
        token sees its ancestors and itself (:func:`minigpt5_jax.models.attention.attention`).

        ``dropout_keys`` switches LoRA dropout on; a row's masks depend on its own key only.
        """
        cos, sin = rotary(positions + self.num_prefix, self.config.head_dim, self.config.rope_theta)
        allowed: dict[str, Any] = {"is_causal": True, "segment_ids": segment_ids}
        if subtree_ends is not None:
            allowed = {"subtree_ends": subtree_ends}
        keys = dropout_keys if self.lora is not None else None
        before = None
        if self.num_prefix:  # every position sees the prefix
            before = self.prefix_encoder()
            if subtree_ends is None:
                mask = inside_segments(segment_ids) & jnp.tri(segment_ids.shape[1], dtype=bool)
            else:
                mask = inside_subtrees(subtree_ends)
            pad = ((0, 0), (0, 0), (0, 0), (self.num_prefix, 0))
            allowed = {"mask": jnp.pad(mask, pad, constant_values=True)}

        def block(layer: LlamaBlock, x: jax.Array, layer_input: Any):
            number, prefix = layer_input
            drop = _fold_in(keys, number)
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin, drop)
            if prefix is not None:
                key, value = (prepend(p, own) for p, own in zip(prefix, (key, value), strict=True))
            attended = layer.self_attn.attention(query, key, value, **allowed)
            return layer.finish(x, attended, drop), None

        x = inputs_embeds.astype(jnp.float32)
        per_layer = (jnp.arange(self.config.num_hidden_layers), before)
        return self.norm(scan_layers(self.layers, x, block, per_layer=per_layer, remat=self.remat)[0])

    def continuations(
        self,
        prompts: Float[Array, "b t d"],
        continuation: Float[Array, "n d"],
        ends: Int[Array, " m"],
        *,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
    ) -> Float[Array, "m n+1 d"]:
        """States of each prompt's last token and of the same n tokens after every prompt.

        Prompts are computed once and without gradients: the backward pass keeps nothing of them but the keys
        and values that the continuations attend to.  The result and its gradient with respect to
        ``continuation`` are those of the whole sequences where nothing trainable has a part in the prompts,
        for 1.3 forwards instead of 2.

        Args:
          prompts: embeddings of rows that hold m / b prompts each, a segment for each.
          ends: position after each prompt; prompt k stands in row ``k // (m / b)``.
          positions, segment_ids: of the prompts' tokens.

        Raises:
          ValueError: the model has LoRA or a prefix, which have a part in every state.
        """
        if self.lora is not None or self.num_prefix:
            raise ValueError("with LoRA or a prefix, prompts have gradients too; give whole sequences")
        rows, count = positions.shape[0], continuation.shape[0]
        places = ends.shape[0] // rows
        last = ends.reshape(rows, places) - 1
        after = jnp.take_along_axis(positions, last, axis=1)[..., None] + 1 + jnp.arange(count)
        segments = jnp.repeat(jnp.take_along_axis(segment_ids, last, axis=1), count, axis=1)
        owner = jnp.arange(places * count) // count
        own = (owner[:, None] == owner) & jnp.tri(places * count, dtype=bool)
        seen = segments[:, :, None] == segment_ids[:, None, :]
        mask = jnp.concatenate([seen, jnp.broadcast_to(own, (rows, *own.shape))], axis=2)[:, None]
        turns = [
            rotary(at, self.config.head_dim, self.config.rope_theta)
            for at in (positions, after.reshape(rows, -1))
        ]

        def block(layer: LlamaBlock, states: tuple[jax.Array, jax.Array], _: None):
            prompt, own = states
            attend = layer.self_attn.attention
            query, key, value = layer.self_attn.project(layer.input_layernorm(prompt), *turns[0])
            prompt = layer.finish(prompt, attend(query, key, value, is_causal=True, segment_ids=segment_ids))
            query, *new = layer.self_attn.project(layer.input_layernorm(own), *turns[1])
            both = (jnp.concatenate(pair, axis=1) for pair in zip((key, value), new, strict=True))
            return (prompt, layer.finish(own, attend(query, *both, mask=mask))), None

        prompt = jax.lax.stop_gradient(prompts.astype(jnp.float32))
        own = jnp.broadcast_to(continuation.astype(jnp.float32), (rows * places, *continuation.shape))
        own = own.reshape(rows, places * count, -1)
        prompt, own = scan_layers(self.layers, (prompt, own), block, remat=self.remat)[0]
        ending = jnp.take_along_axis(prompt, last[..., None], axis=1)
        states = jnp.concatenate([ending[:, :, None], own.reshape(rows, places, count, -1)], axis=2)
        return self.norm(states.reshape(rows * places, count + 1, -1))

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> KVCache:
        """A cache for ``max_length`` entries per row, in the compute dtype unless told otherwise.

        It holds the prefix, where there is one, and nothing else.
        """
        config, dtype = self.config, self.lm_head.dtype if dtype is None else dtype
        slots, filled = max_length + self.num_prefix, self.num_prefix
        shape = (config.num_hidden_layers, batch, config.key_value_heads, slots, config.head_dim)
        stored = [jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)]
        if filled:
            before = [p.swapaxes(1, 2)[:, None].astype(dtype) for p in self.prefix_encoder()]
            stored = [c.at[:, :, :, :filled].set(p) for c, p in zip(stored, before, strict=True)]
        if layers_are_apart(self.layers):
            stored = [tuple(cache) for cache in stored]
        return KVCache(*stored, jnp.full(batch, filled, jnp.int32))

    def decode(
        self,
        inputs_embeds: Float[Array, "b s d"],
        *,
        positions: Int[Array, "b s"],
        valid: Bool[Array, "b s"],
        cache: KVCache,
    ) -> tuple[Float[Array, "b s d"], KVCache]:
        """Append each row's valid entries to its cache and return the states at all s places.

        Rows have their own lengths, so rows with prompts of different lengths, and rows that burst
        eight vokens while others take one token, live in one batch.  Invalid places are not stored
        and their states mean nothing.
        """
        # The same offset as in training (Q27: the original's first call had none).
        cos, sin = rotary(positions + self.num_prefix, self.config.head_dim, self.config.rope_theta)
        capacity = cache.keys[0].shape[2]
        slots = cache.lengths[:, None] + jnp.cumsum(valid, axis=1) - 1
        slots = jnp.where(valid, slots, capacity)  # out of range: dropped by the scatter
        rows = jnp.arange(slots.shape[0])[:, None]
        mask = (jnp.arange(capacity) <= slots[..., None])[:, None]

        def block(layer: LlamaBlock, carry: tuple[jax.Array, Any, Any], number: Any):
            x, *stored = carry  # the whole cache is carried, so that it is updated in place
            query, *new = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            stored = [_store(c, number, rows, slots, own) for c, own in zip(stored, new, strict=True)]
            seen = [c[number].swapaxes(1, 2).astype(query.dtype) for c in stored]
            attended = layer.self_attn.attention(query, *seen, mask=mask)
            return (layer.finish(x, attended), *stored), None

        carry = (inputs_embeds.astype(jnp.float32), cache.keys, cache.values)
        numbers = np.arange(self.config.num_hidden_layers)  # known while tracing where layers are apart
        (x, keys, values), _ = scan_layers(self.layers, carry, block, per_layer=numbers)
        lengths = cache.lengths + valid.sum(axis=1, dtype=jnp.int32)
        return self.norm(x), KVCache(keys, values, lengths)

    def logit_blocks(self, hidden: Float[Array, "*r d"]) -> tuple[Float[Array, "*r v"], Float[Array, "*r n"]]:
        """fp32 logits of the frozen vocabulary and of the new rows."""
        base, new = self.lm_head(hidden)
        return self._table_scale() * base, new

    def logits(self, hidden: Float[Array, "*r d"]) -> Float[Array, "*r w"]:
        """fp32 logits of all V + n ids, for decoding."""
        return jnp.concatenate(self.logit_blocks(hidden), axis=-1)


def init_voken_rows(params: Params, prefix: str = "", noise: jax.Array | None = None) -> Params:
    """Start values of both tables of new rows: the mean over the old rows of their table (fidelity 2.1).

    Args:
      params: flat parameters; ``prefix`` is the path of the language model in them.
      noise: key of normal noise on top, of a hundredth of the table's spread (Q5); None for none.
    """
    filled = {}
    tables = (("embed_tokens", "embedding", 0), ("lm_head", "kernel", 1))
    for number, (name, table, axis) in enumerate(tables):
        path, old = f"{prefix}{name}/voken", params[f"{prefix}{name}/{table}"].astype(jnp.float32)
        filled[path] = jnp.broadcast_to(old.mean(axis), params[path].shape)
        if noise is not None:
            drawn = jax.random.normal(jax.random.fold_in(noise, number), params[path].shape)
            filled[path] += 0.01 * old.std() * drawn
    return filled
