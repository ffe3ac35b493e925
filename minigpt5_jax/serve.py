"""Serve a trained model: OpenAI's API, and a page to talk to it.

    python -m minigpt5_jax.serve --checkpoint shapes
    python -m minigpt5_jax.serve --checkpoint runs/stage2 --port 9000 --batch_size 8
    MINIGPT5_API_KEY=... python -m minigpt5_jax.serve --checkpoint runs/stage2 --host 0.0.0.0

The page is at the address that is printed; programs use ``/v1/chat/completions`` and
``/v1/images/generations`` (docs/serving.md).  It needs ``pip install "minigpt5_jax[serve]"``.  Only this
machine reaches the server, unless ``--host`` says otherwise; then requests need the key of
``MINIGPT5_API_KEY``.

SIGTERM and Ctrl-C take no new requests, finish those that are there, and end with status 0.
"""

from __future__ import annotations

import os

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError

CHECKPOINT = cli.define_path(
    "checkpoint", None, "A run's --workdir, a saved model, a Hugging Face id in the cache, or shapes."
)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
INFERENCE = flags.DEFINE_multi_string(
    "inference", [], "KEY=VALUE in place of the run's inference.KEY, for example num_inference_steps=10."
)
WEIGHTS = flags.DEFINE_multi_string("weights", [], "NAME=PATH where a source of frozen weights moved.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; any but this machine's needs a key.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 for a free one.", lower_bound=0, upper_bound=65535)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Answers made together; always as many.", lower_bound=1)
QUEUE = flags.DEFINE_integer("queue", 64, "Requests answered or waiting; beyond them 429.", lower_bound=1)
TIME_LIMIT = flags.DEFINE_float(
    "time_limit", 300.0, "Seconds of a request, waiting included.", lower_bound=0.1
)
BODY_LIMIT = flags.DEFINE_integer("body_limit", 16, "Megabytes of a request's body.", lower_bound=1)


def serve() -> None:
    """The command: answers until it is told to end."""
    if not CHECKPOINT.value:
        raise ConfigError("give a model: --checkpoint shapes, or a run's folder")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'{error.name} is missing: pip install "minigpt5_jax[serve]"') from None
    from minigpt5_jax.serving.run import bind, serve_model
    from minigpt5_jax.serving.schema import Limits
    from minigpt5_jax.wiring.pipeline import MiniGPT5

    key = os.environ.get("MINIGPT5_API_KEY") or None
    with bind(HOST.value, PORT.value, key) as socket:
        cli.tell(f"opening {CHECKPOINT.value}")
        model = MiniGPT5.from_pretrained(
            CHECKPOINT.value,
            step=STEP.value,
            weights=cli.sources(WEIGHTS.value),
            **cli.pairs(INFERENCE.value, "inference"),
        )
        limits = Limits(QUEUE.value, TIME_LIMIT.value, BODY_LIMIT.value * 2**20)
        name = os.path.basename(os.path.normpath(CHECKPOINT.value))
        serve_model(model, name, socket, BATCH_SIZE.value, limits, key, cli.tell)


def main(argv: list[str]) -> None:
    """The command."""
    cli.guarded(serve)


if __name__ == "__main__":
    cli.start(main)
