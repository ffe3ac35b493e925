"""Images from ready conditions: what they are guided away from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.diffusion.samplers import make_sampler
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.inference.images import initial_latents, make_batch_sampler, sample_images
from minigpt5_jax.inference.session import CFG_NEGATIVES


def test_grids_are_guided_away_from_what_is_chosen(tiny_template, tiny_params, tiny_batch, oracle_configs):
    """At a scale of 0 only the negative is left, whose images can be made without guidance (Q38).

    Each image may have a scale of its own: 0 for one that is given as the negative, 1 as the condition.
    """
    sampler = make_sampler("ddim", NoiseSchedule.from_hf(oracle_configs["scheduler"]), 2)
    batch, keys = tiny_batch(2), jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def both(params, batch, keys):
        model = tiny_template.bind(params)
        negatives = {
            "voken_zero": model.mapper(jnp.zeros((1, 8, 32))),
            "empty_prompt": model.generator.empty_prompt_features()[None],
        }
        made, wanted = {}, {}
        for name, negative in negatives.items():
            sample = make_batch_sampler(tiny_template, sampler, 0.0, name)
            made[name] = sample(params, batch, jax.random.clone(keys))
            alone = jnp.broadcast_to(negative, (2, *negative.shape[1:]))
            latents = initial_latents(jax.random.clone(keys), model.generator.latent_shape)
            what = (alone, alone, latents, 1.0)
            if name == "empty_prompt":
                first, second = jnp.stack([2 * alone[0], alone[1]]), jnp.stack([alone[0], 2 * alone[1]])
                what = (first, second, latents, jnp.float32([0, 1]))
            wanted[name] = sample_images(model.generator, sampler, *what)
        return made, wanted

    made, wanted = jax.tree.map(lambda x: np.asarray(x, int), both(tiny_params, batch, keys))
    assert made.keys() == set(CFG_NEGATIVES)
    for name in made:
        assert np.abs(made[name] - wanted[name]).max() <= 1, name
    assert np.abs(made["voken_zero"] - made["empty_prompt"]).max() > 1
