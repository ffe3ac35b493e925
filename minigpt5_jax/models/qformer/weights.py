"""Weight tables of the Q-Former: LAVIS BLIP-2 checkpoints and Hugging Face's ``Blip2Model``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minigpt5_jax.models.qformer.model import BLIP2_QFORMER, QFormer, QFormerConfig
from minigpt5_jax.models.tower import Shapes, Tower, module_shapes
from minigpt5_jax.weights.table import Rule, Table, each, linear_rules, norm_rules

_LAVIS = "Qformer.bert."
_HF = "qformer."


def _attention(source: str, inner: str, target: str) -> list[Rule]:
    rules = list(each(linear_rules, f"{source}.{inner}.", f"{target}/", ("query", "key", "value")))
    rules += linear_rules(f"{source}.output.dense", f"{target}/output")
    rules += norm_rules(f"{source}.output.LayerNorm", f"{target}/layer_norm")
    return rules


def _rules(config: QFormerConfig, prefix: str, embedding_norm: str, inner: str) -> tuple[Rule, ...]:
    """Both formats differ in the prefix, the name of the embedding norm and of BERT's inner ``self``."""
    rules = [Rule("query_tokens", "query_tokens"), *norm_rules(prefix + embedding_norm, "layer_norm")]
    for position in range(config.cross_attention_frequency):
        layer = f"{prefix}encoder.layer.{{{config.cross_attention_frequency}i+{position}}}"
        target = f"groups/layer/{position}"
        rules += _attention(f"{layer}.attention", inner, f"{target}/attention")
        if position == 0:
            rules += _attention(f"{layer}.crossattention", inner, f"{target}/crossattention")
        rules += linear_rules(f"{layer}.intermediate_query.dense", f"{target}/intermediate_query")
        rules += linear_rules(f"{layer}.output_query.dense", f"{target}/output_query")
        rules += norm_rules(f"{layer}.output_query.LayerNorm", f"{target}/layer_norm")
    return tuple(rules)


def table(config: QFormerConfig) -> Table:
    """Names of ``blip2_pretrained_flant5xxl.pth`` (``model.`` before each in MiniGPT-5's modules)."""
    text = "text branch of BLIP-2; only the queries are used"
    return Table(
        _rules(config, _LAVIS, "embeddings.LayerNorm", "self"),
        ignored={
            r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\.weight": text,
            r"Qformer\.bert\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
            r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": text,
            r"Qformer\.cls\..*": text,
            r"t5_proj\..*": "projection to FLAN-T5; MiniGPT-4 trains its own to LLaMA",
        },
    )


def hf_table(config: QFormerConfig) -> Table:
    """Names of Hugging Face's ``Blip2Model`` (``query_tokens`` and ``qformer.*``)."""
    return Table(_rules(config, _HF, "layernorm", "attention"))


def table_for(keys: Iterable[str], config: QFormerConfig) -> Table:
    """The table that fits a source: LAVIS' file, or BLIP-2 whole in Hugging Face's names.

    Targets are ``qformer/...`` and ``ln_vision/...``: BLIP-2 trained the norm between the vision tower and
    the Q-Former together with it.
    """
    if any(key.startswith(_HF) for key in keys):
        norm = norm_rules("vision_model.post_layernorm", "ln_vision")
        rest = r"(?!qformer\.|query_tokens|vision_model\.post_layernorm\.).*"
        other = Table(norm, {rest: "vision tower and language model of BLIP-2; this is the Q-Former"})
        return hf_table(config).prefixed(target="qformer/") + other
    other = Table(
        norm_rules("ln_vision", "ln_vision"),
        {r"visual_encoder\..*": "vision tower; weights.vit", r"t5_model\..*": "FLAN-T5"},
    )
    return table(config).prefixed(target="qformer/") + other


def _shapes(config: QFormerConfig) -> Shapes:
    """With the norm of the vision tower's output, which BLIP-2 trained with it."""
    norm = {f"ln_vision/{leaf}": (config.encoder_hidden_size,) for leaf in ("scale", "bias")}
    shapes = module_shapes(lambda rngs: QFormer(config, rngs=rngs))
    return {f"qformer/{path}": shape for path, shape in shapes.items()} | norm


def _published(values: dict[str, Any]) -> dict[str, Any]:
    """BLIP-2's own ``config.json`` says in three places what its Q-Former is."""
    if "qformer_config" not in values:
        return values
    width = values.get("vision_config", {}).get("hidden_size")
    more = {"encoder_hidden_size": width, "num_query_tokens": values.get("num_query_tokens")}
    return {name: value for name, value in more.items() if value} | values["qformer_config"]


TOWER = Tower(
    QFormerConfig,
    {"qformer_blip2": BLIP2_QFORMER},
    table=table_for,
    shapes_of=_shapes,
    marks=("Qformer.", "qformer."),
    key="model",
    published=_published,
)
