"""From a configuration to a model: tower sizes, the abstract composite, tokenizers, weights.

With ``frozen_sources.py`` the one place that reads ``config.model`` and ``config.weights``; parts get plain
keyword arguments.  Everything up to :func:`load_frozen` is abstract and runs on any machine at full size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from ml_collections import ConfigDict

from minigpt5_jax import parts  # noqa: F401  (fills the registries)
from minigpt5_jax.config import ConfigError, setting_errors, weight_sources
from minigpt5_jax.data.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.diffusion.schedule import SD21_BASE, NoiseSchedule
from minigpt5_jax.frozen_sources import check_sources, source_path
from minigpt5_jax.minigpt5 import LossOptions, make_template
from minigpt5_jax.models.clip_text import SD21_TEXT, ClipTextConfig
from minigpt5_jax.models.common import Template
from minigpt5_jax.models.eva_vit import EVA_VIT_G, EvaVitConfig
from minigpt5_jax.models.llama import VICUNA_7B, LlamaConfig, init_voken_rows
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.prefix import PrefixConfig
from minigpt5_jax.models.qformer import BLIP2_QFORMER, QFormerConfig
from minigpt5_jax.models.unet import SD21_UNET, UNetConfig
from minigpt5_jax.models.vae import SD21_VAE, VaeConfig
from minigpt5_jax.parts.base import MAPPERS, lookup
from minigpt5_jax.training.step import StepOptions
from minigpt5_jax.tuning import FROZEN, TABLE_DECAY, label_parameters
from minigpt5_jax.weights.importer import open_source, with_cause
from minigpt5_jax.weights.maps.llama_proj import ProjectionConfig
from minigpt5_jax.weights.stream import stream_tower
from minigpt5_jax.weights.table import Table, WeightTableError
from minigpt5_jax.weights.towers import TOWERS

LLM = "backbone/llm/"
NEW_PARTS = ("/voken", "/lora_", "/prefix_encoder/", "/table_decay")  # of the language model, in no file
SD21_EMPTY_CAPTION = (49406, 49407) + (0,) * 75  # '' by SD 2.1's tokenizer: BOS, EOS, padding "!" = 0


@dataclasses.dataclass(frozen=True)
class Towers:
    """Sizes of every tower; ``vit`` and ``qformer`` are None for a model that cannot see."""

    llm: LlamaConfig
    vit: EvaVitConfig | None
    qformer: QFormerConfig | None
    unet: UNetConfig
    vae: VaeConfig
    text_encoder: ClipTextConfig
    schedule: NoiseSchedule


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model before it has arrays.

    Attributes:
      towers: sizes.  template: abstract composite.  labels: tuning group of every path.
      options: what the train step needs.
    """

    towers: Towers
    template: Template
    labels: dict[str, str]
    options: StepOptions


def _read_config(name: str, config: ConfigDict, file: str = "config.json") -> dict[str, Any]:
    """The config.json beside a source."""
    value = weight_sources(config)[name]
    if not value:
        raise ConfigError(f"sizes of {name} come from its source, but weights.{name} is not given")
    path = source_path(name, value)
    path = (path if path.is_dir() else path.parent) / file
    if not path.is_file():
        raise ConfigError(f"weights.{name}: no {file} in {path.parent}")
    return json.loads(path.read_text())


def tower_sizes(config: ConfigDict) -> Towers:
    """Presets, or config.json of the sources; nothing but small JSON files is read."""
    backbone, generator = config.model.backbone, config.model.generator

    def choose(choice: str, preset: Any, kind: Any, name: str, file: str = "config.json") -> Any:
        if choice == "none":
            return None
        return kind.from_hf(_read_config(name, config, file)) if choice == "source" else preset

    return Towers(
        llm=choose(backbone.llm, VICUNA_7B, LlamaConfig, "llm"),
        vit=choose(backbone.vit, EVA_VIT_G, EvaVitConfig, "vit"),
        qformer=choose(backbone.qformer, BLIP2_QFORMER, QFormerConfig, "qformer"),
        unet=choose(generator.unet, SD21_UNET, UNetConfig, "unet"),
        vae=choose(generator.vae, SD21_VAE, VaeConfig, "vae"),
        text_encoder=choose(generator.text_encoder, SD21_TEXT, ClipTextConfig, "text_encoder"),
        schedule=choose(generator.scheduler, SD21_BASE, NoiseSchedule, "scheduler", "scheduler_config.json"),
    )


