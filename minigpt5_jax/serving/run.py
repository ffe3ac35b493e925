"""A server from its socket to its end."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn

from minigpt5_jax.config import ConfigError
from minigpt5_jax.serving.app import LOOPBACK, Service, make_app
from minigpt5_jax.serving.engine import Engine
from minigpt5_jax.serving.metrics import Metrics
from minigpt5_jax.serving.schema import Limits
from minigpt5_jax.wiring.pipeline import MiniGPT5


def bind(host: str, port: int, key: str | None) -> socket.socket:
    """A socket bound to an address, before any work is done; it does not listen yet.

    Raises:
      ConfigError: others than this machine could reach it and there is no key, the address is taken, or is
        none of this machine's.
    """
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host={host} can be reached by other machines: set the key that their requests must bring, "
            "MINIGPT5_API_KEY=..., or leave --host out"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host={host}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose another --port (0: a free one)"
        ) from None
    return bound


def serve_model(
    model: MiniGPT5,
    name: str,
    bound: socket.socket,
    batch_size: int,
    limits: Limits,
    key: str | None,
    tell: Callable[[str], None],
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those that are inside are answered first.

    Args:
      model: to be served.  name: by which requests ask for it.
      bound: from :func:`bind`.
      batch_size: answers made together.
      limits: of requests.  key: that they must bring, or None.
      tell: called with lines for whoever started the server.
    """
    host, port = bound.getsockname()[:2]
    engine = Engine(model, batch_size, Metrics())
    tell("compiling")
    engine.start()
    hosts = LOOPBACK | {host} if key is None else None
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(Service(engine, name, limits, key, hosts)),
            log_level="warning",
            access_log=False,  # prompts and addresses of clients are nobody's business
            server_header=False,
            limit_concurrency=4 * limits.waiting + 64,  # connections; 503 beyond them
            timeout_keep_alive=5,
            ws="none",
        )
    )
    # uvicorn raises the signal again when it has ended well; then there is nothing left to stop.
    earlier = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGTERM, signal.SIGINT)}
    bound.listen(128)  # so that who reads the next line may come at once
    shown = f"[{host}]" if ":" in host else host
    tell(f"ready: http://{shown}:{port}/ (model {name!r}; Ctrl-C ends)")
    try:
        server.run(sockets=[bound])
    finally:
        engine.close()
        for kind, handler in earlier.items():
            signal.signal(kind, handler)
    tell("ended: every request that was inside is answered")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
