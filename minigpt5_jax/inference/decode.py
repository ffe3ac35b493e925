"""Batched generation of text and voken states in one compiled loop (fidelity 2.5, 6.2).

Each turn of the loop draws one id per row and feeds it.  A row that drew ``[IMG0]`` is fed all n
vokens in that turn, so its next id is drawn from the state on the last of them; other rows of the
batch are fed their one id in the same call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minigpt5_jax.inference.sampling import SamplingConfig, ban, draw, force, process

FINISH_REASONS = ("length", "eos", "stop")
"""What the codes of ``DecodeResult.finish_reason`` mean."""
_LENGTH, _EOS, _STOP = range(3)


@runtime_checkable
class CachedModel(Protocol):
    """What decoding needs of a language model; :class:`minigpt5_jax.models.llama.model.Llama` has it."""

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[b s] -> [b s d]."""

    def init_cache(self, batch: int, max_length: int) -> Any:
        """An empty cache, any pytree."""

    def decode(
        self, inputs_embeds: jax.Array, *, positions: jax.Array, valid: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Append each row's ``valid`` (bool[b s], a prefix of the row) entries; states [b s d]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[b d] -> f32[b V + new]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """Answers of a batch; o is 1 where ``dummy_token_id`` is given, else 0.

    Attributes:
      tokens: i32[b o+max_new_tokens].  Ids with the end (``###``) and one ``[IMG0]`` per image;
        0 from ``lengths`` on.
      lengths: i32[b].  Ids in each row.
      voken_states: f32[b max_images n d].  Mapper input of each image: the state that predicted
        ``[IMG0]``, then those on the first n - 1 vokens.  Zeros where there is no image.
      voken_position: i32[b max_images].  Index of each ``[IMG0]`` in ``tokens``, -1 for none.
      num_images: i32[b].
      finish_reason: i32[b].  Index into ``FINISH_REASONS``.
    """

    tokens: Any
    lengths: Any
    voken_states: Any
    voken_position: Any
    num_images: Any
    finish_reason: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The loop's carry: answers so far, ``result``, and which of them are complete, ``done``."""

    step: jax.Array  # turns made
    hidden: jax.Array  # [b d], predicts the next id
    position: jax.Array  # i32[b] of the next entry
    seen: jax.Array  # bool[b v], ids under the repetition penalty
    done: jax.Array  # bool[b]
    cache: Any
    result: DecodeResult


def decode(
    llm: CachedModel,
    inputs_embeds: Float[Array, "b t d"],
    lengths: Int[Array, " b"],
    keys: Key[Array, " b"],
    config: SamplingConfig,
    *,
    first_voken_id: int,
    num_vokens: int,
) -> DecodeResult:
    """Answer every prompt of a batch; compile it with ``jax.jit``.

    Args:
      llm: the model, bound to its parameters.
      inputs_embeds: prompts, padded on the right.
      lengths: entries of each prompt, at least 1.
      keys: one per row.  A row's answer depends on its prompt and its key, not on the other rows.
      config: rules, static.
      first_voken_id: id of ``[IMG0]``.  num_vokens: n, vokens of an image.
    """
    state = begin(llm, inputs_embeds, lengths, config, num_vokens=num_vokens)
    return advance(llm, state, keys, config, first_voken_id=first_voken_id, num_vokens=num_vokens).result


def advance(
    llm: CachedModel,
    state: DecodeState,
    keys: Key[Array, " b"],
    config: SamplingConfig,
    *,
    first_voken_id: int,
    num_vokens: int,
    turns: int | None = None,
) -> DecodeState:
    """Answers that were begun, with ``turns`` more ids at most (None: to their ends).

    Args:
      llm, keys, config, first_voken_id, num_vokens: as for :func:`decode`.
    """
    last = None if turns is None else state.step + turns

    def going_on(state: DecodeState) -> jax.Array:
        unfinished = ~state.done.all()
        return unfinished if last is None else unfinished & (state.step < last)

    def turn(state: DecodeState) -> DecodeState:
        token = _next_token(llm, state, keys, config, first_voken_id)
        bursting = ~state.done & (token == first_voken_id)
        result, done = _record(state, token, config)
        hidden, cache, states = _feed(llm, state, token, bursting, ~done, first_voken_id, num_vokens)
        return DecodeState(
            step=state.step + 1,
            hidden=hidden,
            position=state.position + jnp.where(bursting, num_vokens, 1),
            seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
            done=done,
            cache=cache,
            result=_record_image(result, states, bursting),
        )

    return jax.lax.while_loop(going_on, turn, state)


def begin(
    llm: CachedModel,
    inputs_embeds: Float[Array, "b t d"],
    lengths: Int[Array, " b"],
    config: SamplingConfig,
    *,
    num_vokens: int,
) -> DecodeState:
    """Empty answers to prompts that are fed; arguments as for :func:`decode`."""
    batch, longest, width = inputs_embeds.shape
    # An image is one id but num_vokens entries; there is always room for its vokens.
    room = config.max_new_tokens + config.max_images * (num_vokens - 1)
    positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), (batch, longest))
    hidden, cache = llm.decode(
        inputs_embeds,
        positions=positions,
        valid=positions < lengths[:, None],
        cache=llm.init_cache(batch, longest + room),
    )
    rows = jnp.arange(batch)
    hidden = hidden[rows, lengths - 1]
    seen = jnp.zeros((batch, jax.eval_shape(llm.logits, hidden).shape[-1]), bool)
    dummy = () if config.dummy_token_id is None else (config.dummy_token_id,)
    tokens = jnp.zeros((batch, len(dummy) + config.max_new_tokens), jnp.int32)
    for token in dummy:
        seen, tokens = seen.at[:, token].set(True), tokens.at[:, 0].set(token)
    none = jnp.zeros(batch, jnp.int32)
    result = DecodeResult(
        tokens=tokens,
        lengths=none + len(dummy),
        voken_states=jnp.zeros((batch, config.max_images, num_vokens, width), jnp.float32),
        voken_position=jnp.full((batch, config.max_images), -1, jnp.int32),
        num_images=none,
        finish_reason=none + _LENGTH,
    )
    return DecodeState(jnp.int32(0), hidden, lengths.astype(jnp.int32), seen, none > 0, cache, result)


