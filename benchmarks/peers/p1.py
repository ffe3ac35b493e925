"""P1: the original's recipe, re-created from its facts (performance.md 0).

Micro-batches of two, embeddings put together sample by sample, the whole of both tables trained and their
gradients masked, logits at every position, the text encoder called with one caption, no cache.
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

MICRO_BATCH = 2
LORA_RANK = 8


class P1:
    """The trainer.

    Args:
      towers: they are not changed, but for a shared language model.
      mapper: state of the feature mapper.
      rows: (embeddings, head) of the nine new rows, f32[9 d]; None where the towers' tables have them.
      empty: (ids, mask) of the empty caption.
      lora: LoRA on ``q_proj`` and ``v_proj``, as in stage 2; then there is no caption loss.
      share: train the towers' own language model instead of a copy of it.
    """

    def __init__(
        self,
        towers: Towers,
        mapper: Mapping[str, torch.Tensor] | None,
        rows: tuple[np.ndarray, np.ndarray] | None,
        empty: tuple[np.ndarray, np.ndarray],
        *,
        lora: bool = False,
        share: bool = False,
    ):
        self.towers, self.device = towers, towers.device
        self.llama = towers.llama if share else copy.deepcopy(towers.llama)
        self.first_voken = towers.sizes.vocabulary
        with self.device:
            self.mapper = Mapper(towers.sizes)
        if mapper is not None:
            self.mapper.load_state_dict(mapper)
        if rows is not None:
            self.llama.resize_token_embeddings(self.first_voken + len(rows[0]), mean_resizing=False)
        self.tables = (self.llama.model.embed_tokens.weight, self.llama.lm_head.weight)
        with torch.no_grad():
            for table, values in zip(self.tables, rows or ()):
                table[self.first_voken :] = torch.from_numpy(values)
        if lora:
            add_lora(self.llama)
        for table in self.tables:
            table.requires_grad_(True)
        mask = torch.zeros(len(self.tables[0]), 1, device=self.device)
        mask[self.first_voken :] = 1
        self.masks = [mask.expand_as(table).contiguous() for table in self.tables]
        self.optimizer = objective.optimizer(self.tables, self.mapper)
        self.alphas = objective.alphas_cumprod().to(self.device)
        self.with_captions = not lora
        self.empty = self.features(*empty)

    def features(self, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """Text features of one caption, [1 q c]."""
        with torch.no_grad():
            ids, mask = (torch.from_numpy(np.asarray(x, np.int64))[None].to(self.device) for x in (ids, mask))
            return self.towers.clip(ids, attention_mask=mask).last_hidden_state

    def embed(self, sample: Sample) -> torch.Tensor:
        """Embeddings of one sample with its images in their slots, [t d]."""
        table = self.llama.model.embed_tokens
        embeds = table(torch.from_numpy(sample.ids).to(self.device))
        if sample.images:
            with torch.no_grad():
                pixels = torch.zeros(len(sample.images), 3, 224, 224, device=self.device)
                states = self.towers.vision(pixels)
            parts, last = [], 0
            for start, state in zip(sample.images, states):
                parts += [embeds[last:start], state]
                last = start + len(state)
            embeds = torch.cat([*parts, embeds[last:]])
        return embeds

    def loss(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The loss of one micro-batch."""
        rows = [self.embed(sample) for sample in samples]
        labels = [torch.from_numpy(sample.labels).to(self.device) for sample in samples]
        ones = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        out = self.llama(
            inputs_embeds=pad(rows, True, 0.0),
            attention_mask=pad(ones, True, 0),
            output_hidden_states=True,
            use_cache=False,
        )
        logits, wanted = out.logits.float()[:, :-1], pad(labels, True, -100)[:, 1:]
        loss = objective.TEXT * F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        drawn = [(row, sample) for row, sample in enumerate(samples) if sample.voken is not None]
        return loss + self._image_losses(out.hidden_states[-1], drawn) if drawn else loss

    def _image_losses(self, hidden: torch.Tensor, drawn: Sequence[tuple[int, Sample]]) -> torch.Tensor:
        states, targets = [], []
        for row, sample in drawn:
            state = hidden[row, sample.voken - 1 : sample.voken + 7][None]
            states.append(torch.zeros_like(state) if sample.dropped else state)
            if self.with_captions:
                target = self.features(sample.caption_ids, sample.caption_mask)
                targets.append(self.empty if sample.dropped else target)
        condition = self.mapper(torch.cat(states))
        samples = [sample for _, sample in drawn]
        with torch.no_grad():
            pixels = to_nchw([s.image for s in samples], self.device).float() / 127.5 - 1
            posterior = self.towers.vae.encode(pixels).latent_dist
            noise = to_nchw([s.posterior_noise for s in samples], self.device)
            latents = (posterior.mean + posterior.std * noise) * objective.SCALING
        noise = to_nchw([s.noise for s in samples], self.device)
        timesteps = torch.tensor([s.timestep for s in samples], device=self.device)
        alpha = self.alphas[timesteps]
        noisy = add_noise(latents, noise, alpha)
        predicted = self.towers.unet(noisy, timesteps, encoder_hidden_states=condition).sample
        loss = objective.IMAGE * objective.image_loss(predicted, noise, alpha)
        if targets:
            loss = loss + objective.CAPTION * F.mse_loss(condition, torch.cat(targets))
        return loss

    def backward(self, samples: Sequence[Sample]) -> float:
        """Gradients of a step over all samples; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for first in range(0, len(samples), MICRO_BATCH):
            part = samples[first : first + MICRO_BATCH]
            loss = self.loss(part) * (len(part) / len(samples))
            loss.backward()
            total += float(loss.detach())
        for table, mask in zip(self.tables, self.masks):
            table.grad *= mask
        return total

    def step(self, samples: Sequence[Sample]) -> float:
        """One update; its loss."""
        loss = self.backward(samples)
        self.optimizer.step()
        return loss


class Lora(nn.Module):
    """A frozen linear layer and its low-rank update."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        like = {"bias": False, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, LORA_RANK, **like)
        self.up = nn.Linear(LORA_RANK, base.out_features, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def add_lora(llama: nn.Module) -> None:
    """LoRA on every ``q_proj`` and ``v_proj``."""
    for layer in llama.model.layers:
        attention = layer.self_attn
        attention.q_proj, attention.v_proj = Lora(attention.q_proj), Lora(attention.v_proj)