@setting_errors()
def build(config: ConfigDict) -> ModelSpec:
    """The abstract model of a validated configuration; allocates nothing.

    Raises:
      ConfigError: what a tower or a tuning pattern says about a setting.
    """
    towers = tower_sizes(config)
    backbone, mapper, generator = config.model.backbone, config.model.mapper, config.model.generator
    dtypes = {"dtype": jnp.dtype(config.model.dtype), "param_dtype": jnp.dtype(config.model.param_dtype)}
    lora = None
    if backbone.lora_rank:
        lora = LoraConfig(
            r=backbone.lora_rank, lora_alpha=backbone.lora_alpha, lora_dropout=backbone.lora_dropout
        )
    prefix = None
    if backbone.prefix_tokens:
        prefix = PrefixConfig(backbone.prefix_tokens, backbone.prefix_hidden_size)
    empty = SD21_EMPTY_CAPTION
    if generator.text_encoder == "source":
        empty = tuple(int(i) for i in caption_tokenizer(config, towers).encode([""])[0][0])
    width = towers.text_encoder.hidden_size
    if mapper.d_model != width:
        raise ConfigError(f"model.mapper.d_model={mapper.d_model}, the generator listens to width {width}")
    template = make_template(
        (
            backbone.name,
            {
                "llm": towers.llm,
                "vit": towers.vit,
                "qformer": towers.qformer,
                "num_vokens": backbone.num_vokens,
                "lora": lora,
                "prefix": prefix,
                "decay_tables": config.optimizer.decay_frozen_rows,
                "remat": config.model.remat,
                **dtypes,
            },
        ),
        (
            mapper.name,
            {"config": mapper_sizes(config, towers), "dtype": dtypes["dtype"]},
        ),
        (
            generator.name,
            {
                "unet": towers.unet,
                "vae": towers.vae,
                "text_encoder": towers.text_encoder,
                "schedule": towers.schedule,
                "image_size": generator.image_size,
                "empty_caption_ids": empty,
                "caption_attn_mask": config.loss.caption_attn_mask,
                "min_snr_gamma": config.loss.min_snr_gamma or None,
                "remat": config.model.remat,
                **dtypes,
            },
        ),
    )
    # A mapper may have no room for so many vokens: it says so here, not when the first step is compiled.
    jax.eval_shape(lambda params: template.bind(params).unconditional(), template.shapes)
    labels = label_parameters(template.shapes, [tuple(rule) for rule in config.tuning.rules])
    if labels.get(TABLE_DECAY) == FROZEN:
        raise ConfigError(f"optimizer.decay_frozen_rows=True, but tuning.rules freeze {TABLE_DECAY}")
    return ModelSpec(towers, template, labels, step_options(config))


def mapper_sizes(config: ConfigDict, towers: Towers) -> Any:
    """Sizes of the chosen mapper, of its ``config_class``: its own keys, and the towers on either side."""
    keys = {key: value for key, value in config.model.mapper.items() if key != "name"}
    kind = lookup(MAPPERS, config.model.mapper.name, "mapper").config_class
    queries = towers.text_encoder.max_position_embeddings
    return kind(llm_hidden_size=towers.llm.hidden_size, num_queries=queries, **keys)


def step_options(config: ConfigDict) -> StepOptions:
    """Loss weights (those that are not 0) and rules of the step."""
    weights = {name: config.loss[name] for name in ("text", "image", "caption") if config.loss[name]}
    return StepOptions(
        LossOptions(weights, config.loss.caption_target_on_drop, config.model.voken_state_shift),
        cfg_dropout=config.loss.cfg_dropout,
        lora_dropout=bool(config.model.backbone.lora_rank and config.model.backbone.lora_dropout),
        accumulation=config.data.accumulation,
    )


# ---------------------------------------------------------------------------------------------
# Tokenizers


def caption_tokenizer(config: ConfigDict, towers: Towers) -> ClipTokenizer:
    """The generator's tokenizer."""
    folder = source_path("clip_tokenizer", weight_sources(config)["clip_tokenizer"])
    return ClipTokenizer(folder, towers.text_encoder.max_position_embeddings)


def llm_tokenizer(config: ConfigDict, towers: Towers) -> LlamaTokenizer:
    """The language model's tokenizer with the vokens behind its V rows."""
    path = source_path("tokenizer", weight_sources(config)["tokenizer"])
    if path.is_dir():
        path = path / "tokenizer.model"
    return LlamaTokenizer(
        path, config.model.backbone.num_vokens, bos_id=config.data.bos_id, vocab_size=towers.llm.vocab_size
    )


