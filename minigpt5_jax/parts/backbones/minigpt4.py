"""MiniGPT-4: EVA ViT -> Q-Former -> linear projection -> LLaMA (reference sections 1.2-1.5, 2.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from minigpt5_jax.batch import Batch
from minigpt5_jax.models.common import LayerNorm, Linear
from minigpt5_jax.models.eva_vit import EvaVit, EvaVitConfig
from minigpt5_jax.models.llama import Llama, LlamaConfig
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.models.qformer import QFormer, QFormerConfig
from minigpt5_jax.parts.base import BACKBONES, register

# CLIP's normalisation (reference section 5.5).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@register(BACKBONES, "minigpt4")
class MiniGPT4(nnx.Module):
    """The backbone of the papers.  Without ``vit`` and ``qformer`` it reads text only.

    Args:
      llm, vit, qformer: tower configurations; the vision pair is given together or not at all.
      num_vokens: generative vokens; the new rows are these plus ``<ImageHere>``.
      lora, prefix: how the language model is tuned in stage 2; at most one of them.
      decay_tables: its frozen tables shrink by weight decay, as in the original (Q3).
      dtype: compute dtype.  param_dtype: dtype of frozen weights (new rows and LoRA stay fp32).
      remat: recompute each language-model layer in the backward pass.
    """

    def __init__(
        self,
        *,
        llm: LlamaConfig,
        vit: EvaVitConfig | None = None,
        qformer: QFormerConfig | None = None,
        num_vokens: int = 8,
        lora: LoraConfig | None = None,
        prefix: PrefixConfig | None = None,
        decay_tables: bool = False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if (vit is None) != (qformer is None):
            raise ValueError("minigpt4 needs both `vit` and `qformer`, or neither")
        if lora is not None and prefix is not None:
            raise ValueError("minigpt4 is tuned by `lora` or by `prefix`, not by both")
        self.hidden_size, self.vocab_size, self.num_vokens = llm.hidden_size, llm.vocab_size, num_vokens
        self.max_positions = llm.max_position_embeddings
        self.dtype = dtype
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.llm = Llama(
            llm,
            num_new_tokens=num_vokens + 1,
            lora=lora,
            prefix=prefix,
            decay_tables=decay_tables,
            remat=remat,
            rngs=rngs,
            **dtypes,
        )
        self.image_tokens = qformer.num_query_tokens if qformer else 0
        self.image_size = vit.image_size if vit else 0
        if vit is not None and qformer is not None:
            if qformer.encoder_hidden_size != vit.hidden_size:
                raise ValueError(
                    f"qformer.encoder_hidden_size={qformer.encoder_hidden_size} "
                    f"but vit.hidden_size={vit.hidden_size}"
                )
            self.vit = EvaVit(vit, rngs=rngs, **dtypes)
            self.ln_vision = LayerNorm(vit.hidden_size, eps=1e-5, rngs=rngs, **dtypes)
            self.qformer = QFormer(qformer, rngs=rngs, **dtypes)
            self.llama_proj = Linear(
                qformer.hidden_size, llm.hidden_size, axes=(None, "embed"), rngs=rngs, **dtypes
            )

    def image_states(self, images: UInt8[Array, "i H W 3"]) -> Float[Array, "i q c"]:
        """The Q-Former's output for input pictures: what may be made beforehand, as its towers are frozen."""
        if not self.image_tokens:
            raise ValueError("this backbone has no vision tower; it cannot read pictures")
        mean, std = jnp.asarray(IMAGE_MEAN), jnp.asarray(IMAGE_STD)
        pixels = (images.astype(jnp.float32) / 255.0 - mean) / std
        patches = self.ln_vision(self.vit(pixels.astype(self.dtype)))
        return self.qformer(patches)

    def project(self, states: Float[Array, "i q c"]) -> Float[Array, "i q d"]:
        """Features of input pictures in the language model's embedding space, fp32."""
        return self.llama_proj(states.astype(jnp.float32)).astype(jnp.float32)

    def place_images(
        self, embeds: jax.Array, states: jax.Array, row: jax.Array, start: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Overwrite the placeholder slots of ``embeds [b t d]`` with features of pictures' ``states``."""
        features = self.project(states)
        rows = jnp.where(mask, row, embeds.shape[0])[:, None]  # out of range: dropped
        columns = start[:, None] + jnp.arange(self.image_tokens)
        return embeds.at[rows, columns].set(features, mode="drop")

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with picture features in their slots, f32[b t d]."""
        embeds = self.llm.embed(batch.tokens)
        if batch.images.shape[0] == 0:  # static: a text-only batch never touches the vision tower
            return embeds
        states = self.image_states(batch.images) if batch.image_states is None else batch.image_states
        return self.place_images(embeds, states, batch.image_row, batch.image_start, batch.image_mask)

    def hidden(self, embeds: jax.Array, batch: Batch, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Final-layer hidden states (after the closing norm), [b t d]."""
        return self.llm(
            embeds, positions=batch.positions, segment_ids=batch.segment_ids, dropout_keys=dropout_keys
        )

    def logit_blocks(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """fp32 logits over the frozen vocabulary and over the new rows."""
        return self.llm.logit_blocks(hidden)
