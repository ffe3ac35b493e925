"""A checkpoint's self-test: does it load, compute, and draw?  Numbers, or the reason why not.

    python -m minigpt5_jax.convert verify --checkpoint runs/released

It finds what fails in silence: weights of another file, a tokenizer that drifted, vokens that the decoder
never reaches, a condition that does not depend on them, a generator that does not predict noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.inference.decode import decode
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.inference.session import stop_sequences
from minigpt5_jax.minigpt5 import Composite
from minigpt5_jax.wiring.restore import load_run
from minigpt5_jax.wiring.session import LoadedModel

TEXT = "a red circle"
ANSWER = 32  # ids of the answer in which [IMG0] is looked for
DIFFERENCE = 1e-3  # of the condition, relative to T(0)
CORRELATION = 0.3  # of the predicted noise with the noise, at the last timestep


class VerificationError(RuntimeError):
    """A checkpoint that loads but does not work; the message has the numbers."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
      step: of the checkpoint.  parameters: how many.  source: the prompt.
      logit, rank: of ``[IMG0]`` where it is likeliest in the answer; rank 1 is the arg-max.
      drawn: whether the greedy answer draws by itself.
      forced: whether an image can be forced.
      spread: standard deviation among the voken rows, relative to their size.
      difference: |T(h) - T(0)| / |T(0)|.
      correlation: of the predicted noise with the noise at the last timestep.
    """

    step: int
    parameters: int
    source: str
    logit: float
    rank: int
    drawn: bool
    forced: bool
    spread: float
    difference: float
    correlation: float

    def __str__(self) -> str:
        drawn, forced = ("yes" if value else "no" for value in (self.drawn, self.forced))
        return "\n".join(
            (
                f"checkpoint of step {self.step}: {self.parameters:,} parameters, all finite; its tokenizer "
                "and frozen weights are those it was trained with",
                f"prompt: {self.source!r}",
                f"[IMG0]: rank {self.rank}, logit {self.logit:.2f} where it is likeliest; drawn by itself: "
                f"{drawn}; when forced: {forced}",
                f"voken rows differ by {self.spread:.3f} of their size",
                f"condition: |T(h) - T(0)| is {self.difference:.3f} of |T(0)|",
                f"generator: correlation {self.correlation:.3f} of predicted and true noise at the last step",
            )
        )


def verify(path: str | Path, *, step: int | None = None, weights: Mapping[str, str] | None = None) -> Report:
    """Load a checkpoint and run it once.

    Args:
      path, step, weights: as for :func:`minigpt5_jax.wiring.restore.load_run`.

    Raises:
      CheckpointError, ConfigError, WeightFileError, WeightTableError: it does not load.
      VerificationError: it loads but does not work; every reason and the numbers.
    """
    return verify_run(load_run(path, step=step, weights=weights))


def verify_run(run: LoadedModel) -> Report:
    """The same for a model in memory.

    Raises:
      VerificationError: every reason and the numbers.
    """
    bad = [path for path, value in run.params.items() if not bool(jnp.isfinite(value).all())]
    if bad:
        raise VerificationError(f"parameters are NaN or infinite: {', '.join(bad[:8])}")
    report = _measure(run)
    problems = problems_of(report, run.config.inference.top_k)
    if problems:
        raise VerificationError("\n".join(["the checkpoint does not work:", *problems, "", str(report)]))
    return report


def problems_of(report: Report, top_k: int) -> list[str]:
    """What is wrong with the numbers, a line each."""
    problems = []
    numbers = (report.logit, report.spread, report.difference, report.correlation)
    if not all(map(np.isfinite, numbers)):
        problems.append("  the forward pass gives NaN or infinite numbers")
    if report.spread < 1e-6:  # a mean of nine equal numbers is rounded
        problems.append("  all voken rows are the same: they were never trained")
    if not report.forced:
        problems.append("  an image cannot be forced: the vokens are out of the decoder's reach")
    if top_k and report.rank > top_k and not report.drawn:
        problems.append(f"  [IMG0] is never among the {top_k} likeliest ids (inference.top_k)")
    if report.difference < DIFFERENCE:
        problems.append("  the condition hardly differs from T(0): images do not depend on the vokens")
    if report.correlation < CORRELATION:
        problems.append(
            "  the UNet does not predict noise: it predicts v (the 768-pixel model), or is not trained"
        )
    return problems


def _measure(run: LoadedModel) -> Report:
    source = TEXT
    if run.config.run.init_from:
        style = run.spec.parts["backbone"].prompts
        request = f"{TEXT}. Show me a picture."
        source = style.dialog(style.dialog_system, [(style.speakers["user"], request)])
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(source)]
    greedy = SamplingConfig(
        max_new_tokens=ANSWER,
        do_sample=False,
        stop_sequences=stop_sequences(run.tokenizer, run.spec.parts["backbone"].prompts.end),
        top_k=0,
        top_p=1.0,
    )
    free = _answer(run, ids, greedy)
    forced = _answer(run, ids, dataclasses.replace(greedy, force_image="first", max_new_tokens=2))
    answer = np.asarray(free.tokens[0, : int(free.lengths[0])]).tolist()
    logits = _logits(run, ids, answer)
    first = run.tokenizer.first_voken_id
    ranks = (logits > logits[:, first, None]).sum(-1) + 1
    best = int(ranks.argmin())
    compare = jax.jit(lambda params, states: _conditions(run.spec.template.bind(params), states))
    difference, correlation = compare(run.params, forced.voken_states[:1, 0])
    voken_rows = jax.jit(lambda params: run.spec.template.bind(params).backbone.voken_rows())
    rows = np.asarray(voken_rows(run.params), np.float32)
    return Report(
        step=run.step,
        parameters=sum(int(np.prod(value.shape)) for value in run.params.values()),
        source=source,
        logit=float(logits[best, first]),
        rank=int(ranks[best]),
        drawn=first in answer,
        forced=int(forced.num_images[0]) == 1,
        spread=float(rows.std(axis=0).mean() / max(np.abs(rows).mean(), 1e-30)),
        difference=float(difference),
        correlation=float(correlation),
    )


def _answer(run: LoadedModel, ids: list[int], sampling: SamplingConfig) -> Any:
    """The answer to one prompt."""

    def write(params: Any, tokens: jax.Array) -> Any:
        model = run.spec.template.bind(params)
        embeds = model.backbone.decoder.embed(tokens)
        lengths = jnp.full(1, tokens.shape[1], jnp.int32)
        return decode(
            model.backbone.decoder,
            embeds,
            lengths,
            jax.random.split(jax.random.key(0), 1),
            sampling,
            first_voken_id=model.first_voken_id,
            num_vokens=model.backbone.num_vokens,
        )

    return jax.jit(write)(run.params, np.asarray([ids], np.int32))


def _logits(run: LoadedModel, ids: list[int], answer: list[int]) -> np.ndarray:
    """Logits of each id of the answer, f32[n V], up to its first image."""
    first = run.tokenizer.first_voken_id
    shown = answer[: answer.index(first) if first in answer else len(answer) - 1]

    def read(params: Any, tokens: jax.Array) -> jax.Array:
        decoder = run.spec.template.bind(params).backbone.decoder
        hidden, _ = decoder.decode(
            decoder.embed(tokens),
            positions=jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
            valid=jnp.ones(tokens.shape, bool),
            cache=decoder.init_cache(1, tokens.shape[1]),
        )
        return decoder.logits(hidden[0, len(ids) - 1 :])

    return np.asarray(jax.jit(read)(run.params, np.asarray([[*ids, *shown]], np.int32)))


def _conditions(model: Composite, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(|T(h) - T(0)| / |T(0)|, correlation of predicted and true noise where there is nothing but noise)."""
    condition, nothing = model.condition(states), model.unconditional()
    difference = jnp.linalg.norm(condition - nothing) / jnp.linalg.norm(nothing)
    noise = jax.random.normal(jax.random.key(0), (1, *model.generator.latent_shape))
    last = jnp.int32(model.generator.num_train_timesteps - 1)
    found = model.generator.denoiser(condition)(noise, last)
    return difference, (found * noise).sum() / (jnp.linalg.norm(found) * jnp.linalg.norm(noise))


if __name__ == "__main__":
    raise SystemExit("error: the command is: python -m minigpt5_jax.convert verify --checkpoint DIR")
