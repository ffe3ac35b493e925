"""Profiles: bundles of settings that go together, chosen behind a run file's colon.

    --config configs/stage2_vist.py:release_2023_10
    --config configs/stage1.py:release_2023_10,compat=original

The original exists in two code generations (fidelity 0); released weights fit the first.  What the
original does besides, quirk by quirk where both behaviours are built here, is ``compat=original``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

_RELEASE = {"data.bos_id": 2, "data.prompt_set": "release", "data.dialog_loader": "release"}
_HEAD = {"data.bos_id": 1, "data.prompt_set": "head", "data.dialog_loader": "head"}
_ORIGINAL: Mapping[str, Any] = {
    "data.mask_all_inner_vokens": False,  # Q1
    "optimizer.decay_frozen_rows": True,  # Q3
    "model.backbone.voken_init": "mean",  # Q5
    "loss.caption_target_on_drop": "empty",  # Q8
    "loss.caption_attn_mask": True,  # Q10
    "loss.min_snr_gamma": 5.0,  # Q13
    "data.flip_mode": "independent",  # Q17
    "data.flip_each_epoch": True,
    "optimizer.grad_clip": None,  # Q19
    "mesh.exchange": "float32",  # 4.1
    "data.truncation": "right",  # Q23
    "data.resample_prompts": False,  # Q24
    "data.bad_media_ids": ("-3872362534310063124", "3713630103994725971"),  # Q28
    "data.images_as_shown": False,  # 5.5
    "data.pad_input_square": False,  # Q30
    "data.strict_image_count": False,  # Q31
    "inference.repetition_penalty": 2.0,  # Q32
    "inference.top_k": 50,
    "inference.top_p": 0.9,
    "inference.temperature": 1.0,
    "inference.ban_inner_vokens": False,  # Q1
    "inference.dummy_token_id": 0,  # Q33: the id of the configuration whose end id is 1
    "inference.eos_ids": (1,),  # Q34
    "inference.force_image": "off",  # Q35: 'first' is its forced generation
    "inference.max_images": 1,  # Q36
    "inference.cfg_negative": "voken_zero",  # Q38
    "inference.sampler": "pndm",  # Q40
    "inference.num_inference_steps": 50,
}


ONE_BEHAVIOUR: Mapping[str, str] = {
    "Q2": "voken states that predict the vokens (as the original)",
    "Q6": "no guidance dropout in validation",
    "Q9": "moments of pixels in [-1, 1]",
    "Q12": "latents and noise in fp32 (as the original)",
    "Q16": "validation at fixed noise, without flips",
    "Q22": "legacy tokenizer rules (as the original)",
    "Q27": "positions start behind the prefix in generation too (prefix_pos_fix)",
    "Q36": "[IMG0] is not drawn again after inference.max_images",
    "fidelity 4.1": "means over all of an update's items, not over each micro-batch's (accumulation)",
}
"""What has one behaviour here and no key, so that ``compat=original`` cannot set it."""


def release_2023_10(config: ConfigDict) -> ConfigDict:
    """Settings of October 2023's checkpoints: BOS 2, "a image", the old MMDialog loader (Q21, Q26)."""
    return _apply(config, _RELEASE)


def head(config: ConfigDict) -> ConfigDict:
    """Settings of the newest code, the defaults: BOS 1, "an image", the new MMDialog loader."""
    return _apply(config, _HEAD)


def original(config: ConfigDict) -> ConfigDict:
    """Every flag of a quirk at what the original does, where both behaviours exist here.

    What a profile chooses (BOS, prompts) is left alone, and so is what the paper says in place of the code
    (rates, epochs, batch: Q14, Q15).  This is not all that the original does: ``ONE_BEHAVIOUR`` has only one
    behaviour here, and no key (docs/fidelity.md, "Behaviour that is fixed").
    """
    return _apply(config, _ORIGINAL)


PROFILES: dict[str, Callable[[ConfigDict], ConfigDict]] = {
    "release_2023_10": release_2023_10,
    "head": head,
    "compat=original": original,
}
"""Variants every run file knows."""


def _apply(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    config.update_from_flattened_dict(values)
    return config
