"""Weight table of the feature mapper: the 129 names of MiniGPT-5's checkpoints (reference 7.2)."""

from __future__ import annotations

from minigpt5_jax.weights.table import LINEAR, Op, Rule, Table, linear_rules, norm_rules, split

UNBATCH = Op("unbatch", lambda x: (x.reshape(x.shape[1:]),), lambda xs: xs[0][None])


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    names = ("q_proj", "k_proj", "v_proj")
    return (
        Rule(f"{source}.in_proj_weight", tuple(f"{target}/{n}/kernel" for n in names), split(3, LINEAR)),
        Rule(f"{source}.in_proj_bias", tuple(f"{target}/{n}/bias" for n in names), split(3)),
        *linear_rules(f"{source}.out_proj", f"{target}/out_proj"),
    )


def _layers(half: str, attentions: tuple[str, ...], norms: int) -> tuple[Rule, ...]:
    source, target = f"llm_to_t2i_mapping.{half}.layers.{{i}}", f"{half}/layers"
    rules: list[Rule] = []
    for name in attentions:
        rules += _attention(f"{source}.{name}", f"{target}/{name}")
    for name in ("linear1", "linear2"):
        rules += linear_rules(f"{source}.{name}", f"{target}/feed_forward/{name}")
    for k in range(1, norms + 1):
        rules += norm_rules(f"{source}.norm{k}", f"{target}/norm{k}")
    return (*rules, *norm_rules(f"llm_to_t2i_mapping.{half}.norm", f"{half}/norm"))


TABLE = Table(
    (
        *linear_rules("fc.0", "fc/fc1"),
        *linear_rules("fc.2", "fc/fc2"),
        Rule("t2i_decoder_prompt", "queries", UNBATCH),
        *_layers("encoder", ("self_attn",), norms=2),
        *_layers("decoder", ("self_attn", "multihead_attn"), norms=3),
    )
)