def tokenizer_identity(config: ConfigDict, towers: Towers) -> dict[str, Any]:
    """What both tokenizers are: a checkpoint is refused under others."""
    return {
        "llm": llm_tokenizer(config, towers).identity(),
        "caption": caption_tokenizer(config, towers).identity(),
    }


# ---------------------------------------------------------------------------------------------
# Weights


@dataclasses.dataclass(frozen=True)
class TowerSource:
    """One weight file of the model: which tower it is (a name under ``weights``), its sizes, and where its
    leaves go: below ``prefix``, but for those with a name of ``skip`` in them."""

    source: str
    sizes: Any
    prefix: str
    skip: tuple[str, ...] = ()

    def table(self, keys: Iterable[str]) -> Table:
        """Rules for a source with these keys."""
        return TOWERS[self.source].table(keys, self.sizes)

    def adapt(self, source: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What the table reads of what files of other origin hold (old names, another grid)."""
        return TOWERS[self.source].adapt(source, self.sizes)


def tower_sources(towers: Towers) -> tuple[TowerSource, ...]:
    """Every pretrained part of the composite."""
    found = [
        TowerSource("llm", towers.llm, "backbone/llm/", NEW_PARTS),
        TowerSource("unet", towers.unet, "generator/unet/"),
        TowerSource("vae", towers.vae, "generator/vae/"),
        TowerSource("text_encoder", towers.text_encoder, "generator/text_encoder/"),
    ]
    if towers.vit is not None and towers.qformer is not None:
        others = ("backbone/llm/", "backbone/vit/", "backbone/llama_proj/")
        widths = ProjectionConfig(towers.qformer.hidden_size, towers.llm.hidden_size)
        found += [
            TowerSource("vit", towers.vit, "backbone/vit/"),
            TowerSource("qformer", towers.qformer, "backbone/", others),
            TowerSource("llama_proj", widths, "backbone/llama_proj/"),
        ]
    return tuple(found)


def load_frozen(
    config: ConfigDict,
    spec: ModelSpec,
    shardings: Mapping[str, Sharding] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Every pretrained parameter, streamed from its source onto its devices.

    Args:
      shardings: path -> where it goes; the first local device for paths that are not named.
      only: names under ``weights`` to read; all of them by default.

    Raises:
      ConfigError, WeightFileError, WeightTableError: naming file and keys.
    """
    sources, params = check_sources(config), {}
    for tower in tower_sources(spec.towers):
        if only is not None and tower.source not in only:
            continue
        targets = {
            path.removeprefix(tower.prefix): jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=(shardings or {}).get(path)
            )
            for path, shape in spec.template.shapes.items()
            if path.startswith(tower.prefix) and not any(part in path for part in tower.skip)
        }
        source = open_source(tower.source, sources[tower.source])
        try:
            adapted = tower.adapt(source)
            arrays = stream_tower(tower.table(adapted), adapted, targets)
        except WeightTableError as error:
            raise WeightTableError(with_cause(str(error), tower.source, source)) from None
        params |= {tower.prefix + path: array for path, array in arrays.items()}
    return params


def initial_trainable(
    config: ConfigDict, spec: ModelSpec, frozen: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Start values of what is not pretrained: mapper, LoRA and voken rows.

    Voken rows start at the mean of the old rows of their table (reference 2.1), with
    ``voken_init='mean+noise'`` plus normal noise of a hundredth of that table's spread (Q5).
    """
    missing = [path for path in spec.template.shapes if path not in frozen]
    key = jax.random.key(config.run.seed)
    fresh = _init_only(spec.template, missing, key)
    tables = {path: value for path, value in frozen.items() if path.startswith(LLM)}
    rows = init_voken_rows({**tables, **fresh}, LLM)
    for number, (name, table) in enumerate((("embed_tokens", "embedding"), ("lm_head", "kernel"))):
        path = f"{LLM}{name}/voken"
        fresh[path] = rows[path]
        if config.model.backbone.voken_init == "mean+noise":
            noise = jax.random.normal(jax.random.fold_in(key, number), fresh[path].shape)
            fresh[path] += 0.01 * tables[f"{LLM}{name}/{table}"].astype(jnp.float32).std() * noise
    return fresh


def _init_only(template: Template, paths: list[str], key: jax.Array) -> dict[str, jax.Array]:
    """Initial values of some paths; XLA drops the rest, so the frozen towers are never allocated."""
    wanted = set(paths)
    # Optimising initialisers costs four times what it saves.
    make = jax.jit(
        lambda k: {p: v for p, v in template.init(k).items() if p in wanted},
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return make(key)
