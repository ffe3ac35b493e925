"""Settings of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data.text.prompts import VICUNA_V0
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.wiring.session import override, sampling_config

ORACLE = Path(__file__).parent / "oracle"


def test_settings_keep_their_types():
    config = override(get_config(), {"sampler": "ddim", "guidance_scale": "3", "eos_ids": "(1, 2)"})
    inference = config.inference
    assert (inference.sampler, inference.guidance_scale) == ("ddim", 3.0)
    assert tuple(inference.eos_ids) == (1, 2)


def test_keys_of_the_original_reach_the_sampling_settings():
    tokenizer = LlamaTokenizer(ORACLE / "tokenizer_llama/tokenizer.model")
    config = override(get_config(), {"dummy_token_id": "1", "ban_inner_vokens": "False"})
    rules = sampling_config(config, tokenizer, VICUNA_V0)
    assert rules.dummy_token_id == 1 and not rules.ban_inner_vokens
    rules = sampling_config(get_config(), tokenizer, VICUNA_V0)
    assert rules.dummy_token_id is None and rules.ban_inner_vokens
    with pytest.raises(ConfigError, match=r"inference\.dummy_token_id='one' must be of type int"):
        override(get_config(), {"dummy_token_id": "one"})
