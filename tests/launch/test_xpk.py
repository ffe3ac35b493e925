"""``launch/xpk.sh`` against an xpk that records."""

from __future__ import annotations

import os
import subprocess

import pytest

ALL = {
    "PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "NAME": "n", "TYPE": "v5litepod-16", "IMAGE": "image:1",
}  # fmt: skip
CALL = [
    "workload", "create", "--project=p", "--zone=z", "--cluster=c", "--workload=n",
    "--tpu-type=v5litepod-16", "--num-slices=1", "--docker-image=image:1", "--max-restarts=100",
    "--restart-on-exit-codes=143", "--termination-grace-period-seconds=300", "--env=COORDINATOR_ADDRESS=auto",
]  # fmt: skip


def test_the_call_and_the_command_that_a_worker_runs(xpk, program, tmp_path):
    words = ["--config=a.py", "--config.tuning.rules=(('a b', 'llm'),)"]
    assert xpk.run("xpk.sh", *words, **ALL).returncode == 0
    [[*call, command]] = xpk.calls
    assert call == CALL and command.startswith("--command=exec python -m minigpt5_jax.train ")
    # xpk runs the command in a subshell of bash.
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subshell = f"({command.removeprefix('--command=')}) & wait $!"
    subprocess.run(["bash", "-c", subshell], check=True, env=path)
    assert (tmp_path / "said").read_text().splitlines()[3:] == ["-m", "minigpt5_jax.train", *words]


def test_slices_storage_and_restarts(xpk):
    assert xpk.run("xpk.sh", **ALL, SLICES="2", STORAGE="shared", RESTARTS="5").returncode == 0
    assert {"--num-slices=2", "--storage=shared", "--max-restarts=5"} < set(xpk.calls[0])


def test_what_xpk_refuses(xpk):
    xpk.answers = {"workload create": [(3, "")]}
    assert xpk.run("xpk.sh", **ALL).returncode == 3
    assert len(xpk.calls) == 1


@pytest.mark.parametrize("missing", ALL)
def test_a_variable_that_is_not_set_is_one_line_with_the_remedy(xpk, missing):
    given = {name: value for name, value in ALL.items() if name != missing}
    done = xpk.run("xpk.sh", **given)
    assert done.returncode == 2 and not xpk.calls
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {missing} is not set: {missing}=")
    remedy = done.stderr.split()[5].partition("=")[2]
    assert xpk.run("xpk.sh", **{**given, missing: remedy}).returncode == 0
