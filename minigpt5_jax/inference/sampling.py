"""Rules for the next token: settings, penalties and filters on scores (fidelity 6.2, Q32-Q37)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

FORCE_IMAGE = ("off", "first", "after_text")
HUMAN_TURN = ((835,), (2277, 29937))
"""LLaMA's ids of ``###`` after a space, and glued to a word or after a line break."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How an answer is drawn.  Defaults are the original's, with its defects repaired.

    Attributes:
      max_new_tokens: ids at most, an image counting as one (its vokens are not written out).
      do_sample: draw from the distribution; False takes the most likely id.
      temperature, top_k, top_p: shape of the distribution, applied in this order after the penalty;
        ``top_k=0`` and ``top_p=1`` switch a filter off.
      repetition_penalty: positive scores of ids already generated are divided by it, negative ones
        multiplied.  The prompt does not count.
      force_image: ``"off"``; ``"first"``: an image as soon as ``min_text_tokens`` ids are there,
        with 0 before any text (the original's forced generation); ``"after_text"``: where the text
        would end.
      min_text_tokens: ids before which neither an image nor the end may come.
      max_images: images drawn per answer; ``[IMG0]`` cannot be drawn again after that many.
      eos_ids: ids that end an answer.  stop_sequences: id sequences that do.
      dummy_token_id: the original's stray first id, which is penalised and written out but never
        fed to the model (Q33); None leaves it away.
      ban_inner_vokens: never draw ``[IMG1]...`` or the image placeholder.  The original lets them
        stray into the text.
    """

    max_new_tokens: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 2.0
    force_image: str = "off"
    min_text_tokens: int = 0
    max_images: int = 1
    eos_ids: tuple[int, ...] = (2,)
    stop_sequences: tuple[tuple[int, ...], ...] = HUMAN_TURN
    dummy_token_id: int | None = None
    ban_inner_vokens: bool = True

    def __post_init__(self):
        for name, good, need in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0 (do_sample=False takes the most likely id)"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("force_image", self.force_image in FORCE_IMAGE, f"one of {FORCE_IMAGE}"),
            (
                "min_text_tokens",
                0 <= self.min_text_tokens < self.max_new_tokens,
                f"in [0, max_new_tokens={self.max_new_tokens})",
            ),
            (
                "max_images",
                self.max_images >= (self.force_image != "off"),
                f"at least {int(self.force_image != 'off')} with force_image={self.force_image!r}",
            ),
            ("stop_sequences", all(self.stop_sequences), "sequences of at least one id"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {need}")

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """Ids that end a text or begin its end."""
        return (*self.eos_ids, *(sequence[0] for sequence in self.stop_sequences))


def penalise_repetition(
    scores: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float
) -> Float[Array, "b v"]:
    """Make ids that were generated before less likely."""
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def filter_top(scores: Float[Array, "b v"], top_k: int, top_p: float) -> Float[Array, "b v"]:
    """-inf outside the ``top_k`` best and, of what they leave, outside the mass ``top_p``.

    The least likely ids whose renormalised probabilities sum to at most ``1 - top_p`` go; the best
    one always stays.  Only the kept values are sorted, not the vocabulary.
    """
    keep = min(top_k, scores.shape[-1]) if top_k else scores.shape[-1]
    if keep == scores.shape[-1] and top_p == 1:
        return scores
    ascending = jax.lax.top_k(scores, keep)[0][:, ::-1]
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (mass > 1 - top_p).at[:, -1].set(True)
    threshold = jnp.where(kept, ascending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scores >= threshold, scores, -jnp.inf)


def process(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], config: SamplingConfig
) -> Float[Array, "b v"]:
    """Logits -> scores whose softmax is drawn from: penalty, temperature, top-k, top-p."""
    scores = penalise_repetition(logits, seen, config.repetition_penalty) / config.temperature
    return filter_top(scores, config.top_k, config.top_p)


def ban(
    logits: Float[Array, "b v"],
    generated: Int[Array, " b"],
    images: Int[Array, " b"],
    first_voken_id: int,
    config: SamplingConfig,
) -> Float[Array, "b v"]:
    """-inf for ids that may not come now: see ``min_text_tokens``, ``max_images``, ``ban_inner_vokens``."""
    ids = jnp.arange(logits.shape[-1])
    early = (generated < config.min_text_tokens)[:, None]
    beginning = (ids == first_voken_id) & (early | (images >= config.max_images)[:, None])
    ending = jnp.isin(ids, jnp.array(config.ending_ids, jnp.int32)) & early
    inner = (ids > first_voken_id) & config.ban_inner_vokens
    return jnp.where(beginning | ending | inner, -jnp.inf, logits)


def draw(
    scores: Float[Array, "b v"], keys: Key[Array, " b"], step: Int[Array, ""], config: SamplingConfig
) -> Int[Array, " b"]:
    """One id per row; a row's draw is a function of its key, ``step`` and its scores only."""
    if not config.do_sample:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def one(key, row):
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(one)(keys, scores).astype(jnp.int32)


def force(
    token: Int[Array, " b"],
    generated: Int[Array, " b"],
    images: Int[Array, " b"],
    first_voken_id: int,
    config: SamplingConfig,
) -> Int[Array, " b"]:
    """``[IMG0]`` instead of ``token`` where ``force_image`` wants an image now."""
    if config.force_image == "off":
        return token
    if config.force_image == "first":
        due = generated >= config.min_text_tokens
    else:  # the text ends here, or there is room for one more id only
        due = jnp.isin(token, jnp.array(config.ending_ids, jnp.int32))
        due |= generated == config.max_new_tokens - 1
    return jnp.where(due & (images == 0), first_voken_id, token)
