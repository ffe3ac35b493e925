"""What the command says where it cannot serve; nothing is loaded before."""

from __future__ import annotations

import socket

import pytest

import commands

pytest.importorskip("fastapi", reason="no fastapi: pip install -e '.[serve]'")

COMMAND = """
from minigpt5_jax import serve
cli.start(serve.main)
"""


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("serve"), "minigpt5_jax.serve", COMMAND)


def test_what_cannot_be_served(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for given, message in (
            ([], "error: give a model: --checkpoint shapes, or a run's folder"),
            (["--checkpoint=x", f"--port={port}"], f"error: cannot listen at 127.0.0.1 port {port}: Address"),
            (["--checkpoint=x", "--host=0.0.0.0"], "error: --host=0.0.0.0 can be reached by other machines"),
            (["--checkpoint=/no/such", "--port=0"], "no complete checkpoint in /no/such"),
            (["--port=99999"], "port"),
        ):
            done = serve(*given)
            assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_extra_is_named_where_it_is_missing(tmp_path):
    hidden = "sys.modules['uvicorn'] = None\n" + COMMAND
    for serve in commands.serve(tmp_path, "minigpt5_jax.serve", hidden):
        done = serve("--checkpoint=x")
        assert done.returncode == 1
        assert done.stderr == 'error: uvicorn is missing: pip install "minigpt5_jax[serve]"\n'
