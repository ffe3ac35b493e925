"""A composite small enough for any test, and batches for it; also used by processes tests start."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import original
from minigpt5_jax.batch import Batch
from minigpt5_jax.config import get_config, validate
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.minigpt5 import make_template
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text.model import ClipTextConfig
from minigpt5_jax.models.decoder_only_mapper.model import DecoderOnlyMapperConfig
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.lora import LoraConfig
from minigpt5_jax.models.mapper.model import MapperConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet.model import UNetConfig
from minigpt5_jax.models.vae.model import VaeConfig
from minigpt5_jax.parts.contracts import Part, find
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import describe_run, hash_parameters
from minigpt5_jax.training.tuning import FROZEN, Rules, rules_of
from minigpt5_jax.wiring.model import build, initial_trainable, load_frozen, tokenizer_identity

ORACLE = Path(__file__).parent / "oracle"
CONFIGS = Path(__file__).parents[1] / "configs"


@functools.cache
def run_file(name: str) -> ModuleType:
    """The module ``configs/NAME.py``."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes_stage1() -> ConfigDict:
    """``configs/shapes_stage1.py`` for a model that does not see."""
    config = run_file("shapes_stage1").get_config()
    config.model.backbone.update(vit="none", qformer="none")
    return config


def save_run(
    config: ConfigDict, workdir: Path, values: Mapping[str, jax.Array] | None = None, step: int = 7
) -> Path:
    """``workdir``, with one checkpoint: ``values`` of what trains or is inherited, or where these start."""
    spec = build(validate(config))
    frozen = load_frozen(config, spec)
    values = initial_trainable(config, spec, frozen) if values is None else values
    parts: dict[str, dict[str, jax.Array]] = {"trainable": {}, "inherited": {}}
    for path, value in values.items():
        parts["inherited" if spec.labels[path] == FROZEN else "trainable"][path] = value
    meta = describe_run(
        config.to_dict(),
        tokenizer=tokenizer_identity(config, spec.sizes),
        frozen=hash_parameters({**frozen, **parts["inherited"]}),
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(step, {name: part for name, part in parts.items() if part}, 0, meta)
    checkpoints.close()
    return workdir


def make_tiny_template(
    vocab_size: int = 64,
    caption_vocab_size: int = 64,
    num_vokens: int = 8,
    mapper: str = "encoder_decoder",
    attends: str = "",
    sees: bool = False,
    remat: str = "none",
) -> Template:
    """Composite small enough for any test; 8 heads and widths that divide over 8 devices.

    ``attends``: this implementation of attention, in a bfloat16 UNet that attends over 1,024 pixels.
    ``sees``: with vision towers (28 pixels, 4 tokens an image), and LoRA without dropout.
    ``remat``: what the backward pass computes again, as ``model.remat`` says it.
    """
    configs = json.loads((ORACLE / "configs.json").read_text())
    llm = LlamaConfig.from_hf(
        configs["llama"]
        | {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 8,
            "num_hidden_layers": 2,
        }
    )
    text = dataclasses.replace(
        ClipTextConfig.from_hf(configs["sd_text_encoder"]),
        vocab_size=caption_vocab_size,
        max_position_embeddings=12,
    )
    unet = UNetConfig.from_hf(
        configs["unet"]
        | {
            "block_out_channels": [16],
            "attention_head_dim": [2],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D"],
        }
    )
    vae = VaeConfig.from_hf(
        configs["vae"]
        | {
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        }
    )
    sizes = {"llm_hidden_size": 32, "d_model": 32, "nhead": 4, "dim_feedforward": 64, "num_queries": 12}
    mappers = {
        "encoder_decoder": MapperConfig(num_encoder_layers=1, num_decoder_layers=1, **sizes),
        "decoder_only": DecoderOnlyMapperConfig(num_layers=2, **sizes),
    }
    generator = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "image_size": 64 if attends else 16,
        "schedule": NoiseSchedule.from_hf(configs["scheduler"]),
        "empty_caption_ids": (caption_vocab_size - 2, caption_vocab_size - 1) + (0,) * 10,
    }
    if attends:
        generator["dtype"] = jax.numpy.bfloat16
    generator["remat"] = remat in ("all", "generator")
    backbone = {"llm": llm, "num_vokens": num_vokens, "remat": remat in ("all", "backbone")}
    if sees:
        vit = dataclasses.replace(original.eva_config(configs["eva_vit"]), image_size=28, num_hidden_layers=1)
        qformer = QFormerConfig.from_hf(
            configs["qformer_bert"], encoder_hidden_size=vit.hidden_size, num_query_tokens=4
        )
        backbone |= {"vit": vit, "qformer": qformer, "lora": LoraConfig(2, 16.0, 0.0)}
    return make_template(
        backbone=("minigpt4", backbone),
        mapper=(mapper, {"config": mappers[mapper]}),
        generator=("stable_diffusion", generator),
        attention=attends or "auto",
    )


def rules(stage: str, mapper: str = "encoder_decoder") -> Rules:
    """Tuning patterns of a model of the papers' parts."""
    return rules_of(parts(mapper), stage)


