"""From a model and its configuration to a session that answers prompts."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, setting_errors, validate
from minigpt5_jax.config.keys import KEYS
from minigpt5_jax.data.text.prompts import PromptStyle
from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.inference.session import Session, draw_images, stop_sequences, write_rows
from minigpt5_jax.models.abstract import Template, take_layers_apart
from minigpt5_jax.wiring.model import ModelSpec

S = TypeVar("S", bound=Session)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
      config: configuration of the run.  spec: the abstract model.
      params: every parameter of the composite; none for a session that is made to be checked.
      tokenizer: of the language model.  step: updates done.
    """

    config: ConfigDict
    spec: ModelSpec
    params: dict[str, jax.Array]
    tokenizer: Any
    step: int

    def session(self, *, batch_size: int = 4, kind: type[S] = Session) -> S:
        """A session (of a ``kind``) that answers prompts; ConfigError where its settings do not go together.

        It shares ``params``.  By ``inference.layers`` the language model's layers are taken apart in them
        (:func:`~minigpt5_jax.models.abstract.take_layers_apart`), so that no weight is there twice.
        """
        inference, data = self.config.inference, self.config.data
        if takes_layers_apart(self.config, jax.default_backend()) and self.params:
            take_layers_apart(self.params, decoder_layers(self.spec.template))
        style = self.spec.parts["backbone"].prompts
        sampling = sampling_config(self.config, self.tokenizer, style)
        with setting_errors():
            return kind(
                self.spec.template,
                self.params,
                self.tokenizer,
                style=style,
                sampler=open_sampler(self.config, self.spec),
                sampling=sampling,
                guidance_scale=inference.guidance_scale,
                cfg_negative=inference.cfg_negative,
                max_length=data.max_length,
                batch_size=batch_size,
                pad_input_square=data.pad_input_square,
                images_as_shown=data.images_as_shown,
            )


DIALOG_FORMATS = ("mmdialog", "shapes_dialogs")
"""``data.format`` of dialogues, whose samples hold three turns at most."""


def dialog_window(config: ConfigDict) -> int | None:
    """Turns of a dialogue that a model reads: 3 where it was trained on no more, else None for all."""
    return 3 if config.data.format in DIALOG_FORMATS else None


def decoder_layers(template: Template) -> list[str]:
    """Paths of the stacked parameters of the language model that decodes."""
    decoder = template.bind(template.shapes).backbone.decoder
    own = {id(leaf) for leaf in jax.tree.leaves(nnx.state(decoder))}
    stacked = {path for path, axes in template.axes.items() if "layers" in axes}
    return [path for path, shape in template.shapes.items() if path in stacked and id(shape) in own]


def open_sampler(config: ConfigDict, spec: ModelSpec) -> Sampler:
    """The image sampler of ``config.inference``; ConfigError where the generator does not allow it."""
    with setting_errors():
        return spec.generator.make_sampler(config.inference.sampler, config.inference.num_inference_steps)


def answering(
    config: ConfigDict, spec: ModelSpec, stops: tuple[tuple[int, ...], ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a session compiles: ``write(params, tokens, ...)`` and ``draw(params, vokens, ...)``.

    They are :func:`~minigpt5_jax.inference.session.write_rows` and ``draw_images`` with the settings of
    ``config.inference``.  ``stops``: what ends a text, in the ids of the language model.
    """
    inference, sampler = config.inference, open_sampler(config, spec)
    write = functools.partial(write_rows, spec.template, _rules(config, stops))
    settings = (sampler, inference.guidance_scale, inference.cfg_negative)
    return write, functools.partial(draw_images, spec.template, *settings)


def takes_layers_apart(config: ConfigDict, platform: str) -> bool:
    """Whether a session on this platform has an array for each layer of the language model."""
    layers = config.inference.layers
    return layers == "apart" or (layers == "auto" and platform in ("gpu", "cuda", "tpu"))


def sampling_config(config: ConfigDict, tokenizer: Any, style: PromptStyle) -> SamplingConfig:
    """Rules for text from ``config.inference``; the end of a turn, as the tokenizer has it, ends one."""
    return _rules(config, stop_sequences(tokenizer, style.end))


def _rules(config: ConfigDict, stops: tuple[tuple[int, ...], ...]) -> SamplingConfig:
    known = {field.name for field in dataclasses.fields(SamplingConfig)}
    rules = {name: value for name, value in config.inference.items() if name in known}
    rules |= {"eos_ids": tuple(rules["eos_ids"]), "stop_sequences": stops}
    try:
        return SamplingConfig(**rules)
    except ValueError as error:
        raise ConfigError(f"inference: {error}") from None


def override(config: ConfigDict, values: Mapping[str, str], section: str = "inference") -> ConfigDict:
    """``config`` with keys of a section replaced by values as Python spells them, validated.

    Raises:
      ConfigError: an unknown key, or a value of another type or out of range.
    """
    for name, text in values.items():
        if name not in config[section]:
            raise ConfigError(f"unknown key {section}.{name}; known: {', '.join(sorted(config[section]))}")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        old = config[section][name]
        unset = KEYS[f"{section}.{name}"].kind
        kind = unset or (tuple if isinstance(old, list | tuple) else type(old))  # a restored tuple is a list
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise ConfigError(f"{section}.{name}={text!r} must be of type {kind.__name__}")
        config[section][name] = type(old)(value) if unset is None else value
    return validate(config)
