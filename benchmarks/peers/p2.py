"""P2: the best PyTorch step known here.

One batch, moments of the images cached, fused attention (SDPA), the UNet channels-last, nine trained rows in
the place of both tables, logits at label positions only; eager, or with ``torch.compile`` around the towers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import objective
from benchmarks.peers.objective import add_noise, to_nchw
from benchmarks.peers.samples import Sample
from benchmarks.peers.towers import Mapper, Towers

VOKENS = 8
ENCODED = 4  # images the VAE encodes at once


class P2:
    """The trainer of one batch, which it keeps on its device.

    Args:
      towers: not changed.
      mapper: state of the feature mapper.
      rows: (embeddings, head) of the nine new rows, f32[9 d].
      empty: (ids, mask) of the empty caption.
      samples: the batch.
      compiled: run language model, text encoder and UNet through ``torch.compile``.
    """

    def __init__(
        self,
        towers: Towers,
        mapper: Mapping[str, torch.Tensor],
        rows: tuple[np.ndarray, np.ndarray],
        empty: tuple[np.ndarray, np.ndarray],
        samples: Sequence[Sample],
        *,
        compiled: bool = False,
    ):
        self.device, self.sizes = towers.device, towers.sizes
        self.llama, self.clip = copy.deepcopy(towers.llama), copy.deepcopy(towers.clip)
        for model in (self.llama, self.clip):
            model.set_attn_implementation("sdpa")
        self.unet = copy.deepcopy(towers.unet).to(memory_format=torch.channels_last)
        self.mapper = Mapper(towers.sizes).to(self.device)
        self.mapper.load_state_dict(mapper)
        self.embeddings, self.head = (nn.Parameter(self._tensor(values)) for values in rows)
        self.optimizer = objective.optimizer([self.embeddings, self.head], self.mapper)
        self.alphas = objective.alphas_cumprod().to(self.device)
        self._keep_batch(samples)
        self._encode(towers, samples)
        wrap = torch.compile if compiled else lambda function: function
        self.run_llama, self.run_unet, self.run_clip = map(wrap, (self._llama, self._unet, self._clip))
        with torch.no_grad():
            ids, mask = (self._tensor(np.asarray(x, np.int64))[None] for x in empty)
            self.empty = self._clip(ids, mask)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)

    def _keep_batch(self, samples: Sequence[Sample]) -> None:
        """The samples as padded tensors, their labels and vokens as places."""
        longest = max(len(sample.ids) for sample in samples)
        ids, mask = np.zeros((2, len(samples), longest), np.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)], mask[row, : len(sample.ids)] = sample.ids, 1
        places = [np.flatnonzero(sample.labels != -100) for sample in samples]
        self.ids, self.mask = self._tensor(ids), self._tensor(mask)
        self.rows = torch.arange(len(samples), device=self.device)[:, None]
        self.places = self._tensor(np.stack(places))
        self.labels = self._tensor(np.stack([s.labels[place] for s, place in zip(samples, places)]))
        self.vokens = (
            self._tensor(np.array([[s.voken] for s in samples]))
            - 1
            + torch.arange(VOKENS, device=self.device)
        )
        self.dropped = self._tensor(np.array([s.dropped for s in samples]))[:, None, None]
        self.caption = [
            self._tensor(np.stack([getattr(s, f"caption_{name}") for s in samples]))
            for name in ("ids", "mask")
        ]
        self.timesteps = self._tensor(np.array([s.timestep for s in samples]))
        self.noise = to_nchw([s.noise for s in samples], self.device)

    @torch.no_grad()
    def _encode(self, towers: Towers, samples: Sequence[Sample]) -> None:
        """Moments of the images, once, and the latents' noise."""
        moments = []
        for first in range(0, len(samples), ENCODED):
            part = samples[first : first + ENCODED]
            pixels = to_nchw([s.image for s in part], self.device).float() / 127.5 - 1
            moments.append(towers.vae.encode(pixels).latent_dist)
        self.mean = torch.cat([each.mean for each in moments])
        self.std = torch.cat([each.std for each in moments])
        self.posterior_noise = to_nchw([s.posterior_noise for s in samples], self.device)

    def _llama(self, embeds: torch.Tensor) -> torch.Tensor:
        out = self.llama.model(inputs_embeds=embeds, attention_mask=self.mask, use_cache=False)
        return out.last_hidden_state

    def _clip(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.clip(ids, attention_mask=mask).last_hidden_state

    def _unet(self, noisy: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, self.timesteps, encoder_hidden_states=condition).sample

    def loss(self) -> torch.Tensor:
        """The loss of the batch."""
        vocabulary = self.sizes.vocabulary
        old = self.llama.model.embed_tokens.weight[self.ids.clamp(max=vocabulary - 1)]
        new = self.embeddings[(self.ids - vocabulary).clamp(min=0)]
        hidden = self.run_llama(torch.where((self.ids < vocabulary)[..., None], old, new))
        states = hidden[self.rows, self.places - 1]
        logits = torch.cat([states @ self.llama.lm_head.weight.T, states @ self.head.T], -1)
        loss = objective.TEXT * F.cross_entropy(logits.flatten(0, 1), self.labels.flatten())
        condition = self.mapper(torch.where(self.dropped, 0.0, hidden[self.rows, self.vokens]))
        with torch.no_grad():
            features = torch.where(self.dropped, self.empty, self.run_clip(*self.caption))
        loss = loss + objective.CAPTION * F.mse_loss(condition, features)
        latents = (self.mean + self.std * self.posterior_noise) * objective.SCALING
        alpha = self.alphas[self.timesteps]
        noisy = add_noise(latents, self.noise, alpha).to(memory_format=torch.channels_last)
        predicted = self.run_unet(noisy, condition)
        return loss + objective.IMAGE * objective.image_loss(predicted, self.noise, alpha)

    def step(self) -> float:
        """One update; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
