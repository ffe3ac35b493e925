"""A run's folder has one owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from minigpt5_jax.training.owner import OWNER, Owner
from minigpt5_jax.training.provenance import CheckpointError

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on host elsewhere since noon")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_refused_with_the_name_of_the_first(tmp_path):
    first = Owner(tmp_path)
    second = [
        sys.executable,
        "-c",
        "import sys; from minigpt5_jax.training.owner import Owner; Owner(sys.argv[1])",
    ]
    done = subprocess.run([*second, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    message = done.stderr
    assert f"{tmp_path} is in use by process {os.getpid()} on host {socket.gethostname()} since 2" in message
    assert "another --workdir" in message
    first.release()
    Owner(tmp_path).release()
    assert not (tmp_path / OWNER).exists()


def test_a_second_of_the_same_process(tmp_path):
    """A notebook: what it holds itself it can close, and what it has lost holds nothing."""
    first = Owner(tmp_path)
    (tmp_path / "same").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "same"):
        with pytest.raises(CheckpointError, match="in use by this very process.*: loop.close\\(\\) ends it"):
            Owner(path)
    first.release()
    lost = Owner(tmp_path)
    lost.itself = lost  # a ring, as the one of checkpoints and their options
    del lost
    Owner(tmp_path).release()


def test_a_dead_process_does_not_block(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / OWNER)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="in use by process 7 on host elsewhere since noon; wait"):
            Owner(tmp_path)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (tmp_path / OWNER).read_text(), "left behind"
    owner = Owner(tmp_path)
    assert (tmp_path / OWNER).read_text().startswith(f"process {os.getpid()} on host")
    owner.release()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    owner = Owner(tmp_path / "a/run")
    owner.release()
    owner.release()
    assert not (tmp_path / "a/run").exists()
    kept = Owner(tmp_path / "b")
    (tmp_path / "b/metrics.jsonl").touch()
    kept.release()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_a_file_taken_away_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """The owner before lets go between this one's opening of the file and its lock."""
    import fcntl

    lock, taken = fcntl.flock, []

    def late(file, how):
        if not taken:
            taken.append((tmp_path / OWNER).unlink())
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    owner = Owner(tmp_path)
    with (tmp_path / OWNER).open() as file, pytest.raises(BlockingIOError):
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    owner.release()
