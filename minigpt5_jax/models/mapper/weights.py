"""Weight table of the feature mapper: the 129 names of MiniGPT-5's checkpoints (fidelity 7.2)."""

from __future__ import annotations

from minigpt5_jax.weights.table import LINEAR, Op, Rule, Table, each, linear_rules, norm_rules, split

UNBATCH = Op("unbatch", lambda x: (x.reshape(x.shape[1:]),), lambda xs: xs[0][None])


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    names = ("q_proj", "k_proj", "v_proj")
    return (
        Rule(f"{source}.in_proj_weight", tuple(f"{target}/{n}/kernel" for n in names), split(3, LINEAR)),
        Rule(f"{source}.in_proj_bias", tuple(f"{target}/{n}/bias" for n in names), split(3)),
        *linear_rules(f"{source}.out_proj", f"{target}/out_proj"),
    )


def stack_rules(source: str, target: str, attentions: tuple[str, ...]) -> tuple[Rule, ...]:
    """torch's ``nn.TransformerEncoder`` or ``Decoder`` at ``source`` <-> scanned layers and closing norm.

    Args:
      source, target: prefixes, with the dot or slash at their end.
      attentions: names of a layer's attentions; a norm stands before each, one more before the feed-forward.
    """
    layer, block = f"{source}layers.{{i}}", f"{target}layers"
    rules = list(each(_attention, f"{layer}.", f"{block}/", attentions))
    rules += each(linear_rules, f"{layer}.", f"{block}/feed_forward/", ("linear1", "linear2"))
    rules += each(norm_rules, f"{layer}.norm", f"{block}/norm", "123"[: len(attentions) + 1])
    return (*rules, *norm_rules(f"{source}norm", f"{target}norm"))


FC_RULES = (*linear_rules("fc.0", "fc/fc1"), *linear_rules("fc.2", "fc/fc2"))
"""The MLP in front of the transformer."""

TABLE = Table(
    (
        *FC_RULES,
        Rule("t2i_decoder_prompt", "queries", UNBATCH),
        *stack_rules("llm_to_t2i_mapping.encoder.", "encoder/", ("self_attn",)),
        *stack_rules("llm_to_t2i_mapping.decoder.", "decoder/", ("self_attn", "multihead_attn")),
    )
)
