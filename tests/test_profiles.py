"""Profiles: what they set, and that none of the original's flags is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minigpt5_jax.config import ConfigError, apply_variant, get_config, keys_of, profiles, validate, value_at

# Q-numbers whose flag a profile or the run file decides, not compat=original: the code generations
# (Q21, Q26), rates of the paper's stages (Q14), explicit paths (Q29).
OTHERS = {"data.bos_id", "data.prompt_set", "optimizer.lr_mapper", "data.train_mapping"}


def test_the_release_had_bos_2_and_other_prompts():
    config = apply_variant(get_config(), "release_2023_10")
    assert (config.data.bos_id, config.data.prompt_set) == (2, "release")
    assert apply_variant(config, "head").to_dict() == get_config().to_dict()
    validate(apply_variant(config, "release_2023_10"))


def test_profiles_join_with_each_other_and_with_parts():
    config = apply_variant(get_config(), "release_2023_10,compat=original,mapper=encoder_decoder")
    assert (config.data.bos_id, config.data.truncation) == (2, "right")
    assert config.inference.eos_ids == (1,) and not config.data.resample_prompts
    validate(config)
    with pytest.raises(ConfigError, match=r"'release'; known: release_2023_10, head, compat=original"):
        apply_variant(config, "release")


def test_what_compat_original_cannot_set_is_listed_and_documented():
    page = (Path(__file__).parents[1] / "docs/fidelity.md").read_text()
    fixed = page.partition("## Behaviour that is fixed")[2]
    for place in profiles.ONE_BEHAVIOUR:
        assert f"{place} |" in fixed, place
    listed = set(re.findall(r"\| (Q\d+|fidelity [\d.]+) \|$", fixed, re.MULTILINE)) - {
        "Q33"
    }  # which has a key
    assert listed == profiles.ONE_BEHAVIOUR.keys()


def test_every_flag_of_a_quirk_is_in_compat_original():
    config = get_config()
    flags = {
        path
        for path, key in keys_of(config).items()
        if re.search(r"\(.*Q\d+.*\)", key.why) and not (key.choices and len(key.choices) == 1)
    }
    assert flags - OTHERS <= profiles._ORIGINAL.keys()
    assert all(
        value_at(apply_variant(config, "compat=original"), path) == value
        for path, value in profiles._ORIGINAL.items()
    )
