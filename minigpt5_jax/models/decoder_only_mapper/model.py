"""The papers' "decoder-only" feature mapper: self-attention over the vokens alone, padded to the condition.

The ablation of the mapper (paper, Table 7) has no encoder-decoder and no queries; what it gives for the
vokens is padded to the length the generator listens to.  How many layers it has, and what pads it, is not
published; the reading here (fidelity 9.1): the encoder layers of the papers' mapper, as many as that has
in both halves, and zero vectors behind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from minigpt5_jax.models.mapper.model import EncoderLayer, LayerConfig, LayerStack, VokenMlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyMapperConfig(LayerConfig):
    """Hyper-parameters; ``num_queries`` is the length of the padded condition.

    Attributes:
      num_layers: 8, the depth of the papers' mapper (4 + 4).
    """

    num_layers: int = 8


DECODER_ONLY_MAPPER = DecoderOnlyMapperConfig()
"""Full size: 106,016,768 parameters (5,244,928 + 8 x 12,596,224 + 2,048), 86 % of the papers' mapper."""


class DecoderOnlyMapper(LayerStack):
    """The tower; source names in ``weights.py``.

    Semantics of torch's ``nn.TransformerEncoder`` with pre-norm ReLU layers and a closing norm, no masks and
    no positional encodings.  ``dtype`` is that of the matmuls; residual stream, norms, softmax and the output
    are float32.  ``remat`` recomputes each layer in the backward pass.
    """

    config_class = DecoderOnlyMapperConfig

    def __init__(self, config: DecoderOnlyMapperConfig, *, remat: bool = False, **kwargs: Any):
        self.config = config
        self.fc = VokenMlp(config, **kwargs)
        super().__init__(EncoderLayer, config.num_layers, config, remat=remat, **kwargs)

    def __call__(self, vokens: Float[Array, "n m k"]) -> Float[Array, "n q d"]:
        """Condition [n, num_queries, d_model] in float32 for n groups of m voken states.

        Vectors m and on are zero whatever the vokens say.  Of zeros (classifier-free guidance) only biases
        are left, and nothing tells one voken from another: T(0) is one vector m times, then zeros.

        Raises:
          ValueError: more vokens than the condition has vectors.
        """
        room = self.config.num_queries - vokens.shape[1]
        if room < 0:
            raise ValueError(
                f"the decoder-only mapper gives one vector per voken: {vokens.shape[1]} vokens exceed the "
                f"{self.config.num_queries} vectors that the generator listens to; lower "
                "model.backbone.num_vokens or take `:mapper=encoder_decoder`"
            )
        x = super().__call__(self.fc(vokens).astype(jnp.float32))
        return jnp.pad(x, ((0, 0), (0, room), (0, 0)))