def _next_token(
    llm: CachedModel, state: DecodeState, keys: jax.Array, config: SamplingConfig, first_voken_id: int
) -> jax.Array:
    """The id each row draws, i32[b]; rows that are done draw in vain."""
    generated = jnp.broadcast_to(state.step, state.done.shape)  # rows that are not done drew each turn
    now = (generated, state.result.num_images, first_voken_id, config)
    logits = ban(llm.logits(state.hidden), *now)
    return force(draw(process(logits, state.seen, config), keys, state.step, config), *now)


def _record(state: DecodeState, token: jax.Array, config: SamplingConfig) -> tuple[DecodeResult, jax.Array]:
    """The answers with ``token`` at their ends, and which of them are complete."""
    rows = jnp.arange(token.shape[0])
    old = state.result
    width = old.tokens.shape[1]
    tokens = old.tokens.at[rows, jnp.where(state.done, width, old.lengths)].set(token, mode="drop")
    lengths = old.lengths + ~state.done
    eos = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32))
    stop = jnp.zeros_like(state.done)
    for sequence in config.stop_sequences:
        place = lengths[:, None] - len(sequence) + jnp.arange(len(sequence))
        tail = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
        stop |= (tail == jnp.array(sequence)).all(axis=1) & (place[:, 0] >= 0)
    reason = jnp.where(eos, _EOS, jnp.where(stop, _STOP, _LENGTH))
    reason = jnp.where(state.done, old.finish_reason, reason)
    done = state.done | eos | stop | (lengths == width)
    return dataclasses.replace(old, tokens=tokens, lengths=lengths, finish_reason=reason), done


def _feed(
    llm: CachedModel,
    state: DecodeState,
    token: jax.Array,
    bursting: jax.Array,
    running: jax.Array,
    first_voken_id: int,
    num_vokens: int,
) -> tuple[jax.Array, Any, jax.Array]:
    """Feed what was drawn: (state that predicts the next id, cache, mapper input of bursting rows).

    A turn in which no row starts an image costs one entry per row.  A row whose very last id is ``[IMG0]``
    is still fed the vokens.
    """
    batch, width = state.hidden.shape
    blank = jnp.zeros((batch, num_vokens, width), jnp.float32)

    def call(cache: Any, ids: jax.Array, valid: jax.Array):
        positions = state.position[:, None] + jnp.arange(ids.shape[1])
        return llm.decode(llm.embed(ids), positions=positions, valid=valid, cache=cache)

    def single(carry):
        hidden, cache = call(carry[1], token[:, None], running[:, None])
        return hidden[:, 0], cache, blank

    def burst(carry):
        offset = jnp.arange(num_vokens)
        ids = jnp.where(bursting[:, None], first_voken_id + offset, token[:, None])
        hidden, cache = call(carry[1], ids, bursting[:, None] | (running[:, None] & (offset == 0)))
        mapper_input = jnp.concatenate([state.hidden[:, None], hidden[:, :-1]], axis=1)
        last = jnp.where(bursting[:, None], hidden[:, -1], hidden[:, 0])
        return last, cache, mapper_input.astype(jnp.float32)

    carry = (state.hidden, state.cache, blank)
    carry = _do_if(running.any() & ~bursting.any(), single, carry)
    return _do_if(bursting.any(), burst, carry)


def _do_if(wanted: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
    """``function(carry) if wanted else carry``; as a loop, since ``lax.cond`` copies the cache."""
    return jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros_like(wanted), function(c[1])), (wanted, carry)
    )[1]


def _record_image(result: DecodeResult, states: jax.Array, bursting: jax.Array) -> DecodeResult:
    """Keep mapper input and place of the images that rows ``bursting`` have just started."""
    rows = jnp.arange(bursting.shape[0])
    slot = jnp.where(bursting, result.num_images, result.voken_position.shape[1])
    return dataclasses.replace(
        result,
        voken_states=result.voken_states.at[rows, slot].set(states, mode="drop"),
        voken_position=result.voken_position.at[rows, slot].set(result.lengths - 1, mode="drop"),
        num_images=result.num_images + bursting,
    )
