"""MiniGPT-4: EVA ViT -> Q-Former -> linear projection -> LLaMA (fidelity 1.2-1.5, 2.3)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.text.prompts import VICUNA_V0
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.models.common import LayerNorm, Linear, Params
from minigpt5_jax.models.eva_vit.model import EvaVit, EvaVitConfig
from minigpt5_jax.models.eva_vit.weights import TOWER as EVA_VIT
from minigpt5_jax.models.llama.model import Llama, LlamaConfig, init_voken_rows
from minigpt5_jax.models.llama.weights import TOWER as LLAMA
from minigpt5_jax.models.llama_proj.weights import TOWER as LLAMA_PROJ
from minigpt5_jax.models.llama_proj.weights import ProjectionConfig
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.mesh import spread
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.models.qformer.model import QFormer, QFormerConfig
from minigpt5_jax.models.qformer.weights import TOWER as QFORMER
from minigpt5_jax.parts.contracts import (
    INT8,
    PREFIX,
    SMALL,
    STAGE2,
    Context,
    Export,
    Key,
    Keys,
    Origin,
    Part,
    Sizes,
    Use,
)
from minigpt5_jax.weights.export import minigpt5, peft, transformers
from minigpt5_jax.weights.export.model import ExportableModel, LanguageModel
from minigpt5_jax.weights.foreign import rewrite

# CLIP's normalisation (fidelity 5.5).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


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
        self.max_positions, self.position_axes = llm.max_position_embeddings, 1
        self.voken_state_shift = 1
        self.uses_dropout = lora is not None and lora.lora_dropout > 0
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
        """The Q-Former's output for input images: what may be made beforehand, as its towers are frozen."""
        if not self.image_tokens:
            raise ValueError("this backbone has no vision tower; it cannot read images")
        mean, std = jnp.asarray(IMAGE_MEAN), jnp.asarray(IMAGE_STD)
        pixels = spread((images.astype(jnp.float32) / 255.0 - mean) / std, "items")
        patches = self.ln_vision(self.vit(pixels.astype(self.dtype)))
        return spread(self.qformer(patches), "rows")  # where their places in the rows are

    def project(self, states: Float[Array, "i q c"]) -> Float[Array, "i q d"]:
        """Features of input images in the language model's embedding space, fp32."""
        return self.llama_proj(states.astype(jnp.float32)).astype(jnp.float32)

    def place_images(
        self, embeds: jax.Array, states: jax.Array, row: jax.Array, start: jax.Array
    ) -> jax.Array:
        """``embeds [b t d]`` with the features of images' ``states`` in their slots; row b is dropped."""
        columns = start[:, None] + jnp.arange(self.image_tokens)
        return embeds.at[row[:, None], columns].set(self.project(states), mode="drop")

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with image features in their slots, f32[b t d]."""
        embeds = self.llm.embed(batch.tokens)
        if batch.images.shape[0] == 0:  # static: a text-only batch never touches the vision tower
            return embeds
        states = self.image_states(batch.images) if batch.image_states is None else batch.image_states
        if batch.image_index is not None:
            states = states[batch.image_index]
        row = jnp.where(batch.image_mask, batch.image_row, embeds.shape[0])
        return self.place_images(embeds, states, row, batch.image_start)

    def prompt(
        self,
        tokens: Int[Array, "b t"],
        images: UInt8[Array, "i H W 3"],
        image_row: Int[Array, " i"],
        image_start: Int[Array, " i"],
    ) -> Float[Array, "b t d"]:
        """Embeddings of prompts, the features of images from their first slots on."""
        embeds = self.decoder.embed(tokens)
        if images.shape[0] == 0:
            return embeds
        return self.place_images(embeds, self.image_states(images), image_row, image_start)

    @property
    def decoder(self) -> Llama:
        """The language model, which decodes with a cache."""
        return self.llm

    def voken_rows(self) -> Float[Array, "n d"]:
        """Embeddings of the vokens."""
        return self.llm.embed_tokens.voken[...][: self.num_vokens]

    def hidden(self, embeds: jax.Array, batch: Batch, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Final-layer hidden states (after the closing norm), [b t d], or of continuations [m n+1 d]."""
        if batch.prompt_end is not None:
            vokens = self.llm.embed(self.vocab_size + jnp.arange(self.num_vokens)[None])[0]
            return self.llm.continuations(
                embeds,
                vokens,
                batch.prompt_end,
                positions=batch.positions,
                segment_ids=batch.segment_ids,
            )
        return self.llm(
            embeds,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            subtree_ends=batch.subtree_end,
            dropout_keys=dropout_keys,
        )

    def logit_blocks(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """fp32 logits over the frozen vocabulary and over the new rows."""
        return self.llm.logit_blocks(hidden)


VICUNA = Origin(
    "Vicuna-7B v0 (not v1.1): LLaMA-1 7B, fine-tuned",
    ("config.json", "tokenizer.model", "model shards"),
    13.5,
    "LLaMA-1's research licence: non-commercial, on application",
    repos=("Vision-CAIR/vicuna-7b",),
    elsewhere="or apply lmsys/vicuna-7b-delta-v0 to LLaMA-7B",
    command="llm",
    convert=functools.partial(rewrite.convert_llama, "llm", LLAMA),
)
EVA = Origin(
    "EVA-CLIP ViT-g/14 as LAVIS packed it",
    ("eva_vit_g.pth",),
    2.0,
    "MIT (EVA); BSD-3 (LAVIS)",
    elsewhere="model zoo of LAVIS (BLIP-2's vision tower)",
    within="Salesforce/blip2-flan-t5-xxl",
    command="vit",
    convert=functools.partial(rewrite.convert_tower, "vit", EVA_VIT),
)
BLIP2 = Origin(
    "BLIP-2's Q-Former and the norm before it, trained with FLAN-T5-XXL",
    ("blip2_pretrained_flant5xxl.pth",),
    0.4,
    "BSD-3 (LAVIS)",
    elsewhere="model zoo of LAVIS (blip2_t5, pretrain_flant5xxl)",
    within="Salesforce/blip2-flan-t5-xxl",
    command="qformer",
    convert=functools.partial(rewrite.convert_tower, "qformer", QFORMER),
)
MINIGPT4 = Origin(
    "MiniGPT-4's projection, the checkpoint aligned with Vicuna 7B",
    ("prerained_minigpt4_7b.pth",),  # the file is published under this misspelled name
    0.04,
    "BSD-3",
    elsewhere="README of MiniGPT-4, 'checkpoint aligned with Vicuna 7B'",
    command="llama_proj",
    convert=functools.partial(rewrite.convert_tower, "llama_proj", LLAMA_PROJ),
)

FILE = "file or folder"
NEW_PARAMETERS = ("/voken", "/lora_", "/prefix_encoder/", "/table_decay")
"""Marks of the language model's paths that no published file holds."""


def sees(keys: Keys) -> bool:
    """Whether a configuration has the vision towers."""
    return keys["vit"] != "none"


USES = {
    "llm": Use(
        why=f"{FILE}: LLaMA in Hugging Face layout (Vicuna-7B)",
        get="Vicuna-7B v0, Hugging Face layout (Vision-CAIR/vicuna-7b)",
        origin=VICUNA,
        packaged="llama",
        tower=LLAMA,
        at="llm/",
        new=NEW_PARAMETERS,
        check=rewrite.refuse_other_vicuna,
        refuse=rewrite.refuse_vokens,
    ),
    "tokenizer": Use(
        why="tokenizer.model; '': beside weights.llm",
        get="LLaMA's tokenizer.model (it stands beside the Vicuna weights)",
        origin=VICUNA,
        packaged="llama/tokenizer.model",
        beside="llm",
        file="tokenizer.model",
        refuse=rewrite.refuse_vokens,
        # 499,723 bytes (fidelity 1.6).
        stock={"9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347": "LLaMA's own tokenizer"},
    ),
    "vit": Use(
        why=f"{FILE}: EVA ViT-g (eva_vit_g.pth)",
        get="EVA ViT-g, eva_vit_g.pth of LAVIS",
        origin=EVA,
        packaged="eva_vit",
        tower=EVA_VIT,
        at="vit/",
        needed=sees,
    ),
    "qformer": Use(
        why=f"{FILE}: BLIP-2's Q-Former and ln_vision",
        get="BLIP-2 Q-Former, blip2_pretrained_flant5xxl.pth of LAVIS",
        origin=BLIP2,
        packaged="qformer",
        tower=QFORMER,
        only=("qformer/", "ln_vision/"),
        needed=sees,
    ),
    "llama_proj": Use(
        why=f"{FILE}: MiniGPT-4's projection",
        get="MiniGPT-4 7B projection (prerained_minigpt4_7b.pth)",
        origin=MINIGPT4,
        packaged="llama_proj",
        tower=LLAMA_PROJ,
        at="llama_proj/",
        sizes=lambda sizes: ProjectionConfig(sizes["qformer"].hidden_size, sizes["llm"].hidden_size),
        needed=sees,
    ),
}

KEYS = {
    "llm": Key(
        "vicuna_7b",
        "preset, or 'source': config.json beside the weights",
        choices=("vicuna_7b", "source"),
    ),
    "vit": Key(
        "eva_vit_g",
        "preset, 'source', or 'none' for a model that cannot see",
        choices=("eva_vit_g", "source", "none"),
    ),
    "qformer": Key(
        "qformer_blip2",
        "preset, 'source', or 'none' (with vit)",
        choices=("qformer_blip2", "source", "none"),
    ),
    "llm_quantization": Key(
        "none",
        "how its frozen kernels are held: as model.param_dtype, in 8 bits or in 4.5 (docs/training.md)",
        choices=("none", "int8", "nf4"),
    ),
    "vit_quantization": Key("none", "the same of the vision tower", choices=("none", "int8")),
    "num_vokens": Key(8, "generative vokens of an image", low=1),
    "voken_init": Key(
        "mean",
        "new rows: mean of the old ones (Q5), or with a little noise",
        choices=("mean", "mean+noise"),
    ),
    "lora_rank": Key(0, "LoRA on q_proj and v_proj; 0 for none, 8 in stage 2 (4.3)", low=0),
    "lora_alpha": Key(16.0, "LoRA scale is alpha / rank", low=0.0),
    "lora_dropout": Key(0.05, "dropout on LoRA's input while training", low=0.0, high=1.0),
    "prefix_tokens": Key(0, "virtual tokens of prefix tuning, instead of LoRA (4.4)", low=0),
    "prefix_hidden_size": Key(1024, "inner width of the prefix encoder", low=1),
}


def make(keys: Keys, sizes: Sizes, context: Context) -> dict[str, Any]:
    """Keyword arguments of :class:`MiniGPT4`."""
    lora = prefix = None
    if keys["lora_rank"]:
        lora = LoraConfig(keys["lora_rank"], keys["lora_alpha"], keys["lora_dropout"])
    if keys["prefix_tokens"]:
        prefix = PrefixConfig(keys["prefix_tokens"], keys["prefix_hidden_size"])
    return {
        **{name: sizes.get(name) for name in ("llm", "vit", "qformer")},
        "num_vokens": keys["num_vokens"],
        "lora": lora,
        "prefix": prefix,
        "decay_tables": context.decay_frozen_rows,
        "remat": context.remat,
        "dtype": context.dtype,
        "param_dtype": context.param_dtype,
    }


def make_tokenizer(find: Callable[[str], Path], keys: Keys, sizes: Sizes, bos_id: int) -> LlamaTokenizer:
    """LLaMA's tokenizer with the vokens behind the V rows of the language model."""
    rows = sizes["llm"].vocab_size
    return LlamaTokenizer(find("tokenizer"), keys["num_vokens"], bos_id=bos_id, vocab_size=rows)


def conflicts(keys: Keys) -> Iterator[str]:
    """What does not go together."""
    if (keys["vit"] == "none") != (keys["qformer"] == "none"):
        yield "model.backbone.vit and model.backbone.qformer are 'none' together or not at all"
    if keys["lora_rank"] and keys["prefix_tokens"]:
        yield "model.backbone.lora_rank and prefix_tokens exclude each other; set one of them to 0"


def initial(fresh: Params, pretrained: Params, keys: Keys, key: jax.Array) -> Params:
    """Voken rows at the mean of the old rows of their table, with noise by ``voken_init='mean+noise'``."""
    noise = key if keys["voken_init"] == "mean+noise" else None
    return init_voken_rows({**pretrained, **fresh}, "llm/", noise)


def language_model(model: ExportableModel) -> LanguageModel:
    """The language model of an export."""
    made = model.made["backbone"]
    return LanguageModel(model, "llm", "backbone/llm/", lora=made["lora"], prefix=made["prefix"])


NEW_ROWS = (r"llm/((embed_tokens|lm_head)/voken|table_decay)", "llm")

PART = Part(
    kind="backbone",
    name="minigpt4",
    module=MiniGPT4,
    make=make,
    keys=KEYS,
    uses=USES,
    tokenizer=make_tokenizer,
    tokenizer_use="tokenizer",
    prompts=VICUNA_V0,
    offers=lambda sizes: {"hidden_size": sizes["llm"].hidden_size},
    trainable={
        # Voken rows at the base rate, in stage 2 also LoRA or a prefix, whichever there is (fidelity 4.2).
        "stage1": (NEW_ROWS,),
        "stage2": (NEW_ROWS, (r"llm/(.*/lora_[ab]|prefix_encoder/.*)", "llm")),
    },
    # The language model: tensor parallel.  Never sharded over fsdp while frozen: gathering it every step
    # costs more than the step.  ViT and Q-Former: data parallel (the Q-Former has 12 heads).
    sharding={"llm/": {"heads": "tensor", "mlp": "tensor", "vocab": "tensor"}},
    # Until the first voken, whose row trains, nothing trainable has a part in the states.
    frozen_prompts=lambda trainable, keys: (
        not (keys["lora_rank"] or keys["prefix_tokens"])
        and all(re.fullmatch(NEW_ROWS[0], path) for path in trainable)
    ),
    reads_trees=True,
    features={"vit": ("vit/",), "qformer": ("ln_vision/", "qformer/")},
    initial=initial,
    conflicts=conflicts,
    settings={
        SMALL: {"llm": "source", "vit": "source", "qformer": "source"},
        STAGE2: {"lora_rank": 8},
        PREFIX: {"lora_rank": 0, "prefix_tokens": 5},
        INT8: {"llm_quantization": "int8"},
    },
    exports={
        "minigpt5": Export(
            lambda model, path, **options: minigpt5.write(language_model(model), path, **options),
            "the original's Lightning checkpoint, stage 1 or 2; needs torch",
            ("llm",),
            ("stage",),
            ".ckpt",
        ),
        "peft": Export(
            lambda model, folder, **options: peft.write(language_model(model), folder, **options),
            "LoRA adapter with the resized tables",
            ("llm",),
        ),
        "transformers": Export(
            lambda model, folder, **options: transformers.write(language_model(model), folder, **options),
            "LLaMA with the new rows, LoRA folded in, and its tokenizer",
            ("llm", "tokenizer"),
            ("dtype", "merge"),
        ),
    },
)