def trainable_paths(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Paths that train, sorted."""
    return tuple(sorted(path for path, group in labels.items() if group != FROZEN))


def sharding(mapper: str = "encoder_decoder") -> list[tuple[str, Mapping[str, str]]]:
    """Sharding rules of a model of the papers' parts."""
    return [(part.prefix + start, axes) for part in parts(mapper) for start, axes in part.sharding.items()]


def parts(mapper: str = "encoder_decoder") -> tuple[Part, Part, Part]:
    """Backbone, mapper and generator of the papers."""
    return find("backbone", "minigpt4"), find("mapper", mapper), find("generator", "stable_diffusion")


def make_tiny_params(template: Template) -> dict[str, jax.Array]:
    """Random parameters of the tiny template, none of them zero or one (by numpy: nothing compiles)."""
    random = np.random.default_rng(0)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = random.standard_normal(shape)
        if path.endswith("scale"):
            return 1.0 + 0.05 * noise
        if path.endswith("kernel"):
            return noise / np.sqrt(np.prod(shape[template.axes[path][0] == "layers" : -1]))
        return 0.05 * noise

    return {
        path: jax.numpy.asarray(values(path, shape.shape), shape.dtype)
        for path, shape in sorted(template.shapes.items())
    }


def make_tiny_batch(rows: int = 8, seed: int = 0, length: int = 24, image_size: int = 16) -> Batch:
    """Stage-1 rows of different lengths with one image each."""
    random = np.random.default_rng(seed)
    tokens = np.full((rows, length), 2, np.int32)
    labels = np.full((rows, length), -100, np.int32)
    segments = np.zeros((rows, length), np.int32)
    label_positions = np.zeros((rows, 4), np.int32)
    starts = random.integers(3, length - 9, rows).astype(np.int32)
    for row, start in enumerate(starts):
        tokens[row, 0] = 1
        tokens[row, 1:start] = random.integers(3, 64, start - 1)
        tokens[row, start : start + 8] = 64 + np.arange(8)
        tokens[row, start + 8] = 5
        segments[row, : start + 9] = 1
        targets = np.array([start, start + 7, start + 8])
        labels[row, targets] = tokens[row, targets]
        label_positions[row, :3] = targets
    caption_mask = (np.arange(12) < random.integers(3, 12, rows)[:, None]).astype(np.int32)
    return Batch(
        tokens=tokens,
        labels=labels,
        label_positions=label_positions,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        segment_ids=segments,
        row_id=np.arange(rows, dtype=np.int32),
        images=np.zeros((0, 0, 0, 3), np.uint8),
        image_row=np.zeros(0, np.int32),
        image_start=np.zeros(0, np.int32),
        image_mask=np.zeros(0, bool),
        target=random.integers(0, 256, (rows, image_size, image_size, 3)).astype(np.uint8),
        voken_row=np.arange(rows, dtype=np.int32),
        voken_start=starts,
        item_id=100 + np.arange(rows, dtype=np.int32),
        item_mask=np.ones(rows, bool),
        caption_ids=random.integers(0, 62, (rows, 12)).astype(np.int32) * caption_mask,
        caption_mask=caption_mask,
        has_caption=np.ones(rows, bool),
    )


def write_oracle_sources(root: Path) -> ConfigDict:
    """The oracle's frozen weights as files in the layouts of the real sources, and the configuration of a
    stage-1 model whose every size comes from them."""
    configs = json.loads((ORACLE / "configs.json").read_text())
    weights = load_file(ORACLE / "weights.safetensors")
    vit = original.eva_config(configs["eva_vit"])

    def write(folder: str, prefixes: dict[str, str], config: dict) -> None:
        tensors = {
            new + name.removeprefix(old): value
            for old, new in prefixes.items()
            for name, value in weights.items()
            if name.startswith(old)
        }
        if folder == "llm":  # pretrained tables know nothing of the nine new rows
            tables = ("model.embed_tokens.weight", "lm_head.weight")
            tensors |= {name: tensors[name][:-9] for name in tables}
        (root / folder).mkdir(parents=True)
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(tensors, root / folder / "model.safetensors")
        (root / folder / "config.json").write_text(json.dumps(config))

    queries = {"encoder_hidden_size": vit.hidden_size, "cross_attention_frequency": 2}
    write("llm", {"model.llama_model.": ""}, configs["llama"])
    write("vit", {"model.visual_encoder.": ""}, vars(vit))
    lavis = {"model.Qformer.": "Qformer.", "model.query_tokens": "query_tokens", "model.ln_": "ln_"}
    write("qformer", lavis, configs["qformer_bert"] | queries)
    write("llama_proj", {"model.llama_proj.": "llama_proj."}, {})
    for name in ("unet", "vae"):
        write(f"sd/{name}", {f"{name}.": ""}, configs[name])
    write("sd/text_encoder", {"sd_text_encoder.": ""}, configs["sd_text_encoder"])
    shutil.copytree(ORACLE / "tokenizer_clip", root / "sd/tokenizer")
    shutil.copy(ORACLE / "tokenizer_llama/tokenizer.model", root / "llm")
    (root / "sd/scheduler").mkdir()
    (root / "sd/scheduler/scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    config = get_config()
    config.model.backbone.update(llm="source", vit="source", qformer="source")
    config.model.generator.update(
        unet="source", vae="source", text_encoder="source", scheduler="source", image_size=64
    )
    config.model.mapper.update(d_model=32, nhead=8, dim_feedforward=128)
    config.model.update(dtype="float32", param_dtype="float32")
    config.weights.update({name: str(root / name) for name in ("llm", "vit", "qformer", "llama_proj")})
    config.weights.stable_diffusion = str(root / "sd")
    return config
