"""``launch/gcloud_tpu.sh`` against a gcloud that records: each call, after failures and preemptions too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELF = ("--project=p", "--zone=z")
OWN = {"PROJECT": "p", "ZONE": "z", "NAME": "n"}
MADE = {"TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}
QUICK = {"POLL_SECONDS": "0", "SETTLE_SECONDS": "0"}
ALL = {**OWN, **MADE, **QUICK}
GCLOUD = ["compute", "tpus"]
DESCRIBE = [*GCLOUD, "queued-resources", "describe", "n", *SELF, "--format=value(state.state)"]
CREATE = [
    *GCLOUD, "queued-resources", "create", "n", *SELF, "--node-id=n", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
]  # fmt: skip
DELETE = [*GCLOUD, "queued-resources", "delete", "n", *SELF, "--force", "--quiet"]
COPY, SSH = [*GCLOUD, "tpu-vm", "scp"], [*GCLOUD, "tpu-vm", "ssh", "n", *SELF, "--worker=all"]
TRAINING = "cd minigpt5_jax && COORDINATOR_ADDRESS=auto exec .venv/bin/python -m minigpt5_jax.train"
ACTIVE, WAITING, SUSPENDED = (0, "ACTIVE"), (0, "WAITING_FOR_RESOURCES"), (0, "SUSPENDED")


def kinds(calls: list[list[str]]) -> list[str]:
    """The verb of each call; ``train`` for the one that trains."""
    return ["train" if TRAINING in call[-1] else call[3] if call[:2] == GCLOUD else call[0] for call in calls]


INSTALLED = ["create", "describe", "archive", "scp", "ssh"]


def test_create_waits_and_installs_on_every_worker(gcloud):
    gcloud.answers = {"describe": [WAITING, WAITING, ACTIVE]}
    done = gcloud.run("gcloud_tpu.sh", "create", **ALL, PREPARE="sudo mount a:/b /shared")
    assert done.returncode == 0, done.stderr
    *asked, pack, copy, install = gcloud.calls
    assert asked == [CREATE, DESCRIBE, DESCRIBE, DESCRIBE]
    assert done.stderr.splitlines() == ["launch: n is WAITING_FOR_RESOURCES", "launch: n is ACTIVE"]
    assert copy[:4] == COPY and copy[5:] == ["n:", *SELF, "--worker=all"]
    assert copy[4].endswith("/minigpt5_jax.tar.gz") and f"--output={copy[4]}" in pack
    packed = pack[pack.index("HEAD") + 1 :]
    assert {"configs", "minigpt5_jax", "setup.py"} < set(packed)
    assert all((ROOT / name).exists() for name in packed)
    assert install[:-1] == SSH and install[-1].startswith("--command=set -e;")
    assert install[-1].endswith("; sudo mount a:/b /shared")
    subprocess.run(["bash", "-n", "-c", install[-1].removeprefix("--command=")], check=True)


def test_a_tpu_that_may_be_preempted(gcloud):
    gcloud.answers = {"describe": [ACTIVE]}
    assert gcloud.run("gcloud_tpu.sh", "create", **ALL, SPOT="1").returncode == 0
    assert gcloud.calls[0] == [*CREATE, "--spot"]


def test_a_request_that_fails(gcloud):
    gcloud.answers = {"describe": [WAITING, (0, "FAILED")]}
    done = gcloud.run("gcloud_tpu.sh", "create", **ALL)
    assert done.returncode == 2 and kinds(gcloud.calls) == ["create", "describe", "describe"]
    assert (
        "error: the TPU did not come: gcloud compute tpus queued-resources describe n says why" in done.stderr
    )


def test_run_gives_the_arguments_to_the_program(gcloud, program, tmp_path):
    gcloud.answers = {"describe": [ACTIVE]}
    words = ["--config", "configs/stage1.py", "--config.tuning.rules=(('a b', 'llm'),)"]
    assert gcloud.run("gcloud_tpu.sh", "run", *words, **OWN, **QUICK).returncode == 0
    described, trained = gcloud.calls
    assert described == DESCRIBE and trained[:-1] == SSH
    # As a worker's shell reads it.
    (tmp_path / "minigpt5_jax/.venv/bin").mkdir(parents=True)
    shutil.copy(program, tmp_path / "minigpt5_jax/.venv/bin/python")
    subprocess.run(["bash", "-c", trained[-1].removeprefix("--command=")], check=True, cwd=tmp_path)
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["auto", "", "", "-m", "minigpt5_jax.train", *words]


def test_stopped_and_saved_is_started_again_on_the_same_tpu(gcloud):
    gcloud.answers = {"describe": [ACTIVE], TRAINING: [(143, ""), (0, "")]}
    assert gcloud.run("gcloud_tpu.sh", "run", "--config=a", **OWN, **QUICK).returncode == 0
    assert kinds(gcloud.calls) == ["describe", "train", "describe", "train"]
    assert gcloud.calls[1] == gcloud.calls[3], "the same command"


@pytest.mark.parametrize("status", [143, 255, 134])
def test_a_preempted_tpu_is_asked_for_again(gcloud, status):
    seen = [ACTIVE, SUSPENDED, ACTIVE] if status == 143 else [ACTIVE, SUSPENDED, SUSPENDED, ACTIVE]
    gcloud.answers = {"describe": seen, TRAINING: [(status, ""), (0, "")]}
    done = gcloud.run("gcloud_tpu.sh", "run", "--config=a", **ALL)
    assert done.returncode == 0, done.stderr
    looked = ["describe"] * (len(seen) - 2)
    assert kinds(gcloud.calls) == ["describe", "train", *looked, "delete", *INSTALLED, "train"]
    assert DELETE in gcloud.calls and CREATE in gcloud.calls
    assert f"launch: interrupted with status {status}; going on from the last checkpoint" in done.stderr


@pytest.mark.parametrize("status", [1, 134, 137])
def test_an_error_is_not_repeated(gcloud, status):
    gcloud.answers = {"describe": [ACTIVE], TRAINING: [(status, "")]}
    assert gcloud.run("gcloud_tpu.sh", "run", **ALL).returncode == status
    assert kinds(gcloud.calls) == ["describe", "train", "describe"]


def test_restarts_have_an_end(gcloud):
    gcloud.answers = {"describe": [ACTIVE], TRAINING: [(143, "")]}
    done = gcloud.run("gcloud_tpu.sh", "run", **ALL, RESTARTS="2")
    assert done.returncode == 143 and kinds(gcloud.calls).count("train") == 3
    assert "RESTARTS=2 allows no more" in done.stderr


def test_a_call_that_fails_is_repeated_and_not_for_ever(gcloud):
    gcloud.answers = {"describe": [(1, ""), (1, ""), ACTIVE]}
    assert gcloud.run("gcloud_tpu.sh", "run", **OWN, **QUICK).returncode == 0
    assert kinds(gcloud.calls) == ["describe"] * 3 + ["train"]
    gcloud.answers = {"describe": [(1, "")]}
    assert gcloud.run("gcloud_tpu.sh", "run", **OWN, **QUICK).returncode == 1
    assert kinds(gcloud.calls) == ["describe"] * 3


@pytest.mark.parametrize("verb", ["create", "scp", "ssh"])
def test_what_gcloud_refuses_ends_create(gcloud, verb):
    gcloud.answers = {f" {verb} ": [(7, "")], "describe": [ACTIVE]}
    assert gcloud.run("gcloud_tpu.sh", "create", **ALL).returncode == 7
    assert kinds(gcloud.calls) == INSTALLED[: INSTALLED.index(verb) + 1]


def test_delete(gcloud):
    assert gcloud.run("gcloud_tpu.sh", "delete", **OWN).returncode == 0
    assert gcloud.calls == [DELETE]


@pytest.mark.parametrize("missing", [*OWN, *MADE])
def test_a_variable_that_is_not_set_is_one_line_with_the_remedy(gcloud, missing):
    given = {name: value for name, value in ALL.items() if name != missing}
    done = gcloud.run("gcloud_tpu.sh", "create", **given)
    assert done.returncode == 2 and not gcloud.calls
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {missing} is not set: {missing}=")
    remedy = done.stderr.split()[5].partition("=")[2]
    gcloud.answers = {"describe": [ACTIVE]}
    assert gcloud.run("gcloud_tpu.sh", "create", **{**given, missing: remedy}).returncode == 0


@pytest.mark.parametrize("words", [[], ["start"]])
def test_an_unknown_verb(gcloud, words):
    done = gcloud.run("gcloud_tpu.sh", *words, **ALL)
    assert done.returncode == 2 and not gcloud.calls
    assert done.stderr == "error: the first argument is create, run or delete\n"
