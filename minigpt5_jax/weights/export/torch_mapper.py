"""MiniGPT-5's feature mapper in PyTorch, complete in this file: it travels with the weights.

>>> mapper = FeatureMapper.from_folder(".")
>>> condition = mapper(states)  # [n, vokens, llm_hidden_size] -> [n, num_queries, d_model]
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


class FeatureMapper(nn.Module):
    """Voken states of the language model -> condition of the image generator.

    Two linear layers, then an encoder-decoder transformer without masks or positions whose decoder reads
    learned queries.  Parameter names are those of MiniGPT-5's checkpoints.
    """

    def __init__(
        self,
        llm_hidden_size: int = 4096,
        d_model: int = 1024,
        nhead: int = 8,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        dim_feedforward: int = 4096,
        num_queries: int = 77,
        layer_norm_eps: float = 1e-5,
        num_vokens: int = 8,
        voken_state_shift: int = 1,
    ):
        super().__init__()
        self.num_vokens, self.voken_state_shift = num_vokens, voken_state_shift
        self.fc = nn.Sequential(nn.Linear(llm_hidden_size, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        with warnings.catch_warnings():  # pre-norm layers have no nested-tensor path; none is wanted
            warnings.simplefilter("ignore", UserWarning)
            self.llm_to_t2i_mapping = nn.Transformer(
                d_model,
                nhead,
                num_encoder_layers,
                num_decoder_layers,
                dim_feedforward,
                dropout=0.0,
                layer_norm_eps=layer_norm_eps,
                batch_first=True,
                norm_first=True,
            )
        self.t2i_decoder_prompt = nn.Parameter(torch.zeros(1, num_queries, d_model))

    @classmethod
    def from_folder(cls, folder: str = ".") -> "FeatureMapper":
        """The exported mapper: ``config.json`` and ``mapper.safetensors`` of a folder, ready for use."""
        mapper = cls(**json.loads((Path(folder) / "config.json").read_text()))
        weights = load_file(Path(folder) / "mapper.safetensors")
        mapper.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        return mapper.eval()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Condition [n, num_queries, d_model] of n groups of states [n, vokens, llm_hidden_size]."""
        states = self.fc(states.to(self.t2i_decoder_prompt.dtype))
        return self.llm_to_t2i_mapping(states, self.t2i_decoder_prompt.expand(len(states), -1, -1))

    def unconditional(self) -> torch.Tensor:
        """T(0), the negative condition of classifier-free guidance, [1, num_queries, d_model]."""
        width = self.fc[0].in_features
        return self(torch.zeros(1, self.num_vokens, width, device=self.t2i_decoder_prompt.device))
