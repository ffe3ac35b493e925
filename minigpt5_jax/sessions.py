"""From a trained run to a session that answers prompts by its configuration."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, setting_errors, validate
from minigpt5_jax.data.tokenizer import LlamaTokenizer
from minigpt5_jax.diffusion.samplers import make_sampler
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.inference.session import Session, stop_sequences
from minigpt5_jax.restore import Run


def make_session(run: Run, *, batch_size: int = 4) -> Session:
    """A session with the settings of the run's configuration.

    Raises:
      ConfigError: settings that do not go together.
    """
    inference, towers = run.config.inference, run.spec.towers
    sampling = sampling_config(run.config, run.tokenizer)
    with setting_errors():
        return Session(
            run.spec.template,
            run.params,
            run.tokenizer,
            sampler=make_sampler(inference.sampler, towers.schedule, inference.num_inference_steps),
            sampling=sampling,
            guidance_scale=inference.guidance_scale,
            cfg_negative=inference.cfg_negative,
            max_length=run.config.data.max_length,
            batch_size=batch_size,
            pad_input_square=run.config.data.pad_input_square,
        )


def sampling_config(config: ConfigDict, tokenizer: LlamaTokenizer) -> SamplingConfig:
    """Rules for text from ``config.inference``; ``###`` as this tokenizer spells it ends an answer."""
    inference = config.inference
    names = (
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "force_image",
        "max_images",
    )
    try:
        return SamplingConfig(
            **{name: inference[name] for name in names},
            eos_ids=tuple(inference.eos_ids),
            stop_sequences=stop_sequences(tokenizer),
        )
    except ValueError as error:
        raise ConfigError(f"inference: {error}") from None


def override(config: ConfigDict, values: Mapping[str, str]) -> ConfigDict:
    """``config`` with ``inference`` keys replaced by values as Python spells them, validated.

    Raises:
      ConfigError: an unknown key, or a value of another type or out of range.
    """
    for name, text in values.items():
        if name not in config.inference:
            raise ConfigError(f"unknown key inference.{name}; known: {', '.join(sorted(config.inference))}")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        old = config.inference[name]
        kind = tuple if isinstance(old, list | tuple) else type(old)  # a restored tuple is a list
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise ConfigError(f"inference.{name}={text!r} must be of type {kind.__name__}")
        config.inference[name] = type(old)(value)
    return validate(config)
