"""Settings of a session."""

from __future__ import annotations

from minigpt5_jax.config import get_config
from minigpt5_jax.wiring.session import override


def test_settings_keep_their_types():
    config = override(get_config(), {"sampler": "ddim", "guidance_scale": "3", "eos_ids": "(1, 2)"})
    inference = config.inference
    assert (inference.sampler, inference.guidance_scale) == ("ddim", 3.0)
    assert tuple(inference.eos_ids) == (1, 2)
